"""Exact choice: one option of each group so that costs stay within limits and the summed loss is least.

A multiple-choice knapsack with several resources, as a mixed-integer program (scipy.optimize.milp, which runs
HiGHS). Puzzle (arXiv 2411.19146) chooses a model's blocks so; DONNA by evolution.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

from modicum.errors import InputError
from modicum.packages import import_package

_SPAN = 1e4
"""To which the losses are scaled: HiGHS stops at an absolute gap of 1e-6."""


@dataclass(frozen=True)
class Option:
    """One of the things that a group may be.

    Attributes:
        loss: what it adds to the sum that is made least.
        costs: what it takes of each resource, by name: {"bytes": 4096, "ms": 0.2}.
    """

    loss: float
    costs: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Choice:
    """One option of each group.

    Attributes:
        picks: the option's number in each group.
        loss: the sum of losses.
        costs: the sum of each resource's costs.
    """

    picks: tuple[int, ...]
    loss: float
    costs: dict[str, float]


class UnreachableError(InputError):
    """No choice stays within the limits.

    Attributes:
        smallest: for each limited resource the choice that takes the least of it (and of several the one with
            the least loss) while the other limits hold; none where no choice keeps the others.
    """

    def __init__(self, message: str, smallest: Mapping[str, Choice]) -> None:
        super().__init__(message)
        self.smallest = dict(smallest)


Groups = Sequence[Sequence[Option]]


def choose(groups: Groups, limits: Mapping[str, float] | None = None) -> Choice:
    """The choice with the least loss within the limits.

    Costs are summed exactly as they come (integers stay integers), and a limit may be met but not passed.
    The loss is the least up to 1e-9 of the range that the losses of all choices span.

    Args:
        groups: the options of each group.
        limits: the most of each resource in all; resources without one are only summed.

    Raises:
        InputError: there is no group, a group has no option, a number is not finite, an option lacks a
            limited resource, or scipy is missing.
        UnreachableError: nothing fits.
    """
    limits = dict(limits or {})
    _check(groups, limits)
    found = _solved(groups, limits, [[o.loss for o in group] for group in groups])
    if found is None:
        raise _unreachable(groups, limits)
    return found


def smallest(groups: Groups, resource: str, limits: Mapping[str, float] | None = None) -> Choice | None:
    """The choice that takes the least of a resource; of several the one with the least loss.

    Args:
        groups: the options of each group.
        resource: whose sum is made least.
        limits: of other resources; that of `resource` is not looked at.

    Returns:
        None if no choice keeps the limits.

    Raises:
        InputError: as `choose`.
    """
    others = {name: limit for name, limit in (limits or {}).items() if name != resource}
    _check(groups, {**others, resource: 0.0})
    found = _solved(groups, others, [[o.costs[resource] for o in group] for group in groups])
    if found is None:
        return None
    within = {**others, resource: found.costs[resource]}
    return _solved(groups, within, [[o.loss for o in group] for group in groups]) or found


def total(groups: Groups, picks: Sequence[int]) -> Choice:
    """The sums of a choice."""
    chosen = [group[pick] for group, pick in zip(groups, picks, strict=True)]
    names = dict.fromkeys(name for option in chosen for name in option.costs)
    costs = {name: _sum([option.costs.get(name, 0) for option in chosen]) for name in names}
    return Choice(tuple(int(pick) for pick in picks), _sum([option.loss for option in chosen]), costs)


def _sum(numbers: Sequence[float]) -> float:
    return sum(numbers) if all(isinstance(x, int) for x in numbers) else math.fsum(numbers)


def _check(groups: Groups, limits: Mapping[str, float]) -> None:
    if not groups:
        raise InputError("there is nothing to choose from: give at least one group of options")
    for number, group in enumerate(groups):
        if not group:
            raise InputError(f"group {number} has no options: give each at least one")
        for place, option in enumerate(group):
            lacking = [name for name in limits if name not in option.costs]
            if lacking:
                raise InputError(
                    f"option {place} of group {number} does not say what it takes of {lacking[0]!r}, which "
                    "has a limit: give every option that cost"
                )
            if not all(map(math.isfinite, (option.loss, *option.costs.values()))):
                raise InputError(f"option {place} of group {number} is {option}: give finite numbers")
    for name, limit in limits.items():
        if not math.isfinite(limit):
            raise InputError(f"the limit of {name} is {limit}: give a finite number, or none")


def _solved(groups: Groups, limits: Mapping[str, float], losses: Sequence[Sequence[float]]) -> Choice | None:
    """The choice with the least sum of `losses`, or None; the solver's tolerance does not pass a limit."""
    kept = [_useful(group, limits, own) for group, own in zip(groups, losses, strict=True)]
    excluded: list[list[int]] = []
    while True:
        places = _optimum(groups, limits, losses, kept, excluded)
        if places is None:
            return None
        found = total(groups, [kept[g][place] for g, place in enumerate(places)])
        if all(found.costs[name] <= limit for name, limit in limits.items()):
            return found
        excluded.append(places)


def _useful(group: Sequence[Option], limits: Mapping[str, float], losses: Sequence[float]) -> list[int]:
    """The options of a group that no other one is at least as good as in everything."""
    keys = [
        (loss, *(option.costs[name] for name in limits)) for loss, option in zip(losses, group, strict=True)
    ]
    kept: list[int] = []
    for number in sorted(range(len(keys)), key=lambda n: keys[n]):
        if not any(all(a <= b for a, b in zip(keys[k], keys[number], strict=True)) for k in kept):
            kept.append(number)
    return kept


def _optimum(
    groups: Groups,
    limits: Mapping[str, float],
    losses: Sequence[Sequence[float]],
    kept: Sequence[Sequence[int]],
    excluded: Sequence[Sequence[int]],
) -> list[int] | None:
    """The place in `kept` of each group's option, or None.

    Variables are 0 or 1, one for each option that is kept. excluded: whole choices that may not come out.
    """
    np = import_package("numpy", "search")
    optimize = import_package("scipy.optimize", "search")
    sparse = import_package("scipy.sparse", "search")
    starts = [0]
    for own in kept:
        starts.append(starts[-1] + len(own))
    # Only differences within a group matter; without the rest the tolerance is finer.
    value = [losses[g][n] - min(losses[g][k] for k in own) for g, own in enumerate(kept) for n in own]
    span = sum(max(value[a:b]) for a, b in pairwise(starts))
    objective = np.array(value) * (_SPAN / span if span > 0 else 1.0)
    constraints: list[Any] = []
    rows = [g for g, own in enumerate(kept) for _ in own]
    ones = (np.ones(starts[-1]), (rows, range(starts[-1])))
    constraints.append(optimize.LinearConstraint(sparse.csr_array(ones), 1, 1))
    for name, limit in limits.items():
        # Likewise: what each group takes beyond its least, as a share of what is left for it.
        least = [min(groups[g][n].costs[name] for n in own) for g, own in enumerate(kept)]
        room = float(limit - _sum(least))
        if room < 0:
            return None
        cost = np.array(
            [groups[g][n].costs[name] - least[g] for g, own in enumerate(kept) for n in own], float
        )
        scale = max(room, float(cost.max())) or 1.0
        constraints.append(optimize.LinearConstraint(cost[None] / scale, -np.inf, room / scale))
    for places in excluded:
        row = np.zeros((1, starts[-1]))
        row[0, [starts[g] + place for g, place in enumerate(places)]] = 1
        constraints.append(optimize.LinearConstraint(row, -np.inf, len(places) - 1))
    result = optimize.milp(
        objective,
        integrality=np.ones(starts[-1]),
        bounds=optimize.Bounds(0, 1),
        constraints=constraints,
        options={"mip_rel_gap": 0.0},
    )
    if result.x is None:
        if result.status != 2:
            raise InputError(f"the exact choice was not found ({result.message}): try fewer options")
        return None
    return [int(np.argmax(result.x[a:b])) for a, b in pairwise(starts)]


def _unreachable(groups: Groups, limits: Mapping[str, float]) -> UnreachableError:
    """The error that names the smallest that can be."""
    reached = {name: smallest(groups, name, limits) for name in limits}
    found = {name: choice for name, choice in reached.items() if choice is not None}
    alone = {name: smallest(groups, name) for name in limits}
    for name, choice in alone.items():
        assert choice is not None
        if choice.costs[name] > limits[name]:
            return UnreachableError(
                f"the limit of {name} is {limits[name]:,}, and the smallest that can be is "
                f"{choice.costs[name]:,} (at a loss of {choice.loss:.6g}): give at least that, or cheaper "
                "options",
                found or {name: choice},
            )
    told = "; ".join(f"{name} {choice.costs[name]:,}" for name, choice in found.items())
    wanted = ", ".join(f"{name} {limit:,}" for name, limit in limits.items())
    return UnreachableError(
        f"each limit can be kept, but not all of them together ({wanted}). With the others kept, the "
        f"smallest that can be is: {told or 'nothing'}; raise a limit",
        found,
    )
