"""Results: the rows of one folder or several, joined, checked and averaged."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from statistics import fmean
from typing import Any

from modicum.errors import BudgetError, InputError
from modicum.evaluation.allowance import FULL, Allowance
from modicum.evaluation.row import Cell, Row
from modicum.evaluation.store import ROWS, read_rows
from modicum.evaluation.summary import CELL, Summary, summarise
from modicum.kv.budget import parse_size

OURS = "modicum"
_GROUP = tuple(name for name in CELL if name != "seed")
_SETTINGS = {
    "chunk": "chunk",
    "n_sink": "sinks",
    "recent": "recent",
    "evict_every": "evict every",
    "positions": "positions",
    "store": "store",
}


@dataclass(frozen=True)
class Stratum:
    """Rows that differ in sample and seed only."""

    series: str
    """Policy as it is called on the page; names the system and what else tells it from others."""
    summary: Summary
    nominal: float | None
    """Bytes after the context that the budget's words alone would make; None where they cannot be said."""

    @property
    def budget(self) -> str:
        return str(self.summary.key["budget"])

    @property
    def task(self) -> str:
        return str(self.summary.key["task"])

    @property
    def length(self) -> int | None:
        length: int | None = self.summary.key["length"]
        return length

    @property
    def peer(self) -> bool:
        return bool(self.summary.key["system"] != OURS)

    @property
    def full(self) -> bool:
        return FULL in (self.budget, self.summary.key["policy"])

    @property
    def loss(self) -> bool:
        return self.summary.metric == "loss"


@dataclass(frozen=True)
class View:
    """What may be compared in one picture: a model in a dtype, and whether the question was hidden."""

    model: str
    dtype: str
    question: str
    strata: tuple[Stratum, ...]

    def tasks(self, *, loss: bool) -> list[str]:
        """Names of its tasks, those judged by loss or the others, in the order in which they came."""
        return list(dict.fromkeys(s.task for s in self.strata if s.loss is loss))


@dataclass
class Results:
    """Rows joined, with what there is to warn of."""

    rows: list[Row]
    warnings: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._check()

    @classmethod
    def read(cls, paths: Sequence[str | Path]) -> Results:
        """The rows of several folders; a sample that two of them have counts once, as in the first.

        Raises:
            InputError: a folder without rows, a broken line, or a task judged by two metrics.
        """
        rows: dict[tuple[Cell, int], Row] = {}
        warnings = []
        for path in dict.fromkeys(Path(p) for p in paths):
            found = read_rows(path)
            if not found:
                raise InputError(f"{path} has no rows yet: run `modicum eval --out {path}` first")
            file = path / ROWS if path.is_dir() else path
            if not file.read_bytes().endswith(b"\n"):
                warnings.append(f"the last line of {file} is cut short, as after a kill; it was left out")
            before = len(rows)
            for row in found:
                rows.setdefault((row.cell, row.index), row)
            doubled = before + len(found) - len(rows)
            if doubled:
                warnings.append(f"{doubled:,} samples of {path} are in an earlier folder too, and count once")
        if not rows:
            raise InputError("there is nothing to report: give a folder that `modicum eval --out` wrote")
        return cls(list(rows.values()), warnings)

    def _check(self) -> None:
        metrics: dict[str, str] = {}
        broken = [row for row in self.rows if not math.isfinite(row.score)]
        if broken:
            self.warnings.append(
                f"{len(broken):,} rows have a score that is no finite number and were left out, "
                f"the first is sample {broken[0].index} of {broken[0].cell.task} under "
                f"{broken[0].cell.policy}"
            )
            self.rows = [row for row in self.rows if math.isfinite(row.score)]
        if not self.rows:
            raise InputError("no row has a score that is a finite number: there is nothing to report")
        for row in self.rows:
            known = metrics.setdefault(row.cell.task, row.metric)
            if known != row.metric:
                raise InputError(
                    f"the task {row.cell.task} is judged by {known} in some rows and by {row.metric} in "
                    "others, which have no common mean: report the folders apart"
                )

    @cached_property
    def views(self) -> list[View]:
        """One per model, dtype and question mode; hidden before seen."""
        strata: dict[tuple[str, str, str], list[Stratum]] = {}
        nominal = self._nominal()
        for summary in summarise(self.rows, _GROUP):
            key = summary.key
            made = Stratum(self.series(key), summary, nominal[tuple(key[name] for name in _GROUP)])
            strata.setdefault((key["model"], key["dtype"], key["question"]), []).append(made)
        views = [View(*key, tuple(found)) for key, found in strata.items()]
        order = list(dict.fromkeys((v.model, v.dtype) for v in views))
        return sorted(views, key=lambda v: (order.index((v.model, v.dtype)), v.question))

    def series(self, key: Mapping[str, Any]) -> str:
        """What a cell's policy is called: settings that the system's rows differ in are part of the name."""
        name = "full cache" if FULL in (key["policy"], key["budget"]) else str(key["policy"])
        parts = [name if key["system"] == OURS else f"{name} ({key['system']})"]
        for setting, word in _SETTINGS.items():
            if setting in self._varying.get(key["system"], ()):
                value = key[setting]
                if value is not None:
                    parts.append(f"{word} {value}")
                elif setting == "chunk":
                    parts.append("one shot")
        return ", ".join(parts)

    @cached_property
    def _varying(self) -> dict[str, set[str]]:
        """Per system, the settings that its evicting rows differ in."""
        found: dict[str, dict[str, set[Any]]] = {}
        for row in self.rows:
            if FULL not in (row.cell.policy, row.cell.budget):
                seen = found.setdefault(row.cell.system, {})
                for setting in _SETTINGS:
                    seen.setdefault(setting, set()).add(getattr(row.cell, setting))
        return {
            system: {s for s, values in seen.items() if len(values) > 1} for system, seen in found.items()
        }

    def _nominal(self) -> dict[tuple[Any, ...], float | None]:
        groups: dict[tuple[Any, ...], list[float | None]] = {}
        for row in self.rows:
            key = tuple(getattr(row.cell, name) for name in _GROUP)
            groups.setdefault(key, []).append(nominal_bytes(row))
        return {
            key: fmean(v for v in values if v is not None) if None not in values else None
            for key, values in groups.items()
        }

    def facts(self) -> dict[str, list[str]]:
        """Distinct values of what a reader wants to know of the rows' making."""

        def distinct(values: Iterable[Any]) -> list[str]:
            return list(dict.fromkeys(str(value) for value in values if value is not None))

        cells = [row.cell for row in self.rows]
        return {
            "models": distinct(f"{cell.model} ({cell.dtype})" for cell in cells),
            "tasks": distinct(cell.task for cell in cells),
            "lengths": distinct(f"{cell.length:,}" if cell.length else None for cell in cells),
            "systems": distinct(cell.system for cell in cells),
            "chunk": distinct(cell.chunk or "all at once" for cell in cells),
            "sinks": distinct(cell.n_sink for cell in cells),
            "recent": distinct(cell.recent for cell in cells),
            "positions": distinct(cell.positions for cell in cells),
            "store": distinct(cell.store for cell in cells),
            "seeds": distinct(cell.seed for cell in cells),
            "versions": distinct(f"{name} {v}" for row in self.rows for name, v in row.versions.items()),
            "device": distinct(row.extra.get("device") for row in self.rows),
        }


def nominal_bytes(row: Row) -> float | None:
    """Bytes of the context's keys and values that the budget's words stand for.

    A size is itself; tokens and shares are taken of `full_bytes`, in proportion to the context's part of the
    tokens seen. A peer may say the share itself (extra["nominal_share"]). None for the full cache and for
    what cannot be read.
    """
    if FULL in (row.cell.policy, row.cell.budget):
        return None
    try:
        seen = row.context_tokens + int(row.extra.get("question_tokens", 0)) + row.new_tokens
        if "nominal_share" in row.extra:
            return float(row.extra["nominal_share"]) * row.full_bytes * row.context_tokens / max(1, seen)
        allowance = Allowance.parse(row.cell.budget)
        if allowance.share is not None:
            return allowance.share * row.full_bytes * row.context_tokens / max(1, seen)
        if allowance.text.isdigit():
            return int(allowance.text) * row.full_bytes / max(1, seen)
        return float(parse_size(allowance.text))
    except BudgetError:
        return None


def budget_order(budget: str) -> tuple[int, float]:
    """To sort budgets by: tokens, sizes, shares, full; those of a kind by size."""
    try:
        allowance = Allowance.parse(budget)
        if allowance.text == FULL:
            return 3, 0.0
        if allowance.share is not None:
            return 2, allowance.share
        if allowance.text.isdigit():
            return 0, float(allowance.text)
        return 1, float(parse_size(allowance.text))
    except BudgetError:
        return 4, 0.0
