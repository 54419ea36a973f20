"""Cross-entropy method: draw sets, and move the probabilities towards those of the best ones."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from modicum.errors import InputError
from modicum.search.greedy import check_limit
from modicum.search.problem import Progress, SearchResult, SubsetEvaluation, SubsetProblem, is_better

_FIRST_SIZE = 10.0
"""Items of a first set on average. With a start of 1/2 most sets are far too large (measured)."""


@dataclass(frozen=True)
class CrossEntropySettings:
    """Settings of `cross_entropy_search`; the values are ours.

    With hundreds of items a fast move (smoothing 0.7, 200 samples) settles on worse sets than a slow one.

    Attributes:
        num_samples: sets drawn in a round (N).
        elite_share: of them that the probabilities move towards (rho).
        smoothing: how far they move, 0 to 1 (alpha).
        start: probability of each item in the first round; None for 10 items on average, 1/2 at most.
        tolerance: the search ends when every probability is so near to 0 or 1.
        patience: rounds without a better set after which it ends.
        max_rounds: at most.
        seed: of the draws.

    Raises:
        InputError: a number is out of range.
    """

    num_samples: int = 500
    elite_share: float = 0.1
    smoothing: float = 0.3
    start: float | None = None
    tolerance: float = 0.02
    patience: int = 10
    max_rounds: int = 100
    seed: int = 0

    def __post_init__(self) -> None:
        if self.num_samples < 2:
            raise InputError(f"num_samples is {self.num_samples}: give 2 or more sets")
        for name in ("elite_share", "smoothing"):
            if not 0 < getattr(self, name) <= 1:
                raise InputError(f"{name} is {getattr(self, name)}: give a share above 0 and at most 1")
        if self.start is not None and not 0 < self.start < 1:
            raise InputError(f"start is {self.start}: give a probability between 0 and 1")
        if not 0 <= self.tolerance < 0.5:
            raise InputError(f"tolerance is {self.tolerance}: give 0 to below 0.5")
        for name in ("patience", "max_rounds"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} is {getattr(self, name)}: give 1 or more rounds")

    def first(self, num_items: int) -> float:
        """The probability of an item in the first round."""
        return min(0.5, _FIRST_SIZE / max(1, num_items)) if self.start is None else self.start


def cross_entropy_search(
    problem: SubsetProblem,
    settings: CrossEntropySettings | None = None,
    *,
    max_items: int | None = None,
    progress: Progress | None = None,
) -> SearchResult:
    """The cross-entropy method over subsets, each item an independent Bernoulli variable.

    Rubinstein 1999 ("The cross-entropy method for combinatorial and continuous optimization"): draw sets,
    take the best share of them, move each item's probability to its frequency there. The best set ever seen
    is returned. The empty set and all single items are looked at first, so the result is never below them.
    Of sets of equal value the smaller one is better. Draws beyond max_items lose items at random.

    Args:
        problem: what is chosen from.
        settings: of the method.
        max_items: of a set; None for no limit.
        progress: see `Progress`.

    Raises:
        InputError: max_items is below 0.
    """
    settings = settings or CrossEntropySettings()
    limit = check_limit(problem, max_items)
    tell = progress or (lambda *_: None)
    best = _Best(problem, limit)
    if not problem.num_items or not limit:
        return best.result()
    generator = np.random.default_rng(settings.seed)
    probability = np.full(problem.num_items, settings.first(problem.num_items))
    num_elite = max(1, round(settings.elite_share * settings.num_samples))
    idle = 0
    for done in range(settings.max_rounds):
        drawn = _draw(probability, settings.num_samples, limit, generator)
        order = best.rank(drawn)
        elite = drawn[order[:num_elite]].mean(0)
        probability = settings.smoothing * elite + (1 - settings.smoothing) * probability
        idle = 0 if best.has_risen() else idle + 1
        tell("cross-entropy search", done + 1, settings.max_rounds)
        if idle >= settings.patience or np.minimum(probability, 1 - probability).max() < settings.tolerance:
            break
    return best.result()


class _Best:
    """The best set seen, and all that is needed to look at further ones."""

    def __init__(self, problem: SubsetProblem, limit: int) -> None:
        self._evaluation: SubsetEvaluation = problem.evaluation()
        self._known: dict[bytes, float] = {}
        self.chosen: tuple[int, ...] = ()
        self.value = self._evaluation.value
        self.num_evaluations = 1
        self._told = self.value
        if problem.num_items and limit:
            values = self._evaluation.values_with(range(problem.num_items))
            self.num_evaluations += problem.num_items
            top = max(range(problem.num_items), key=lambda item: values[item])
            if values[top] > self.value:
                self.chosen, self.value = (top,), values[top]
        self.history = [(len(self.chosen), self.value)]

    def rank(self, drawn: np.ndarray) -> list[int]:
        """The order of sets [N, items] of bool, best first."""
        values = [self._value(row) for row in drawn]
        sizes = drawn.sum(1)
        for row, value, size in zip(drawn, values, sizes, strict=True):
            if is_better(value, int(size), self.value, len(self.chosen)):
                self.chosen, self.value = tuple(int(item) for item in np.flatnonzero(row)), value
        self.history.append((len(self.chosen), self.value))
        return sorted(range(len(drawn)), key=lambda at: (-values[at], sizes[at]))

    def has_risen(self) -> bool:
        """Whether the value is higher than when this was last asked."""
        before, self._told = self._told, self.value
        return self.value > before

    def result(self) -> SearchResult:
        """What was found."""
        return SearchResult(self.chosen, self.value, self.num_evaluations, tuple(self.history))

    def _value(self, row: np.ndarray) -> float:
        """Of a set; one that was seen before is not computed again."""
        key = np.packbits(row).tobytes()
        if key not in self._known:
            self._evaluation.replace([int(item) for item in np.flatnonzero(row)])
            self._known[key] = self._evaluation.value
            self.num_evaluations += 1
        return self._known[key]


def _draw(
    probability: np.ndarray, num_samples: int, limit: int, generator: np.random.Generator
) -> np.ndarray:
    """Sets [num_samples, items] of bool, none of more than `limit` items."""
    drawn: np.ndarray = generator.random((num_samples, len(probability))) < probability
    for at in np.flatnonzero(drawn.sum(1) > limit):
        items = np.flatnonzero(drawn[at])
        drawn[at, generator.permutation(items)[limit:]] = False
    return drawn
