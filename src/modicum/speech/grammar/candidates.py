"""Candidates: alternate ways to write commands, made of what was heard for their words."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from heapq import nlargest
from itertools import islice, product

from modicum.errors import InputError
from modicum.speech.grammar.command_model import CommandModel, Form
from modicum.speech.grammar.dictionary import PronunciationDictionary, unheard

_MOST_PRODUCTS = 200_000
"""Combinations of a command's words that are ranked; those of rarer forms are not made."""


@dataclass(frozen=True)
class Expression:
    """A way to write a command for an acoustic model.

    Attributes:
        command: its index.
        forms: one for each of its words; several words may have merged into a form with spaces.
        probability: the product of P(form | word); 1 for the original ones.
    """

    command: int
    forms: tuple[Form, ...]
    probability: float = 1.0

    @property
    def text(self) -> str:
        """The forms with spaces between, which is what the model sees of them."""
        return " ".join(self.forms)


@dataclass(frozen=True)
class CandidateSettings:
    """Settings of `candidate_expressions`; the values are ours.

    Attributes:
        num_variants: forms of each word, the most probable ones (K).
        num_candidates: of each command at most.
        min_length: units that a candidate has at least, as a share of the command's own units: fewer are
            heard in any speech.

    Raises:
        InputError: a number is out of range.
    """

    num_variants: int = 40
    num_candidates: int = 40
    min_length: float = 0.5

    def __post_init__(self) -> None:
        for name in ("num_variants", "num_candidates"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} is {getattr(self, name)}: give 1 or more")
        if not 0 <= self.min_length <= 1:
            raise InputError(f"min_length is {self.min_length}: give a share from 0 to 1")


def original_expressions(model: CommandModel, commands: Sequence[str]) -> list[Expression]:
    """The commands as the model writes them before anything is learned: all forms that it knows.

    Raises:
        InputError: the model has no units for a word, or writes two commands alike.
    """
    found: list[Expression] = []
    seen: dict[str, int] = {}
    for index, command in enumerate(commands):
        for forms in islice(product(*(model.forms(word) for word in command.split())), _MOST_PRODUCTS):
            expression = Expression(index, forms)
            other = seen.setdefault(expression.text, index)
            if other != index:
                raise InputError(
                    f"{model.name} writes {commands[other]!r} and {command!r} alike ({expression.text}): "
                    "they cannot be told apart; leave one out"
                )
            if expression not in found:
                found.append(expression)
    return found


def candidate_expressions(
    model: CommandModel,
    commands: Sequence[str],
    dictionary: PronunciationDictionary,
    settings: CandidateSettings | None = None,
) -> list[Expression]:
    """Alternate expressions of all commands, for each the most probable first.

    Each is a product of forms of the command's words: the most probable ones, and the original one.
    Expressions of two commands that read alike are left out, as the original ones are. Words that were never
    heard stay as they are, with a warning.

    Raises:
        ModelError: the dictionary is of another model.
    """
    settings = settings or CandidateSettings()
    dictionary.check(model)
    if missing := unheard(dictionary, commands):
        warnings.warn(
            f"never said in the general speech, so kept as they are: {', '.join(missing)}; give speech with "
            "them to learn from",
            stacklevel=2,
        )
    originals = original_expressions(model, commands)
    found = [
        one
        for index, command in enumerate(commands)
        for one in _ranked(model, index, command, dictionary, settings)
    ]
    owners: dict[str, set[int]] = {}
    for one in (*originals, *found):
        owners.setdefault(one.text, set()).add(one.command)
    taken = {one.text for one in originals}
    kept: list[Expression] = []
    counts = [0] * len(commands)
    for one in found:
        if one.text in taken or len(owners[one.text]) > 1 or counts[one.command] >= settings.num_candidates:
            continue
        taken.add(one.text)
        counts[one.command] += 1
        kept.append(one)
    return kept


def _ranked(
    model: CommandModel,
    index: int,
    command: str,
    dictionary: PronunciationDictionary,
    settings: CandidateSettings,
) -> list[Expression]:
    """A command's products, the most probable first."""
    words = command.split()
    choices: list[list[tuple[Form, float]]] = []
    for word in words:
        variants = dictionary.variants(word, settings.num_variants)
        known = {form for form, _ in variants}
        total = sum(dictionary.counts.get(word, {}).values()) or 1.0
        # A form that was never heard counts as half a recording.
        usual = [(form, 0.5 / (total + 0.5)) for form in model.forms(word) if form not in known]
        choices.append([*usual, *variants])
    # Of long commands fewer forms of each word, so that the products stay few.
    while math.prod(map(len, choices)) > _MOST_PRODUCTS:
        longest = max(choices, key=len)
        longest.pop()
    least = settings.min_length * sum(len(model.split(model.forms(word)[0])) for word in words)
    made = []
    for pairs in product(*choices):
        probability = 1.0
        for _, share in pairs:
            probability *= share
        forms = tuple(form for form, _ in pairs)
        if sum(len(model.split(form)) for form in forms) >= least:
            made.append(Expression(index, forms, probability))
    # Three times what is kept: some fall out as they read like others.
    wanted = 3 * settings.num_candidates + len(words)
    return nlargest(wanted, made, key=lambda one: (one.probability, one.text))
