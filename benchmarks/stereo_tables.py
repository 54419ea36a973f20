"""Tables of the stereo benchmark."""

from __future__ import annotations

import statistics
from collections.abc import Iterable
from itertools import pairwise
from typing import Any

import report
from stereo_pairs import CONDITIONS, SCENES

Row = dict[str, Any]
AIM = 1.1
"""Times SGBM's bad-1 on clean pairs that ours may be at most."""
ERRORS = tuple((part, name) for part in ("visible", "all") for name in ("bad_1", "bad_2", "mean"))
"""What a row has of each pair, in this order."""


def section(raw: dict[str, Any]) -> str:
    """All tables, markers left out."""
    rows = raw["rows"]
    m = raw["machine"]
    parts = [
        f"Measured {raw['date']} on {m['processor']}, {m['cores']} cores that other jobs shared; OpenCV "
        f"{raw.get('opencv', '')}, numba {raw.get('numba', '')}."
    ]
    accuracy = [row for row in rows if row["kind"] == "accuracy"]
    if accuracy:
        parts += [_one_setting(accuracy), _own_settings(accuracy), _each_pair(accuracy)]
    speed = [row for row in rows if row["kind"] == "speed"]
    if speed:
        parts.append(_speed(speed))
    synthesis, hardware = ([r for r in rows if r["kind"] == kind] for kind in ("synthesis", "hardware"))
    if synthesis:
        parts.append(_synthesis(synthesis))
    if hardware:
        parts.append(_hardware(hardware))
    return "\n\n".join(parts)


def _mean(row: Row, measure: str, part: str, conditions: Iterable[str]) -> float:
    return statistics.fmean(_error(row, f"{s} {c}", part, measure) for s in SCENES for c in conditions)


def _error(row: Row, pair: str, part: str, measure: str) -> float:
    found: float = row["errors"][pair][ERRORS.index((part, measure))]
    return found


def _best(rows: list[Row], name: str, conditions: Iterable[str], allows_defaults: bool = False) -> Row:
    chosen = list(conditions)
    mine = [row for row in rows if row["name"] == name and (allows_defaults or row["setting"] != "defaults")]
    return min(mine, key=lambda row: _mean(row, "bad_1", "visible", chosen))


def _names(rows: list[Row]) -> list[str]:
    return list(dict.fromkeys(row["name"] for row in rows))


def _percent(value: float) -> str:
    return f"{100 * value:.1f}"


def _cells(row: Row, conditions: Iterable[str]) -> list[str]:
    cells = []
    for condition in conditions:
        cells += [
            " / ".join(_percent(_mean(row, "bad_1", part, [condition])) for part in ("visible", "all")),
            " / ".join(_percent(_mean(row, "bad_2", part, [condition])) for part in ("visible", "all")),
            f"{_mean(row, 'mean', 'visible', [condition]):.2f}",
        ]
    return cells


_AREA = ("LUT4", "flip-flops", "18-kbit RAMs")
_HEAD = [f"{c}: {m}" for c in CONDITIONS for m in ("bad-1", "bad-2", "mean px")]


def _one_setting(rows: list[Row]) -> str:
    lines = []
    for name in _names(rows):
        best = _best(rows, name, CONDITIONS)
        lines.append([name, *_cells(best, CONDITIONS), best["setting"]])
    defaults = [row for row in rows if row["setting"] == "defaults" and row["name"].startswith("rank-s")]
    lines += [
        [f"{row['name']}, defaults", *_cells(row, CONDITIONS), "defaults (chosen on these pairs)"]
        for row in defaults
    ]
    return (
        "**One setting for all conditions**, the one of each method's grid with the least mean bad-1 of "
        "visible pixels over three pairs and three conditions. Visible / all pixels, percent; the mean "
        "error is of visible pixels.\n\n" + report.table(["", *_HEAD, "setting"], lines)
    )


def _own_settings(rows: list[Row]) -> str:
    lines = []
    for name in _names(rows):
        cells = []
        for condition in CONDITIONS:
            best = _best(rows, name, [condition])
            cells += _cells(best, [condition])
        lines.append([name, *cells])
    return (
        "**Each condition with the best setting for it**, which nobody knows beforehand.\n\n"
        + report.table(["", *_HEAD], lines)
    )


def _each_pair(rows: list[Row]) -> str:
    lines = []
    peer = _best(rows, "SGBM HH", ["clean"])
    for name in _names(rows):
        best = _best(rows, name, ["clean"])
        cells = [name]
        for scene in SCENES:
            one, two = (_error(row, f"{scene} clean", "visible", "bad_1") for row in (best, peer))
            cells.append(f"{_percent(one)} ({one / two:.2f})")
        lines.append(cells)
    return (
        "**Clean pairs one by one**, bad-1 of visible pixels in percent, with the setting that is best for "
        f"the mean of the three; in brackets as a multiple of SGBM HH's. The aim is at most {AIM}.\n\n"
        + report.table(["", *SCENES], lines)
    )


_NOT_WIDENED = (
    "**These rows favour OpenCV.** They were measured before the benchmark widened the images of its "
    "speed part. OpenCV leaves out the first 64 columns, so SGBM matched 576 of 640 columns (BM about "
    "as many), 0.9 of the work that is counted; modicum matched all 640. For OpenCV *million "
    "disparities / s* counts 640 columns and is too high by 640 / 576 = 1.11; by the columns that it "
    "matched it is 0.9 of what stands here. If its time grows with the columns, its *ms* are too low by "
    "the same factor and its *frames / s* too high, and modicum's *times as fast as SGBM HH* are too "
    "low: multiply them by 1.11. The factor follows from the columns and was not measured. Ratios of "
    "SGBM's modes to each other are not affected."
)
"""Stands before rows that were measured on images without more columns."""


def _speed(rows: list[Row]) -> str:
    lines = []
    for row in rows:
        for name, told in row["methods"].items():
            ratio = told["ratio"]
            seconds = told["seconds"]
            lines.append(
                [
                    name,
                    str(row["threads"]),
                    f"{1e3 * seconds:.0f}",
                    f"{row['evaluations'] / seconds / 1e6:,.0f}",
                    f"{1 / seconds:.1f}",
                    f"{ratio['median']:.2f} ({ratio['low']:.2f} to {ratio['high']:.2f})",
                ]
            )
    return (
        "**Speed** at 640 x 480 and 64 disparities, all in turn in one run. With one thread the time is that "
        "of the thread, with two that on the wall, which other jobs of the machine lengthen: only ratios "
        "within a run say something.\n\n"
        + ("" if all(row.get("is_widened") for row in rows) else _NOT_WIDENED + "\n\n")
        + report.table(
            [
                "",
                "threads",
                "ms",
                "million disparities / s",
                "frames / s",
                "times as fast as SGBM HH, median and quartiles",
            ],
            lines,
        )
    )


def _core(row: Row) -> tuple[Any, ...]:
    return row["cost"], row["lanes"] < row["disparities"], row["disparities"]


def _synthesis(rows: list[Row]) -> str:
    lines = [
        [
            row["cost"],
            str(row["disparities"]),
            str(row["lanes"]),
            *(f"{row[kind]:,}" for kind in ("luts", "flip_flops", "block_rams")),
            str(row["path_bits"]),
        ]
        for row in sorted(rows, key=_core)
    ]
    return (
        "**Area** of the cores for 640 x 480, synthesised by Yosys for a Lattice ECP5, before placement.\n\n"
        + report.table(["cost", "D", "in a clock", *_AREA, "bits of L"], lines)
        + _growth(rows)
    )


def _hardware(rows: list[Row]) -> str:
    lines = []
    for row in sorted(rows, key=_core):
        clock = row["megahertz"]
        frames = clock * 1e6 / row["clocks_per_frame"]
        lines.append(
            [
                row["cost"],
                str(row["disparities"]),
                str(row["lanes"]),
                f"{row['luts']:,}",
                f"{row['flip_flops']:,}",
                str(row["block_rams"]),
                f"{row['path_bits']}",
                f"{clock:.1f}",
                f"{frames:.0f}",
                f"{frames * row['width'] * row['height'] * row['disparities'] / 1e6:,.0f}",
            ]
        )
    head = ["cost", "D", "in a clock", *_AREA, "bits of L", "f_max MHz"]
    return (
        f"**Hardware** for 640 x 480, placed and routed by nextpnr on a Lattice ECP5 ({rows[0]['device']}); "
        "frames per second are f_max / clocks of a frame.\n\n"
        + report.table([*head, "frames / s", "million disparities / s"], lines)
        + _growth(rows)
    )


def _growth(rows: list[Row]) -> str:
    told = []
    for cost in dict.fromkeys(row["cost"] for row in rows):
        mine = [row for row in rows if row["cost"] == cost and row["lanes"] == row["disparities"]]
        for one, two in pairwise(sorted(mine, key=lambda row: int(row["disparities"]))):
            names = {"luts": "LUTs", "flip_flops": "flip-flops", "megahertz": "f_max"}
            ratios = [f"{name} × {two[k] / one[k]:.2f}" for k, name in names.items() if k in one]
            told.append(f"{cost} {one['disparities']} to {two['disparities']}: {', '.join(ratios)}")
    return "\n\nGrowth with D: " + "; ".join(told) + "." if told else ""
