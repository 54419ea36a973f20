"""Generated: what all generated tasks share: a name, settings, a seed, and a context that fits exactly."""

from __future__ import annotations

import random
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from modicum.errors import InputError
from modicum.tasks.measure import count, largest
from modicum.tasks.named import Named
from modicum.tasks.sample import Sample

ENDLESS = 2**31 - 1
"""How many samples a generated task has."""


@dataclass(frozen=True)
class Body:
    """A context, with the places of its needles."""

    text: str
    needles: tuple[tuple[int, int], ...] = ()
    """Character ranges, in order."""
    depth: float | None = None

    @classmethod
    def join(cls, before: str, pieces: Iterable[tuple[str, bool]], between: str) -> Body:
        """Pieces (text, whether it is a needle) after `before`, `between` put between them. The depth is the
        first needle's place among the pieces, 0 at their start and 1 at their end."""
        texts: list[str] = []
        needles: list[tuple[int, int]] = []
        at = len(before)
        for text, marked in pieces:
            if marked:
                needles.append((at, at + len(text)))
            texts.append(text)
            at += len(text) + len(between)
        made = before + between.join(texts)
        if not needles:
            return cls(made)
        start, end = needles[0]
        other = len(made) - len(before) - (end - start)
        return cls(made, tuple(needles), min(1.0, (start - len(before)) / max(1, other)))


@dataclass(frozen=True)
class Draft:
    """A sample whose context is still of any size."""

    build: Callable[[int], Body]
    """The context of so many units of filler."""
    least: int
    question: str
    answers: tuple[str, ...]
    others: tuple[str, ...] = ()
    """Questions of other samples about the same context: it leaves room for the longest."""
    most: int = 2**24
    answer_prefix: str = ""
    """The end of the question that begins the answer."""


def answer_prefix_of(question: str) -> str:
    """What follows the question itself, from " Answer:" on, in RULER's prompts."""
    return question[question.index(" Answer:") :]


@dataclass(frozen=True, kw_only=True)
class Generated(Named, ABC):
    """A task whose samples are drawn by index and seed; see `Task`."""

    max_new_tokens: int = 128

    @property
    def metric(self) -> str:
        """RULER judges all of them so."""
        return "string_match_all"

    def __len__(self) -> int:
        return ENDLESS

    def sample(self, index: int, length: int | None, tokenizer: Any, seed: int = 0) -> Sample:
        """See `Task.sample`; the same task, index, length, seed and tokenizer give the same sample.

        Raises:
            InputError: no length, one too short for the task, or a negative index.
        """
        if not 0 <= index < ENDLESS:
            raise InputError(f"{self.name} has samples 0 to {ENDLESS - 1}, not {index}")
        if length is None:
            raise InputError(f"{self.name} is generated at a length: give one in tokens, such as 4096")
        draft = self.draft(index, length, tokenizer, seed)
        questions = (draft.question, *draft.others)
        taken = self.max_new_tokens + max(count(tokenizer, text, special=False) for text in questions)

        def size(n: int) -> int:
            return count(tokenizer, draft.build(n).text, special=True)

        n = largest(size, length - taken, draft.least, draft.most)
        if n is None:
            raise InputError(
                f"{self.name} takes at least {size(draft.least) + taken} tokens of this tokenizer, the "
                f"length is {length}: give a longer one{self.shorter()}"
            )
        body = draft.build(n)
        return Sample(
            task=self.name,
            index=index,
            context=body.text,
            question=draft.question,
            answers=draft.answers,
            metric=self.metric,
            max_new_tokens=self.max_new_tokens,
            needles=body.needles,
            depth=body.depth,
            answer_prefix=draft.answer_prefix,
        )

    @abstractmethod
    def draft(self, index: int, length: int, tokenizer: Any, seed: int) -> Draft:
        """Draw everything but the size of the context."""

    def shorter(self) -> str:
        """What else than a longer length would help, as the end of a sentence."""
        return f", or max_new_tokens below {self.max_new_tokens}"

    def stream(self, index: int, length: int, seed: int, what: object = "") -> random.Random:
        """The random numbers of one sample. A needle's depth and the haystack's path are not in it, so that
        samples that differ in these alone have the same needles."""
        return random.Random(f"{self.kind}/{index}/{length}/{seed}/{what}")
