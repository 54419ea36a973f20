"""Function problem: a plain function of a set as a `SubsetProblem`, computed anew for each set."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from modicum.errors import InputError


@dataclass(frozen=True)
class FunctionProblem:
    """For objectives that have no cheaper way to change a set by one item.

    Attributes:
        num_items: how many items there are.
        function: the value of a set; higher is better.

    Raises:
        InputError: there are fewer than 0 items.
    """

    num_items: int
    function: Callable[[frozenset[int]], float]

    def __post_init__(self) -> None:
        if self.num_items < 0:
            raise InputError(f"there are {self.num_items} items: give 0 or more")

    def evaluation(self) -> FunctionEvaluation:
        """Of the empty set."""
        return FunctionEvaluation(self.function)


class FunctionEvaluation:
    """Calls the function for every set."""

    def __init__(self, function: Callable[[frozenset[int]], float]) -> None:
        self._function = function
        self._chosen: frozenset[int] = frozenset()
        self.value = function(self._chosen)

    def values_with(self, items: Sequence[int]) -> list[float]:
        """One call for each item."""
        return [self._function(self._chosen | {item}) for item in items]

    def add(self, item: int) -> None:
        """One call."""
        self._chosen |= {item}
        self.value = self._function(self._chosen)

    def remove(self, item: int) -> None:
        """One call."""
        self._chosen -= {item}
        self.value = self._function(self._chosen)

    def replace(self, items: Sequence[int]) -> None:
        """One call."""
        self._chosen = frozenset(items)
        self.value = self._function(self._chosen)
