"""Ability: up to which length a model does a task with the full cache; only there can eviction be judged."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from statistics import fmean
from typing import Any

import asking
from asking import Context, ask, ruler


def _ruler(task: str, tokenizer: Any, count: int, length: int, seed: int) -> list[Context]:
    return ruler(tokenizer, task, count, length, seed)


TASKS: dict[str, Callable[[Any, int, int, int], list[Context]]] = {
    name: partial(_ruler, text) for name, text in asking.TASKS.items()
}
"""From tokenizer, number, length and seed to contexts with questions."""
ENOUGH = 0.8
LENGTHS = (1024, 512, 256)
_SAMPLES, _SEED = 8, 5
LEAST = 48
"""Tokens of the smallest budget: sinks, recent tokens and a few more."""


@dataclass(frozen=True)
class Ability:
    """The share of answers that the full cache gets right at each length, and the length that was chosen."""

    task: str
    full: dict[int, float]
    length: int

    @classmethod
    def of(cls, model: Any, tokenizer: Any, task: str, lengths: Sequence[int] = LENGTHS) -> Ability:
        """Take the longest at which enough of the answers are right, else the shortest."""
        full: dict[int, float] = {}
        for length in lengths:
            contexts = TASKS[task](tokenizer, _SAMPLES, length, _SEED)
            full[length] = fmean(ask(model, contexts, "full", 2 * length).right)
            print(f"full cache, {task}, {length}: {full[length]:.3f}", file=sys.stderr, flush=True)
            if full[length] >= ENOUGH:
                break
        return cls(task, full, length)

    def budget(self, part: int) -> int:
        """A part of the length, in tokens per KV head."""
        return max(LEAST, self.length // part)

    def __str__(self) -> str:
        tried = ", ".join(f"{100 * right:.0f} % at {length:,}" for length, right in self.full.items())
        return f"{self.task}: {tried}; {self.length:,} tokens taken"


def sentence(abilities: Sequence[Ability]) -> str:
    """What was tried and taken, for a page."""
    return (
        f"Lengths: for each task the longest of {', '.join(f'{n:,}' for n in LENGTHS)} tokens (question and "
        f"answer included) at which the full cache gets at least {100 * ENOUGH:.0f} % of the answers "
        f"right on {_SAMPLES} other contexts, else the shortest. "
        + ". ".join(str(a) for a in abilities)
        + "."
    )
