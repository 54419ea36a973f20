"""Small tasks of the tests' own: quick, with a length of their own choosing, and a loss."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from modicum.errors import InputError
from modicum.tasks.sample import Sample

COLOURS = ("red", "blue", "green", "yellow", "black")
ANIMALS = ("dog", "cat", "bird", "fish", "cow", "fox", "hen")


@dataclass(frozen=True)
class Colours:
    """Who has which colour, one short sentence after the other; the question asks for one of them."""

    name: str = "colours"
    metric: str = "has"
    new_tokens: int = 6
    count: int = 1000
    greedy: int = 0
    """New tokens that it takes beyond its length, as a task should not."""

    def sample(self, index: int, length: int | None, tokenizer: Any, seed: int = 0) -> Sample:
        if not 0 <= index < self.count:
            raise InputError(f"{self.name} has no sample {index}: there are {self.count}")
        most = (length or 100) - self.new_tokens - 30
        if most < 40:
            raise InputError(f"{self.name} needs 80 tokens, the length is {length}: give more")
        text, number = "Once upon a time there were many animals.", index + seed
        while True:
            animal, colour = ANIMALS[number % len(ANIMALS)], COLOURS[number % len(COLOURS)]
            more = f"{text} The {animal} was {colour} and happy."
            if len(tokenizer(more)["input_ids"]) > most:
                break
            text, number = more, number + 1
        needle = ANIMALS[(index + seed) % len(ANIMALS)]
        return Sample(
            task=self.name,
            index=index,
            context=text,
            question=f" Mom asked about the {needle}. The {needle} was",
            answers=(COLOURS[(index + seed) % len(COLOURS)],),
            metric=self.metric,
            max_new_tokens=self.new_tokens + self.greedy,
            depth=0.1,
        )

    def __len__(self) -> int:
        return self.count


@dataclass(frozen=True)
class Twice(Colours):
    """Two questions about each context."""

    name: str = "twice"
    questions: int = 2

    def sample(self, index: int, length: int | None, tokenizer: Any, seed: int = 0) -> Sample:
        first = super().sample(index // 2, length, tokenizer, seed)
        other = super().sample(index // 2 + index % 2, length, tokenizer, seed)
        return replace(first, index=index, question=other.question, answers=other.answers)


@dataclass(frozen=True)
class Continued:
    """The loss of what follows a text."""

    name: str = "continued"
    metric: str = "loss"

    def sample(self, index: int, length: int | None, tokenizer: Any, seed: int = 0) -> Sample:
        base = Colours().sample(index, length, tokenizer, seed)
        return Sample(
            task=self.name,
            index=index,
            context=base.context,
            question="",
            answers=(),
            metric="loss",
            max_new_tokens=0,
            target=" The dog and the cat went to the park to play with a big red ball.",
        )

    def __len__(self) -> int:
        return 3


def has(prediction: str, answers: Any) -> float:
    """1 when an answer is in the text."""
    return float(any(answer in prediction for answer in answers))


def steps(prediction: str, answers: Any) -> float:
    """Something between 0 and 1 that hangs on every character."""
    return (sum(map(ord, prediction)) % 101) / 100


METRICS = {"has": has, "steps": steps}
