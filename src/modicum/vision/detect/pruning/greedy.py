"""Greedy allocation: the lowest-scored channels of all groups go first, 8 of a group at a time."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from torch import Tensor

from modicum.errors import InputError
from modicum.vision.detect.backbone import ROUND_TO
from modicum.vision.detect.conv_norm import Channels
from modicum.vision.detect.pruning.budget import CostModel


@dataclass(frozen=True)
class Allocation:
    """What is asked of an allocator.

    Attributes:
        channels: of all groups, before.
        least: the fewest of each group that may be cut.
        model: what records cost.
    """

    channels: Channels
    least: Mapping[str, int]
    model: CostModel

    def smallest(self) -> dict[str, int]:
        """The record with the fewest channels."""
        return {**self.channels, **self.least}

    def check(self, limit: float) -> None:
        """Raise if the smallest network does not fit.

        Raises:
            InputError: it does not.
        """
        cost = self.model.cost(self.smallest())
        if cost > limit:
            told = self.model.describe
            raise InputError(
                f"the budget is {told(limit)}, and the smallest network takes {told(cost)}: give at least "
                "that, or let more channels go (--max-ratio)"
            )


def greedy_path(
    allocation: Allocation, scores: Mapping[str, Tensor], is_per_cost: bool
) -> Iterator[dict[str, int]]:
    """Channels of all groups after each cut, from the first record to the smallest.

    A cut takes a group's lowest-scored channels, down to the next multiple of 8. The next group is the one
    whose cut has the lowest mean score; where is_per_cost, the lowest sum of scores per cost that it saves.
    """
    channels = dict(allocation.channels)
    ranked = {name: scores[name].sort().values for name in allocation.least}
    total = {name: float(values.sum()) for name, values in ranked.items()}
    yield dict(channels)
    while True:
        best: tuple[float, str, int] | None = None
        cost = allocation.model.approximate(channels) if is_per_cost else 0.0
        for name, least in allocation.least.items():
            count = channels[name]
            after = max(least, (count - 1) // ROUND_TO * ROUND_TO)
            if after >= count:
                continue
            start = len(ranked[name]) - count
            lost = float(ranked[name][start : start + count - after].sum())
            if is_per_cost:
                saved = cost - allocation.model.approximate({**channels, name: after})
                value = lost / total[name] / max(saved, 1.0)
            else:
                value = lost / (count - after)
            if best is None or value < best[0]:
                best = value, name, after
        if best is None:
            return
        channels[best[1]] = best[2]
        yield dict(channels)


def greedy_channels(
    allocation: Allocation, scores: Mapping[str, Tensor], limit: float, is_per_cost: bool
) -> dict[str, int]:
    """The first record on the path that keeps the limit.

    Costs are taken to fall along the path, so that few are measured.

    Raises:
        InputError: the smallest network does not fit.
    """
    allocation.check(limit)
    path = list(greedy_path(allocation, scores, is_per_cost))
    low, high = 0, len(path) - 1
    while low < high:
        middle = (low + high) // 2
        if allocation.model.cost(path[middle]) <= limit:
            high = middle
        else:
            low = middle + 1
    return path[low]
