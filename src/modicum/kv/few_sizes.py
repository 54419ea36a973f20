"""Few sizes: whole numbers near others, of few different values."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import accumulate, pairwise

import torch


def few_sizes(exact: Sequence[float], total: int, most: int, least: int) -> list[int]:
    """Whole numbers near `exact`, of at most `most` different values, in the same order.

    Those at `least` are one group. The others are put into groups of neighbours such that the sum of squared
    distances from the groups' means is smallest (k-means in one dimension, by dynamic programming: Wang and
    Song 2011, "Ckmeans.1d.dp", The R Journal 3/2).

    Args:
        exact: numbers of at least `least`, whose sum is `total`.

    Returns:
        Numbers whose sum is `total`, or less by fewer than there are in the largest group.
    """
    order = sorted(range(len(exact)), key=lambda i: exact[i])
    fixed = [i for i in order if exact[i] <= least]
    free = order[len(fixed) :]
    groups = [fixed] if fixed else []
    groups += [free[a:b] for a, b in pairwise(_cuts([exact[i] for i in free], most - len(groups)))]
    sizes = [max(least, int(math.fsum(exact[i] for i in group) / len(group))) for group in groups]
    left = total - sum(size * len(group) for size, group in zip(sizes, groups, strict=True))
    for g in reversed(range(len(groups))):  # what is left of rounding, to the largest first, in order
        room = left if g == len(groups) - 1 else sizes[g + 1] - sizes[g]
        more = min(room, left // len(groups[g]))
        sizes[g] += more
        left -= more * len(groups[g])
    found = [0] * len(exact)
    for size, group in zip(sizes, groups, strict=True):
        for i in group:
            found[i] = size
    return found


def _cuts(values: Sequence[float], groups: int) -> list[int]:
    """Where to cut ascending values into at most so many groups of least squares: 0, …, len(values)."""
    n = len(values)
    groups = min(groups, n)
    if groups == 0:
        return [0] if n == 0 else [0, n]
    middle = math.fsum(values) / n  # so that squares are small
    shifted = [x - middle for x in values]
    sums = torch.tensor([0.0, *accumulate(shifted)], dtype=torch.float64)
    squares = torch.tensor([0.0, *accumulate(x * x for x in shifted)], dtype=torch.float64)
    count = torch.arange(n + 1, dtype=torch.float64)
    width = (count[None] - count[:, None]).clamp_min(1)
    cost = (squares[None] - squares[:, None]) - (sums[None] - sums[:, None]).square() / width
    cost = cost.clamp_min(0.0).masked_fill(count[:, None] >= count[None], math.inf)  # [from, to]
    best, origins = cost[0], []
    for _ in range(groups - 1):
        best, origin = (best[:, None] + cost).min(0)
        origins.append(origin)
    cuts = [n]
    for origin in reversed(origins):
        cuts.append(int(origin[cuts[-1]]))
    return [0, *reversed(cuts)]
