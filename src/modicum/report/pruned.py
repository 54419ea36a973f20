"""Pruned: what one run of `modicum prune --out` wrote into its report.json, read and checked."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from modicum.errors import InputError
from modicum.evaluation.store import ROWS

REPORT = "report.json"

# What the settings of a refiner that has several names tell it by.
_VARIANTS = {"guarded=True": "guarded", "variance='within'": "paper"}


@dataclass(frozen=True)
class Weight:
    """What was done to one weight; an expert's counts as one."""

    name: str
    block: int
    rows: int
    width: int
    kept: int
    chosen: float | None
    """Share of the layer's mean squared output that is lost, by the mask as it was chosen."""
    refined: float | None
    updated: float | None
    """After refinement and update: what the written model has."""
    moved: int
    """Weights that refinement brought back."""
    tokens: int | None
    seconds: float | None

    @property
    def removed(self) -> float:
        """The share that is gone."""
        return 1 - self.kept / (self.rows * self.width)

    @property
    def short(self) -> str:
        """From the block's number on: "5.mlp.up_proj"."""
        name = self.name.removesuffix(".weight")
        at = f".{name}".find(f".{self.block}.")
        return name[at:] if at >= 0 else name

    @property
    def kind(self) -> str:
        """What it is in every block, experts' numbers left out: "mlp.up_proj"."""
        return re.sub(r"\[\d+\]|\.\d+(?=\.|$)", "", self.short.removeprefix(f"{self.block}."))


@dataclass(frozen=True)
class Pruned:
    """A pruned model.

    What `modicum prune` adds to `PruneReport.to_dict()` is None where Python code wrote that alone:
    perplexities and bytes, and what model and text they are of.
    """

    path: Path
    method: str
    refine: str
    """The refiner's name, or "none"."""
    settings: str
    """The refiner's in full."""
    update: str
    pattern: str
    layers: str
    """How blocks shared the sparsity."""
    asked: float
    shares: tuple[float, ...]
    """Asked of each block."""
    weights: tuple[Weight, ...]
    tokens: int | None
    seconds: float | None
    peak_bytes: float | None
    before: float | None
    """Perplexity of held-back text."""
    after: float | None
    dense_bytes: float | None
    packed_bytes: float | None
    model: str | None
    dtype: str | None
    calibration: str | None
    """Where its text is from."""
    seed: int | None
    """Which of its sequences."""
    held_back: int | None
    """Tokens that perplexity is of."""
    budget: str | None
    """What the file was to take, where that was asked for."""

    @property
    def name(self) -> str:
        """What was done, but for how much: "wanda + swap, owl"."""
        parts = [self.method, *(x for x in (self.refine, self.update) if x != "none")]
        return " + ".join(parts) + (f", {self.layers}" if self.layers != "uniform" else "")

    @property
    def how_much(self) -> str:
        """The pattern for people: "60%", "2:4", "16x4 at 30%"."""
        return re.sub(r"\d*\.\d+", lambda match: f"{100 * float(match[0]):.4g}%", self.pattern)

    @property
    def removed(self) -> float:
        """The share of prunable weights that is gone."""
        return 1 - sum(w.kept for w in self.weights) / sum(w.rows * w.width for w in self.weights)

    @property
    def error(self) -> float | None:
        """Mean of the weights' errors."""
        return mean_error(self.weights, lambda w: w.updated)

    @property
    def uneven(self) -> bool:
        """Whether blocks were to lose unequal shares."""
        return max(self.shares) - min(self.shares) > 1e-6

    @property
    def perplexities(self) -> tuple[float, float] | None:
        """Before and after, where both can be drawn."""
        if self.before is None or self.after is None:
            return None
        drawn = 0 < self.before < math.inf and 0 < self.after < math.inf
        return (self.before, self.after) if drawn else None

    def removed_of(self, block: int) -> float:
        """The share of a block's weights that is gone."""
        weights = [w for w in self.weights if w.block == block]
        return 1 - sum(w.kept for w in weights) / sum(w.rows * w.width for w in weights)


def mean_error(weights: Sequence[Weight], error: Callable[[Weight], float | None]) -> float | None:
    """Mean of one of their errors, over those that have it."""
    found = [value for value in map(error, weights) if value is not None]
    return sum(found) / len(found) if found else None


def holds_pruned(paths: Sequence[Path]) -> bool:
    """Whether paths (folders, or files in them) are of pruning; else they are of evaluation, or of nothing.

    Raises:
        InputError: some are of one and some of the other, or a folder is of both.
    """
    of_pruning: list[Path] = []
    others: list[Path] = []
    for path in paths:
        pruned = (path / REPORT).exists() if path.is_dir() else path.suffix == ".json"
        if pruned and path.is_dir() and (path / ROWS).exists():
            raise InputError(
                f"{path} holds a pruning report and an evaluation: say which by its file, {path / REPORT} or "
                f"{path / ROWS}"
            )
        if path.exists():  # what is missing is missed by whoever reads the rest
            (of_pruning if pruned else others).append(path)
    if of_pruning and others:
        raise InputError(
            f"{of_pruning[0]} is of `modicum prune`, {others[0]} is not: report them apart, on two pages"
        )
    return bool(of_pruning) or all(path.suffix == ".json" for path in paths)


def read_pruned(paths: Sequence[str | Path]) -> list[Pruned]:
    """The reports of several folders (or files), to be compared; a path given twice counts once.

    Raises:
        InputError: one is missing, damaged or no pruning report, or two are not of the same layers.
    """
    runs = [_read(path) for path in dict.fromkeys(Path(path) for path in paths)]
    if not runs:
        raise InputError("there is nothing to report: give a folder that `modicum prune --out` wrote")
    first = runs[0]
    for run in runs[1:]:
        if {_shape(w) for w in run.weights} != {_shape(w) for w in first.weights}:
            raise InputError(
                f"{first.path} and {run.path} are not of the same layers, so their errors and perplexities "
                "cannot be compared: report them apart"
            )
    return runs


def labels(runs: Sequence[Pruned]) -> list[str]:
    """What runs are called: with how much they removed if that differs, the folder if nothing else does."""
    alike = len(runs) > 1 and len({run.pattern for run in runs}) == 1
    names = [run.name if alike else f"{run.name} @ {run.how_much}" for run in runs]
    for tell in (lambda run: run.path.resolve().parent.name, lambda run: str(run.path)):
        twice = {name for name in names if names.count(name) > 1}
        names = [f"{n} ({tell(run)})" if n in twice else n for n, run in zip(names, runs, strict=True)]
    return names


def _shape(weight: Weight) -> tuple[str, int, int]:
    return weight.name, weight.rows, weight.width


def _read(path: Path) -> Pruned:
    path = path / REPORT if path.is_dir() else path
    try:
        return _pruned(path, json.loads(path.read_bytes()))
    except OSError as error:
        raise InputError(
            f"cannot read {path}: {error.strerror or error}; give a folder that `modicum prune --out` wrote"
        ) from error
    except ValueError as error:
        raise InputError(
            f"{path} is damaged, or no report of `modicum prune` ({error}): prune again into another --out"
        ) from error


def _pruned(path: Path, data: Any) -> Pruned:
    if not isinstance(data, dict):
        raise ValueError("it is no JSON object")
    table = data.get("table")
    if not isinstance(table, list) or not table:
        raise ValueError("it has no table of layers")
    weights = tuple(_weight(number, row) for number, row in enumerate(table, 1))
    shares = data.get("shares")
    if not isinstance(shares, list):
        raise ValueError("it has no shares of blocks")
    last = max(w.block for w in weights)
    if last >= len(shares):
        raise ValueError(f"it has shares of {len(shares)} blocks and a layer of block {last}, counted from 0")
    settings = data.get("refine")
    if settings is not None and not isinstance(settings, str):
        raise ValueError(f"refine is {settings!r}, not text")
    return Pruned(
        path=path,
        method=_text(data, "method"),
        refine=_refiner(settings),
        settings=settings or "none",
        update=_text(data, "update"),
        pattern=_text(data, "pattern"),
        layers=_text(data, "layers"),
        asked=_part(data, "sparsity"),
        shares=tuple(_part({"share": share}, "share") for share in shares),
        weights=weights,
        tokens=_count(data, "tokens"),
        seconds=_amount(data, "seconds"),
        peak_bytes=_amount(data, "peak_bytes"),
        before=_maybe(data, "perplexity_before"),
        after=_maybe(data, "perplexity_after"),
        dense_bytes=_amount(data, "dense_bytes"),
        packed_bytes=_amount(data, "packed_bytes"),
        model=_words(data, "model"),
        dtype=_words(data, "dtype"),
        calibration=_words(data, "calibration"),
        seed=_count(data, "seed"),
        held_back=_count(data, "held_back_tokens"),
        budget=_words(data, "budget"),
    )


def _weight(number: int, row: Any) -> Weight:
    if not isinstance(row, dict):
        raise ValueError(f"row {number} of its table is no JSON object")
    try:
        made = Weight(
            name=_text(row, "name"),
            block=_whole(row, "block"),
            rows=_whole(row, "rows"),
            width=_whole(row, "width"),
            kept=_whole(row, "kept"),
            chosen=_maybe(row, "error_before"),
            refined=_maybe(row, "error_refined"),
            updated=_maybe(row, "error_after"),
            moved=_whole(row, "changed"),
            tokens=_count(row, "tokens"),
            seconds=_amount(row, "seconds"),
        )
        if not 0 <= made.kept <= made.rows * made.width or not made.rows * made.width:
            raise ValueError(f"kept is {made.kept} of {made.rows} × {made.width} weights")
    except ValueError as error:
        raise ValueError(f"row {number} of its table: {error}") from error
    return made


def _text(data: dict[str, Any], key: str) -> str:
    value = data.get(key)
    if not isinstance(value, str):
        raise ValueError(f"{key} is {value!r}, not text" if key in data else f"it lacks {key}")
    return value


def _words(data: dict[str, Any], key: str) -> str | None:
    """Text, where it is there."""
    return None if data.get(key) is None else _text(data, key)


def _count(data: dict[str, Any], key: str) -> int | None:
    """A whole number, where it is there."""
    return None if data.get(key) is None else _whole(data, key)


def _number(data: dict[str, Any], key: str) -> float:
    value = data.get(key)
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError(f"{key} is {value!r}, not a number" if key in data else f"it lacks {key}")
    return value


def _whole(data: dict[str, Any], key: str) -> int:
    value = _number(data, key)
    if not isinstance(value, int) or value < 0:
        raise ValueError(f"{key} is {value!r}, not a whole number of at least 0")
    return value


def _part(data: dict[str, Any], key: str) -> float:
    value = _number(data, key)
    if not 0 <= value <= 1:
        raise ValueError(f"{key} is {value!r}, not from 0 to 1")
    return value


def _maybe(data: dict[str, Any], key: str) -> float | None:
    """None where it is not there, or was not measured; JSON's NaN too."""
    value = None if data.get(key) is None else _number(data, key)
    return None if value is None or math.isnan(value) else value


def _amount(data: dict[str, Any], key: str) -> float | None:
    """Bytes or seconds, where they are there."""
    value = _maybe(data, key)
    if value is not None and not 0 <= value < math.inf:
        raise ValueError(f"{key} is {value!r}, not a number of at least 0")
    return value


def _refiner(settings: str | None) -> str:
    """Its name at the command line: "Swap(...)" -> "swap"."""
    if settings is None:
        return "none"
    name = settings.partition("(")[0].lower()
    return "-".join([name, *(word for told, word in _VARIANTS.items() if told in settings)])
