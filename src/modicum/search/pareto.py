"""Pareto front: what is not worse than another in everything; found exactly where objectives add up."""

from __future__ import annotations

import math
from collections.abc import Sequence

from modicum.errors import InputError
from modicum.search.milp import Choice, Groups, UnreachableError, choose, smallest

Point = tuple[float, ...]


def dominates(a: Point, b: Point) -> bool:
    """Whether a is at most b in every objective, and below it in one."""
    return all(x <= y for x, y in zip(a, b, strict=True)) and a != b


def front(points: Sequence[Point]) -> list[int]:
    """Numbers of the points that none dominates, in their order."""
    order = sorted(range(len(points)), key=lambda i: points[i])
    kept: list[int] = []
    for i in order:
        # Only points before it in this order can dominate it.
        if not any(dominates(points[k], points[i]) for k in kept):
            kept.append(i)
    return sorted(kept)


def exact_front(groups: Groups, resource: str, num_points: int = 16) -> list[Choice]:
    """The choices with the least loss at evenly spaced limits of a resource, by mixed-integer programming.

    Each is on the Pareto front of loss and cost. Limits are spaced evenly from the least cost to that of the
    least loss, so a choice of the front is not found where the next limit allows a better one, too.

    Args:
        groups: the options of each group (see `modicum.search.milp`).
        resource: that is spent.
        num_points: limits at most.

    Returns:
        By rising cost and falling loss; no two with the same cost.

    Raises:
        InputError: there are fewer than 2 points, or as `choose`.
    """
    if num_points < 2:
        raise InputError(f"num_points is {num_points}: give 2 or more")
    cheapest, best = smallest(groups, resource), choose(groups)
    assert cheapest is not None
    # Of several with the least loss the cheapest.
    best = _cheapest_with(groups, resource, best)
    low, high = cheapest.costs[resource], best.costs[resource]
    found = {low: cheapest}
    for number in range(1, num_points - 1):
        limit = low + (high - low) * number / (num_points - 1)
        try:
            choice = _cheapest_with(groups, resource, choose(groups, {resource: limit}))
        except UnreachableError:  # the rounding of `limit`
            continue
        found.setdefault(choice.costs[resource], choice)
    found.setdefault(high, best)
    chosen = [found[cost] for cost in sorted(found)]
    kept = front([(choice.loss, choice.costs[resource]) for choice in chosen])
    return [chosen[i] for i in kept]


def _cheapest_with(groups: Groups, resource: str, choice: Choice) -> Choice:
    """The cheapest choice whose loss is no larger, up to rounding."""
    slack = 1e-9 * math.fsum(max(o.loss for o in g) - min(o.loss for o in g) for g in groups)
    lossy = [[type(o)(o.loss, {**o.costs, _LOSS: o.loss}) for o in group] for group in groups]
    found = smallest(lossy, resource, {_LOSS: choice.loss + slack})
    if found is None or found.costs[resource] >= choice.costs[resource]:
        return choice
    costs = {name: cost for name, cost in found.costs.items() if name != _LOSS}
    return Choice(found.picks, found.loss, costs)


_LOSS = "\0loss"
