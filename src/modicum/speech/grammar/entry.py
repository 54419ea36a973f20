"""Entry: from commands and recordings to a grammar that is understood better."""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal, get_args

import numpy as np

from modicum.errors import InputError
from modicum.search import (
    CrossEntropySettings,
    SearchResult,
    cross_entropy_search,
    greedy_search,
    refined_search,
)
from modicum.speech.grammar.candidates import (
    CandidateSettings,
    Expression,
    candidate_expressions,
    original_expressions,
)
from modicum.speech.grammar.command_model import CommandModel
from modicum.speech.grammar.commands import check_commands
from modicum.speech.grammar.decision import (
    Decisions,
    check_enough,
    check_false_alarm_rate,
    threshold_for,
)
from modicum.speech.grammar.dictionary import PronunciationDictionary, count_words, hear_words
from modicum.speech.grammar.division import Division, divide
from modicum.speech.grammar.evaluation import GrammarRates, LabelledScores, grammar_rates
from modicum.speech.grammar.grammar_file import Grammar
from modicum.speech.grammar.leave_one_out import leave_one_out
from modicum.speech.grammar.objective import GrammarObjective, ObjectiveSettings
from modicum.speech.grammar.recordings import Recording, of_commands
from modicum.speech.grammar.score_table import compute_scores, readable

Method = Literal["refine", "greedy", "cem"]
"""Greedy with refinement, greedy, cross-entropy method."""

Threshold = Literal["refit", "fixed"]
"""While searching: set anew for every grammar at the wanted rate of false alarms, or the original one's."""

Progress = Callable[[str, int, int], object]
"""Called with what is done, how much of it is done, and how much there is in all."""

_FEW = 10
"""Recordings of a command below which a warning is due."""


@dataclass(frozen=True)
class GrammarSettings:
    """Settings of `search_grammar`.

    Attributes:
        false_alarm_rate: wanted of other speech; it sets the threshold and is the ceiling of the search.
        method: see `Method`.
        threshold: see `Threshold`.
        max_added: expressions added at most; None for no limit.
        held_out: share of the speakers, or of the files whose speaker is not known, that is kept from the
            search to measure with; 0 for none.
        num_best: decodes of each recording from which a dictionary is learned.
        candidates: see `CandidateSettings`.
        objective: weights of errors; its ceiling and threshold are set from the above.
        cem: of the cross-entropy method; its seed is the seed below.
        seed: of the division and of the method.

    Raises:
        InputError: a value is out of range.
    """

    false_alarm_rate: float = 0.01
    method: Method = "refine"
    threshold: Threshold = "refit"
    max_added: int | None = None
    held_out: float = 0.3
    num_best: int = 1
    candidates: CandidateSettings = field(default_factory=CandidateSettings)
    objective: ObjectiveSettings = field(default_factory=ObjectiveSettings)
    cem: CrossEntropySettings = field(default_factory=CrossEntropySettings)
    seed: int = 0

    def __post_init__(self) -> None:
        check_false_alarm_rate(self.false_alarm_rate)
        for name, kinds in (("method", Method), ("threshold", Threshold)):
            if getattr(self, name) not in get_args(kinds):
                raise InputError(
                    f"{name} is {getattr(self, name)!r}: choose one of {', '.join(get_args(kinds))}"
                )
        if not 0 <= self.held_out < 1:
            raise InputError(f"held_out is {self.held_out}: give a share from 0 to below 1")
        if self.num_best < 1:
            raise InputError(f"num_best is {self.num_best}: give 1 or more decodes")
        if self.max_added is not None and self.max_added < 0:
            raise InputError(f"max_added is {self.max_added}: give 0 or more, or None for no limit")


@dataclass(frozen=True)
class GrammarReport:
    """What was found.

    Attributes:
        grammar: with what was added.
        result: of the search.
        searched: rates on the recordings that the search saw, original and new grammar; by `leave_one_out`
            where the dictionary is of the same recordings.
        held_out: rates on those that it did not see; empty where none were held out.
        num_candidates: that were searched.
        num_recordings: of commands and of other speech, for the search and held out.
        are_speakers_known: whether every recording, of commands and of other speech, names a speaker, so that
            no speaker is in both parts.
        seconds: that the search itself took.
    """

    grammar: Grammar
    result: SearchResult
    searched: tuple[GrammarRates, ...]
    held_out: tuple[GrammarRates, ...]
    num_candidates: int
    num_recordings: tuple[int, int, int, int]
    are_speakers_known: bool
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        """As JSON takes it, without curves."""
        return {
            "model": self.grammar.model,
            "commands": list(self.grammar.commands),
            "expressions": [
                [one.text for one in self.grammar.of(i)] for i in range(len(self.grammar.commands))
            ],
            "threshold": self.grammar.threshold,
            "original_threshold": self.grammar.original_threshold,
            "num_candidates": self.num_candidates,
            "num_evaluations": self.result.num_evaluations,
            "num_recordings": self.num_recordings,
            "are_speakers_known": self.are_speakers_known,
            "searched": [one.to_dict() for one in self.searched],
            "held_out": [one.to_dict() for one in self.held_out],
            "seconds": self.seconds,
        }


def search_grammar(
    model: CommandModel,
    commands: Sequence[str],
    recordings: Sequence[Recording],
    others: Sequence[Recording],
    settings: GrammarSettings | None = None,
    *,
    dictionary: PronunciationDictionary | None = None,
    progress: Progress | None = None,
) -> GrammarReport:
    """Add to a grammar what the model hears instead of its commands, where that lowers errors.

    Args:
        model: it is not changed.
        commands: texts.
        recordings: of the commands, by people or voices like those who will speak them.
        others: speech that is no command; for a false-alarm rate r at least 1 / r recordings.
        settings: see `GrammarSettings`.
        dictionary: learned from general speech; None to learn it from those recordings of the commands that
            are not held out.
        progress: see `Progress`.

    Raises:
        InputError: a command cannot be written, two are the same, one has no recording, or there is too
            little other speech.
        ModelError: the dictionary is of another model.
    """
    settings = settings or GrammarSettings()
    commands = check_commands(commands)
    originals = original_expressions(model, commands)
    if dictionary is not None:
        dictionary.check(model)
    chosen = readable(model, of_commands(recordings, commands), progress)
    others = readable(model, others, progress)
    parts = divide(chosen, others, settings.held_out, settings.seed)
    seen, kept = parts.seen, parts.kept
    check_enough(len(parts.seen_others), settings.false_alarm_rate)
    _check_held_out(parts, settings.held_out)
    labels = np.array([commands.index(one.text) for one in chosen], dtype=np.int64)
    _check_enough(commands, labels[seen])
    heard = None
    if dictionary is None:
        heard = hear_words(model, [chosen[row] for row in seen], settings.num_best, progress)
        dictionary = count_words(model, heard)
    candidates = candidate_expressions(model, commands, dictionary, settings.candidates)
    expressions = [*originals, *candidates]
    # All at once: the model runs once for each recording.
    scores = LabelledScores(
        compute_scores(model, chosen, expressions, progress=progress),
        labels,
        compute_scores(model, others, expressions, progress=progress),
    )
    searched = scores.rows(seen, parts.seen_others)
    judged = searched
    if heard is not None:
        left = leave_one_out(searched.commands, heard, expressions, commands, len(originals))
        judged = replace(searched, commands=left)
    result, original_threshold, seconds = search(judged, expressions, len(originals), settings, progress)
    columns = [*range(len(originals)), *(len(originals) + item for item in result.chosen)]
    added = tuple(expressions[column] for column in columns)
    alarms = Decisions.of(searched.others.columns(columns), [one.command for one in added])
    threshold = threshold_for(alarms.confidence, settings.false_alarm_rate)
    grammar = Grammar(
        model.name,
        model.units,
        model.symbols,
        model.digest,
        commands,
        added,
        len(originals),
        threshold,
        original_threshold,
        {"settings": asdict(settings)},
    )

    def both(part: LabelledScores) -> tuple[GrammarRates, ...]:
        return compare(part.columns(columns), grammar, settings.false_alarm_rate)

    has_kept = bool(len(kept)) and bool(len(parts.kept_others))
    return GrammarReport(
        grammar,
        result,
        both(judged),
        both(scores.rows(kept, parts.kept_others)) if has_kept else (),
        len(candidates),
        (len(seen), len(parts.seen_others), len(kept), len(parts.kept_others)),
        parts.are_speakers_known,
        seconds,
    )


def evaluate_grammar(
    model: CommandModel,
    grammar: Grammar,
    recordings: Sequence[Recording],
    others: Sequence[Recording],
    false_alarm_rate: float = 0.01,
    *,
    progress: Progress | None = None,
) -> tuple[GrammarRates, ...]:
    """Rates of the original grammar and of the one with additions, on recordings that neither has seen.

    Raises:
        InputError: there are no recordings of a command, or none of other speech.
        ModelError: the grammar is for a model of other units.
    """
    check_false_alarm_rate(false_alarm_rate)
    grammar.check(model)
    chosen = readable(model, of_commands(recordings, grammar.commands), progress)
    others = readable(model, others, progress)
    scores = LabelledScores(
        compute_scores(model, chosen, grammar.expressions, progress=progress),
        np.array([grammar.commands.index(one.text) for one in chosen], dtype=np.int64),
        compute_scores(model, others, grammar.expressions, progress=progress),
    )
    return compare(scores, grammar, false_alarm_rate)


def compare(scores: LabelledScores, grammar: Grammar, false_alarm_rate: float) -> tuple[GrammarRates, ...]:
    """Rates of the original grammar and of the new one, from scores of the new one's expressions."""
    size = grammar.num_original
    before = scores.columns(range(size))
    first = grammar_rates(
        "original", before, grammar.owners[:size], grammar.original_threshold, false_alarm_rate
    )
    second = grammar_rates("improved", scores, grammar.owners, grammar.threshold, false_alarm_rate)
    return first, second


def search(
    scores: LabelledScores,
    expressions: Sequence[Expression],
    num_original: int,
    settings: GrammarSettings,
    progress: Progress | None = None,
) -> tuple[SearchResult, float, float]:
    """The search alone: its result, the original grammar's threshold, and seconds of processor time.

    Raises:
        InputError: there is too little other speech to set a threshold by, or nearly all of it is too short
            for every command.
    """
    owners = [one.command for one in expressions]
    before = Decisions.of(scores.others.columns(range(num_original)), owners[:num_original])
    threshold = threshold_for(before.confidence, settings.false_alarm_rate)
    if not math.isfinite(threshold):
        short = int(np.isneginf(before.confidence).sum())
        raise InputError(
            f"{short:,} of {len(before.confidence):,} recordings of other speech are too short for every "
            "command, so no threshold can be set by them: give longer ones, or cut longer pieces"
        )
    objective = GrammarObjective(
        scores.commands,
        scores.labels,
        scores.others,
        owners,
        num_original,
        replace(
            settings.objective,
            ceiling=settings.false_alarm_rate,
            threshold=threshold if settings.threshold == "fixed" else None,
        ),
    )
    started = time.process_time()
    limit = settings.max_added
    if settings.method == "greedy":
        found = greedy_search(objective, max_items=limit, progress=progress)
    elif settings.method == "refine":
        found = refined_search(objective, max_items=limit, progress=progress)
    else:
        cem = replace(settings.cem, seed=settings.seed)
        found = cross_entropy_search(objective, cem, max_items=limit, progress=progress)
    return found, threshold, time.process_time() - started


def _check_held_out(parts: Division, held_out: float) -> None:
    """Warn where a share is to be held out and nothing is, so that the rates are of what the search saw."""
    empty = [
        f"none of {len(seen):,} recordings of {what}"
        for what, seen, kept in (
            ("commands", parts.seen, parts.kept),
            ("other speech", parts.seen_others, parts.kept_others),
        )
        if not len(kept)
    ]
    if held_out and empty:
        warnings.warn(
            f"a share of {held_out:g} is to be held out, and {' and '.join(empty)} is: the rates are of "
            "recordings that the search has seen; give recordings of more speakers, or a larger share",
            stacklevel=3,
        )


def _check_enough(commands: Sequence[str], labels: np.ndarray) -> None:
    counts = np.bincount(labels, minlength=len(commands))
    few = [f"{command!r} ({count})" for command, count in zip(commands, counts, strict=True) if count < _FEW]
    if few:
        warnings.warn(
            f"fewer than {_FEW} recordings to search with of {', '.join(few[:5])}"
            f"{' and others' if len(few) > 5 else ''}: what is found for them may not hold for "
            "other speakers",
            stacklevel=3,
        )
