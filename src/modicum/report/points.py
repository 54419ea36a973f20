"""Point: one policy at one budget, averaged over tasks and lengths. And which of them no other beats."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from statistics import fmean

from modicum.report.results import Stratum, View

HELD, PEAK = "held", "peak"


@dataclass(frozen=True)
class Point:
    """Means over strata, each of which counts the same however many samples it has."""

    series: str
    budget: str
    peer: bool
    full: bool
    loss: bool
    count: int
    """Samples in all."""
    score: float
    low: float
    high: float
    held: float
    """Bytes after the context was read."""
    peak: float
    """Most bytes ever held."""
    full_bytes: float
    nominal: float | None

    def at(self, axis: str) -> float:
        """Bytes on an axis, HELD or PEAK."""
        return self.held if axis == HELD else self.peak

    @property
    def name(self) -> str:
        """Series and budget."""
        return self.series if self.full else f"{self.series} @ {self.budget}"


def points(view: View, tasks: Sequence[str], length: int | None = None) -> tuple[list[Point], list[str]]:
    """The points of a view over these tasks (and of one length, if given), and the names of those left out.

    Left out is what has not been run on every task and length that another of the view has: a mean over
    other samples compares nothing.
    """
    groups: dict[tuple[str, str], list[Stratum]] = {}
    for s in view.strata:
        if s.task in tasks and length in (None, s.length):
            groups.setdefault((s.series, s.budget), []).append(s)
    wanted = {(s.task, s.length) for group in groups.values() for s in group}
    made, left_out = [], []
    for group in groups.values():
        whole = {(s.task, s.length) for s in group} == wanted
        if whole:
            made.append(average(group))
        else:
            left_out.append(average(group).name)
    return made, left_out


def average(strata: Sequence[Stratum]) -> Point:
    """The plain mean over strata of one series and budget.

    Its interval is joined from those of the strata by the square-and-add method (Zou and Donner 2008,
    MOVER): the distances from mean to limit add as independent errors do.
    """
    first, n = strata[0], len(strata)
    score = fmean(s.summary.score for s in strata)
    below = math.sqrt(sum((s.summary.score - s.summary.low) ** 2 for s in strata)) / n
    above = math.sqrt(sum((s.summary.high - s.summary.score) ** 2 for s in strata)) / n
    nominal = [s.nominal for s in strata if s.nominal is not None]
    return Point(
        series=first.series,
        budget=first.budget,
        peer=first.peer,
        full=first.full,
        loss=first.loss,
        count=sum(s.summary.count for s in strata),
        score=score,
        # Scores and losses alike are not below 0; rounding would have them there.
        low=max(0.0, score - below),
        high=score + above if first.loss else min(1.0, score + above),
        held=fmean(s.summary.context_bytes for s in strata),
        peak=fmean(s.summary.peak_bytes for s in strata),
        full_bytes=fmean(s.summary.full_bytes for s in strata),
        nominal=fmean(nominal) if len(nominal) == n else None,
    )


def pareto(found: Iterable[Point], axis: str) -> list[Point]:
    """Those that no other equals with fewer bytes, nor beats with as many; by rising bytes."""

    def cost(point: Point) -> float:
        return point.score if point.loss else -point.score

    front: list[Point] = []
    for point in sorted(found, key=lambda p: (p.at(axis), cost(p))):
        if not front or cost(point) < cost(front[-1]):
            front.append(point)
    return front
