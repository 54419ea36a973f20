"""Summary: the rows of a cell (or of several together) as means, with a 95 % confidence interval."""

from __future__ import annotations

import math
import random
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, fields
from statistics import fmean
from typing import Any

from modicum.errors import InputError
from modicum.evaluation.row import Cell, Row

CELL = tuple(f.name for f in fields(Cell))

_Z = 1.959963984540054  # of 95 %
_RESAMPLES = 2000


@dataclass(frozen=True)
class Summary:
    """What rows that agree in `key` came to, on average."""

    key: dict[str, Any]
    """Fields of the cell and their values."""
    metric: str
    """"mixed" where tasks of several metrics are averaged."""
    count: int
    score: float
    low: float
    high: float
    interval: str
    """How low and high were found: "wilson" where all scores are 0 or 1, else "bootstrap"; "none" for a
    single other score."""
    held_bytes: float
    context_bytes: float
    peak_bytes: float
    full_bytes: float
    held_tokens: tuple[float, float]
    context_tokens: float
    new_tokens: float
    prefill_seconds: float
    decode_seconds: float

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON, the key's fields beside the others."""
        values = asdict(self)
        return {**values.pop("key"), **values}


def summarise(rows: Iterable[Row], by: Sequence[str] = CELL) -> list[Summary]:
    """One summary for each combination of the cell's fields in `by`, in the order in which they first come.

    Raises:
        InputError: a field that a cell does not have, or losses and scores in one summary.
    """
    for name in by:
        if name not in CELL:
            raise InputError(f"a cell has no field {name!r}: there are {', '.join(CELL)}")
    groups: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        groups.setdefault(tuple(getattr(row.cell, name) for name in by), []).append(row)
    return [_summary(dict(zip(by, key, strict=True)), group) for key, group in groups.items()]


def _summary(key: dict[str, Any], rows: list[Row]) -> Summary:
    metrics = sorted({row.metric for row in rows})
    if len(metrics) > 1 and "loss" in metrics:
        raise InputError(f"losses and scores have no mean ({', '.join(metrics)}): summarise by task")
    scores = [row.score for row in rows]
    low, high, interval = confidence(scores)

    def mean(name: str) -> float:
        return fmean(getattr(row, name) for row in rows)

    return Summary(
        key=key,
        metric=metrics[0] if len(metrics) == 1 else "mixed",
        count=len(rows),
        score=fmean(scores),
        low=low,
        high=high,
        interval=interval,
        held_bytes=mean("held_bytes"),
        context_bytes=mean("context_bytes"),
        peak_bytes=mean("peak_bytes"),
        full_bytes=mean("full_bytes"),
        held_tokens=(fmean(row.held_tokens[0] for row in rows), fmean(row.held_tokens[1] for row in rows)),
        context_tokens=mean("context_tokens"),
        new_tokens=mean("new_tokens"),
        prefill_seconds=mean("prefill_seconds"),
        decode_seconds=mean("decode_seconds"),
    )


def confidence(scores: Sequence[float]) -> tuple[float, float, str]:
    """A 95 % interval of the mean, and how it was found.

    Wilson's score interval where all are 0 or 1: it neither leaves [0, 1] nor shrinks to nothing when all
    agree. Else the 2.5 and 97.5 percentiles of the means of 2000 resamples with a fixed seed; a single
    score has no interval and gives itself.
    """
    n = len(scores)
    mean = fmean(scores)
    if all(score in (0, 1) for score in scores):
        return *wilson(mean, n), "wilson"
    if n == 1 or not all(map(math.isfinite, scores)):
        return mean, mean, "none"
    rng = random.Random(0)
    means = sorted(fmean(rng.choices(scores, k=n)) for _ in range(_RESAMPLES))
    return means[int(0.025 * _RESAMPLES)], means[int(0.975 * _RESAMPLES) - 1], "bootstrap"


def wilson(share: float, n: int) -> tuple[float, float]:
    """Wilson's 95 % interval of a share seen in n trials (Wilson 1927; Brown, Cai and DasGupta 2001)."""
    scale = 1 + _Z**2 / n
    middle = (share + _Z**2 / (2 * n)) / scale
    half = _Z * math.sqrt(share * (1 - share) / n + _Z**2 / (4 * n**2)) / scale
    return max(0.0, middle - half), min(1.0, middle + half)
