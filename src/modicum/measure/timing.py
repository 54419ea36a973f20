"""Timing: several callables in turn, so that a machine that slows down slows all of them."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from modicum.errors import InputError


@dataclass(frozen=True)
class TimingSettings:
    """How long is measured.

    Attributes:
        rounds: samples of each candidate.
        sample_seconds: how long a sample takes at least; quick calls are repeated within it.

    Raises:
        InputError: there are fewer than 3 rounds, or the time is not above 0.
    """

    rounds: int = 15
    sample_seconds: float = 0.002

    def __post_init__(self) -> None:
        if self.rounds < 3 or not self.sample_seconds > 0:
            raise InputError(f"{self}: give at least 3 rounds and a time above 0")


@dataclass(frozen=True)
class Spread:
    """Median and quartiles of samples; seconds, or ratios of seconds."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, samples: Iterable[float]) -> Spread:
        """Of at least 1 sample."""
        values = list(samples)
        if len(values) == 1:
            return cls(values[0], values[0], values[0])
        low, median, high = statistics.quantiles(values, n=4, method="inclusive")
        return cls(median, low, high)

    def text(self, digits: int = 2, factor: float = 1.0, unit: str = "") -> str:
        """The median, and the quartiles in brackets where they differ; each times `factor`."""
        low, median, high = (f"{x * factor:.{digits}f}" for x in (self.low, self.median, self.high))
        return f"{median}{unit}" if low == high else f"{median}{unit} ({low}–{high})"


def interleaved(
    candidates: Mapping[str, Callable[[], object]],
    settings: TimingSettings | None = None,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, list[float]]:
    """Seconds of a call, `rounds` samples of each candidate: all once in each round, in turn.

    Each is called twice beforehand: the first call may allocate and fill caches, the second tells how many
    calls make a sample.

    Raises:
        InputError: there is no candidate.
    """
    settings = settings or TimingSettings()
    if not candidates:
        raise InputError("there is nothing to time: give at least one candidate")
    calls = {}
    for name, call in candidates.items():
        call()
        started = clock()
        call()
        once = max(clock() - started, 1e-9)
        calls[name] = max(1, round(settings.sample_seconds / once))
    samples: dict[str, list[float]] = {name: [] for name in candidates}
    order = list(candidates)
    for number in range(settings.rounds):
        # Backwards every other time: none always follows the same neighbour.
        for name in order if number % 2 == 0 else order[::-1]:
            call, repeats = candidates[name], calls[name]
            started = clock()
            for _ in range(repeats):
                call()
            samples[name].append((clock() - started) / repeats)
    return samples
