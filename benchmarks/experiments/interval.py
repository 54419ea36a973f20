"""Interval: means with bootstrap intervals, of scores and of paired differences."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

DRAWS = 4000


@dataclass(frozen=True)
class Interval:
    """A mean and its 95 % interval."""

    mean: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float], seed: int = 0) -> Interval:
        """Percentile bootstrap over the values (contexts, or texts), which are independent of each other."""
        data = torch.tensor(list(values), dtype=torch.float64)
        return cls._spread(float(data.mean()), data[_picks(len(data), seed)].mean(1))

    @classmethod
    def between(cls, ours: Sequence[float], base: Sequence[float]) -> Interval:
        """Of the paired difference ours - base."""
        return cls.of([a - b for a, b in zip(ours, base, strict=True)])

    @classmethod
    def change(cls, ours: Sequence[float], base: Sequence[float], seed: int = 0) -> Interval:
        """Of the paired relative change, mean of ours over mean of base, less 1."""
        a, b = (torch.tensor(list(x), dtype=torch.float64) for x in (ours, base))
        picks = _picks(len(a), seed)
        return cls._spread(float(a.mean() / b.mean()) - 1, a[picks].mean(1) / b[picks].mean(1) - 1)

    @classmethod
    def _spread(cls, mean: float, draws: Tensor) -> Interval:
        low, high = draws.quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
        return cls(mean, low, high)

    @property
    def clear(self) -> bool:
        """Whether 0 lies outside."""
        return self.low > 0 or self.high < 0

    def percent(self, signed: bool = False) -> str:
        """In percent, "12.5 [10.0, 15.0]"."""
        sign = "+" if signed else ""
        return f"{100 * self.mean:{sign}.1f} [{100 * self.low:{sign}.1f}, {100 * self.high:{sign}.1f}]"


def _picks(count: int, seed: int) -> Tensor:
    return torch.randint(count, (DRAWS, count), generator=torch.Generator().manual_seed(seed))
