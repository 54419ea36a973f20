"""Problem: what a search over subsets asks of its objective, and what it returns."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

Progress = Callable[[str, int, int], object]
"""Called with what is done, how much of it is done, and how much there is in all."""


class SubsetEvaluation(Protocol):
    """A set that items are added to and removed from, with its value.

    The value must depend on the set only, not on the order in which it came about.
    """

    @property
    def value(self) -> float:
        """Of the present set; higher is better."""

    def values_with(self, items: Sequence[int]) -> Sequence[float]:
        """The value of the set with each of these items added alone. None of them is in the set."""

    def add(self, item: int) -> None:
        """Add an item that is not in the set."""

    def remove(self, item: int) -> None:
        """Remove an item that is in the set."""

    def replace(self, items: Sequence[int]) -> None:
        """Make it the set of these items, each given once."""


class SubsetProblem(Protocol):
    """Items 0 to num_items - 1, of which a subset is chosen."""

    @property
    def num_items(self) -> int:
        """How many there are."""

    def evaluation(self) -> SubsetEvaluation:
        """A new evaluation, of the empty set."""


@dataclass(frozen=True)
class SearchResult:
    """What a search chose."""

    chosen: tuple[int, ...]
    """Items in rising order."""
    value: float
    num_evaluations: int
    """Values that were computed."""
    history: tuple[tuple[int, float], ...]
    """The best set so far after each step: its size and value."""


def value_of(problem: SubsetProblem, items: Iterable[int]) -> float:
    """The value of a set."""
    evaluation = problem.evaluation()
    evaluation.replace(sorted(set(items)))
    return evaluation.value


def is_better(value: float, size: int, than_value: float, than_size: int) -> bool:
    """Whether a set is better than another: by value, and of equal values by having fewer items."""
    return value > than_value or (value == than_value and size < than_size)


def best_addition(evaluation: SubsetEvaluation, items: Sequence[int]) -> tuple[int, float]:
    """The item of the highest value when added; the first one of equals. There must be an item."""
    values = evaluation.values_with(items)
    index = max(range(len(items)), key=lambda at: values[at])
    return items[index], values[index]
