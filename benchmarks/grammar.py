"""Voice commands: errors of grammars before and after additions, of three command sets and two models.

    python benchmarks/grammar.py --data FOLDER --work FOLDER          # measures what rows.jsonl does not have
    python benchmarks/grammar.py --data FOLDER --work FOLDER --quick  # few recordings, one seed; for a trial
    python benchmarks/grammar.py --data FOLDER --work FOLDER --docs   # writes tables and their data into docs

DATA holds voice_commands (wake_words, barista) and fsdd. --sets and --models choose some. One thread.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import machine
import numpy as np
import torch
from grammar_rivals import KeywordSpotting, PhoneLoop, SphinxGrammar
from grammar_sets import PARTS, QUICK, SETS, TRIALS, Sizes, Trial
from grammar_tables import MODELS, RATE, section
from measured_rows import append_row, read_rows, work_folder, write_docs
from torch import Tensor

from modicum.search import CrossEntropySettings
from modicum.speech import load_audio
from modicum.speech.grammar import (
    CandidateSettings,
    CommandModel,
    Decisions,
    Expression,
    GrammarSettings,
    LabelledScores,
    candidate_expressions,
    compute_scores,
    ctc_scores,
    open_model,
    original_expressions,
    read_recordings,
    threshold_for,
)
from modicum.speech.grammar.command_model import EMBEDDED, SPHINX, Heard
from modicum.speech.grammar.decision import NO_COMMAND
from modicum.speech.grammar.dictionary import HeardWord, count_words, hear_words
from modicum.speech.grammar.entry import search
from modicum.speech.grammar.leave_one_out import leave_one_out
from modicum.speech.grammar.score_table import readable

METHODS: dict[str, dict[str, Any]] = {
    "original": {"method": "greedy", "max_added": 0},
    "greedy": {"method": "greedy", "threshold": "fixed"},
    "greedy, refit": {"method": "greedy"},
    "refine, refit": {"method": "refine"},
    "CEM": {"method": "cem", "threshold": "fixed"},
    "CEM, refit": {"method": "cem"},
    "CEM from 1/2, refit": {"method": "cem", "cem": CrossEntropySettings(start=0.499)},
    "all": {},
}

# -- measuring -----------------------------------------------------------------------------------------------


class Remembering:
    """A command model whose decodes are kept in a file: they are the same for every seed."""

    def __init__(self, model: CommandModel, path: Path) -> None:
        self._model, self._path = model, path
        self._heard: dict[str, list[str]] = json.loads(path.read_text()) if path.exists() else {}
        self.name, self.units, self.symbols = model.name, model.units, model.symbols
        self.digest, self.sample_rate = model.digest, model.sample_rate
        self.forms, self.split, self.join, self.score = model.forms, model.split, model.join, model.score

    def hear(self, samples: Tensor, num_best: int) -> list[Heard]:
        """The best decode."""
        key = hashlib.sha256(samples.numpy().tobytes()).hexdigest()[:24]
        if key not in self._heard:
            self._heard[key] = list(self._model.hear(samples, 1)[0].units)
        return [Heard(tuple(self._heard[key]), 1.0)]

    def save(self) -> None:
        """Write what is new."""
        part = self._path.with_suffix(".part")
        part.write_text(json.dumps(self._heard))
        os.replace(part, self._path)


@dataclass(frozen=True)
class Prepared:
    """A trial with its expressions."""

    trial: Trial
    expressions: list[Expression]
    num_original: int
    heard: list[list[HeardWord]]
    """In the recordings of the search, which the dictionary was learned from, too."""


class Bench:
    """Data, scores and rows in a folder."""

    def __init__(self, data: Path, work: Path, sizes: Sizes) -> None:
        self.data, self.work, self.sizes = data, work, sizes
        self.rows = read_rows(work)
        self.phones: PhoneLoop | None = None
        self.decided: dict[tuple[Any, ...], dict[tuple[Path, float], tuple[int, float]]] = {}
        """What rivals decided, by grammar and by recording: seeds share most of it."""

    def has(self, **key: Any) -> bool:
        """Whether there is such a row."""
        return any(key.items() <= row.items() for row in self.rows)

    def add(self, row: dict[str, Any]) -> None:
        """Write a row."""
        append_row(self.work, row)
        self.rows.append(row)
        shown = {k: v for k, v in row.items() if not isinstance(v, dict | list)}
        shown |= {k: v["rates"] for k, v in row.items() if isinstance(v, dict) and "rates" in v}
        print(shown, file=sys.stderr, flush=True)

    def measure(self, name: str, kind: str) -> None:
        """All methods of a command set and an acoustic model."""
        rivals = kind == SPHINX
        wanted = [*METHODS, *(("keyword spotting", "JSGF", "JSGF, CEM, refit") if rivals else ())]
        key = {"kind": "errors", "set": name, "model": kind}
        if all(self.has(**key, seed=seed, method=one) for seed in self.sizes.seeds for one in wanted):
            return
        model = Remembering(open_model(kind), self.work / f"heard-{kind}.json")
        prepared = []
        for seed in self.sizes.seeds:
            trial = TRIALS[name](self.data, self.work, self.sizes, seed)
            trial = Trial(trial.commands, *(readable(model, getattr(trial, part)) for part in PARTS))
            heard = hear_words(model, trial.general, progress=tell)
            model.save()
            dictionary = count_words(model, heard)
            originals = original_expressions(model, trial.commands)
            candidates = candidate_expressions(model, trial.commands, dictionary, CandidateSettings())
            # The recordings of the search are the last ones of the general speech.
            own = heard[len(heard) - len(trial.search) :]
            prepared.append(Prepared(trial, [*originals, *candidates], len(originals), own))
        forms = {one.forms: one for p in prepared for one in p.expressions}
        union = [forms[key] for key in sorted(forms)]
        column = {one.forms: at for at, one in enumerate(union)}
        everything = {
            (one.audio, one.start): one
            for p in prepared
            for part in PARTS[1:]
            for one in getattr(p.trial, part)
        }
        listed = [everything[key] for key in sorted(everything)]
        row_of = {(one.audio, one.start): row for row, one in enumerate(listed)}
        table = compute_scores(model, listed, union, progress=tell)
        for seed, p in zip(self.sizes.seeds, prepared, strict=True):
            columns = [column[one.forms] for one in p.expressions]

            def scores(
                own: str, others: str, p: Prepared = p, columns: list[int] = columns
            ) -> LabelledScores:
                rows = [
                    [row_of[one.audio, one.start] for one in getattr(p.trial, part)] for part in (own, others)
                ]
                labels = np.array([p.trial.commands.index(one.text) for one in getattr(p.trial, own)])
                first, second = (table.rows(row).columns(columns) for row in rows)
                return LabelledScores(first, labels, second)

            seen = scores("search", "search_others")
            left = leave_one_out(seen.commands, p.heard, p.expressions, p.trial.commands, p.num_original)
            parts = replace(seen, commands=left), scores("test", "test_others")
            chosen = self.methods(key | {"seed": seed}, p, parts)
            if rivals:
                self.rivals(key | {"seed": seed}, p, chosen)

    def methods(
        self, key: dict[str, Any], p: Prepared, parts: tuple[LabelledScores, LabelledScores]
    ) -> list[Expression]:
        """Rows of all methods; the expressions that the last refitted CEM chose."""
        seen, test = parts
        owners = [one.command for one in p.expressions]
        best: list[Expression] = []
        for method, options in METHODS.items():
            if self.has(**key, method=method) and method != "CEM, refit":
                continue
            settings = GrammarSettings(false_alarm_rate=RATE, seed=key["seed"], **options)
            value = evaluations = seconds = 0.0
            if method == "all":
                items = list(range(len(p.expressions)))
                before = Decisions.of(seen.others.columns(range(p.num_original)), owners[: p.num_original])
                fixed = threshold_for(before.confidence, RATE)
            else:
                result, fixed, seconds = search(seen, p.expressions, p.num_original, settings, tell)
                items = [*range(p.num_original), *(p.num_original + item for item in result.chosen)]
                value, evaluations = result.value, result.num_evaluations
            if method == "CEM, refit":
                best = [p.expressions[item] for item in items]
                if self.has(**key, method=method):
                    continue
            chosen = [owners[item] for item in items]
            own = Decisions.of(seen.others.columns(items), chosen)
            decided = Decisions.of(test.commands.columns(items), chosen)
            others = Decisions.of(test.others.columns(items), chosen)
            told = {
                "method": method,
                "size": len(items),
                "original": p.num_original,
                "candidates": len(p.expressions) - p.num_original,
                "value": value,
                "evaluations": evaluations,
                "seconds": round(seconds, 2),
                "recordings": [len(getattr(p.trial, part)) for part in PARTS],
            }
            thresholds = {
                "fixed": fixed,
                "retuned": threshold_for(own.confidence, RATE),
                "equal": threshold_for(others.confidence, RATE),
            }
            at = {name: outcome(decided, test.labels, others, value) for name, value in thresholds.items()}
            self.add(key | told | at)
        return best

    def rivals(self, key: dict[str, Any], p: Prepared, chosen: list[Expression]) -> None:
        """pocketsphinx's own keyword spotting and JSGF, at thresholds set in the same two ways."""
        self.phones = phones = self.phones or PhoneLoop()
        commands, originals = tuple(p.trial.commands), p.expressions[: p.num_original]
        makers: dict[str, tuple[tuple[Expression, ...], Callable[[], Any]]] = {
            "keyword spotting": ((), lambda: KeywordSpotting(commands)),
            "JSGF": (tuple(originals), lambda: SphinxGrammar(commands, originals, phones)),
            "JSGF, CEM, refit": (tuple(chosen), lambda: SphinxGrammar(commands, chosen, phones)),
        }
        for method, (expressions, make) in makers.items():
            if self.has(**key, method=method):
                continue
            rival = make()
            known = self.decided.setdefault((method, commands, tuple(one.forms for one in expressions)), {})

            def decide(part: str, rival: Any = rival, known: Any = known) -> Decisions:
                recordings = getattr(p.trial, part)
                for done, one in enumerate(recordings):
                    tell("pocketsphinx itself", done, len(recordings))
                    if (one.audio, one.start) not in known:
                        known[one.audio, one.start] = rival.decide(one.load(16_000))
                commands, confidence = zip(*(known[one.audio, one.start] for one in recordings), strict=True)
                return Decisions(np.array(commands), np.array(confidence, dtype=np.float64))

            own, decided, others = (decide(part) for part in ("search_others", "test", "test_others"))
            labels = np.array([p.trial.commands.index(one.text) for one in p.trial.test])
            thresholds = {
                "retuned": threshold_for(own.confidence, RATE),
                "equal": threshold_for(others.confidence, RATE),
            }
            at = {name: outcome(decided, labels, others, value) for name, value in thresholds.items()}
            size = len(chosen) if "CEM" in method else p.num_original
            self.add(key | {"method": method, "size": size} | at)

    def times(self) -> None:
        """Processor time of a decision against the size of the grammar, for the embedded recognizer."""
        if self.has(kind="times"):
            return
        model = open_model(EMBEDDED)
        recordings = read_recordings(self.data / "voice_commands" / "wake_words")[:: 1700 // self.sizes.timed]
        samples = [load_audio(one.audio) for one in recordings[: self.sizes.timed]]
        audio = float(np.median([len(one) / 16_000 for one in samples]))
        log_probs = [model._log_probs(one) for one in samples]  # type: ignore[attr-defined]
        started = time.process_time()
        for one in samples:
            model._log_probs(one)  # type: ignore[attr-defined]
        acoustic = (time.process_time() - started) / len(samples)
        chance = random.Random(0)
        for size in (6, 12, 25, 50, 100, 200, 400):
            labels = [[chance.randint(2, 28) for _ in range(9)] for _ in range(size)]
            taken = []
            for one in log_probs:
                started = time.process_time()
                ctc_scores(one, labels)
                taken.append(time.process_time() - started)
            told = {"kind": "times", "size": size, "seconds": float(np.median(taken))}
            self.add(told | {"acoustic": acoustic, "audio": audio})


def outcome(decided: Decisions, labels: np.ndarray, others: Decisions, threshold: float) -> dict[str, Any]:
    """What becomes of each recording: "." right, "m" missed, "c" confused, "f" a false alarm; and rates."""
    accepted = decided.accepted(threshold)
    own = "".join(
        "m" if a == NO_COMMAND else "." if a == label else "c"
        for a, label in zip(accepted, labels, strict=True)
    )
    foreign = "".join("." if a == NO_COMMAND else "f" for a in others.accepted(threshold))
    rates = [own.count("m") / len(own), own.count("c") / len(own), foreign.count("f") / len(foreign)]
    return {"commands": own, "others": foreign, "rates": [round(one, 4) for one in rates]}


_told = [0.0]


def tell(what: str, done: int, total: int) -> None:
    """A line on stderr now and then."""
    if time.monotonic() - _told[0] > 30:
        _told[0] = time.monotonic()
        print(f"{what}: {done:,} of {total:,}", file=sys.stderr, flush=True)


def main() -> None:
    """Measure what is missing, or write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="holds voice_commands and fsdd")
    parser.add_argument("--work", type=Path, required=True, help="gets scores and rows.jsonl")
    parser.add_argument("--sets", default=",".join(SETS))
    parser.add_argument("--models", default=",".join(MODELS))
    parser.add_argument("--seeds", default="", help="such as 0,1; by default all three")
    parser.add_argument("--quick", action="store_true", help="few recordings, one seed; for a trial")
    parser.add_argument("--docs", action="store_true", help="write the tables of what was measured")
    asked = parser.parse_args()
    if asked.docs:
        write_docs(asked.work, section, "benchmarks_grammar.json", "grammar.md", "grammar")
        return
    torch.set_num_threads(1)
    warnings.simplefilter("once")
    asked.work = work_folder(asked.work, asked.quick)
    os.environ["MODICUM_CACHE"] = str(asked.work / "cache")
    sizes = QUICK if asked.quick else Sizes()
    if asked.seeds:
        sizes = replace(sizes, seeds=tuple(int(seed) for seed in asked.seeds.split(",")))
    bench = Bench(asked.data, asked.work, sizes)
    bench.times()
    for name in asked.sets.split(","):
        for model in asked.models.split(","):
            bench.measure(name, model)
    date = time.strftime("%Y-%m-%d")
    print(section({"date": date, "machine": machine.describe(), "rows": bench.rows}))


if __name__ == "__main__":
    main()
