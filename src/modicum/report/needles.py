"""Needles: the score by depth of the needle and length of the context, for each series and budget."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from modicum.evaluation.row import Row
from modicum.report.results import budget_order
from modicum.report.style import Theme

_FEW = 40  # samples per length and panel up to which five depths are told apart, not ten


@dataclass(frozen=True)
class Needles:
    """Scores in cells of depth × length."""

    names: tuple[str, ...]
    """Series and the full cache, panels from top to bottom."""
    budgets: tuple[str, ...]
    """From left to right."""
    lengths: tuple[int, ...]
    depths: int
    """Equal bins from 0 to 1."""
    cells: dict[tuple[str, str, int, int], tuple[float, int]]
    """(series, budget, bin, length) -> mean score and number of samples."""


def needles(named: Sequence[tuple[str, Row]]) -> Needles | None:
    """Sort rows, each with its series' name, into cells; None where no row with a score has a depth."""
    rows = [(name, row) for name, row in named if row.depth is not None and row.metric != "loss"]
    if not rows:
        return None
    lengths = sorted({_length(row) for _, row in rows})
    panels: dict[tuple[str, str, int], int] = {}
    for name, row in rows:
        key = (name, row.cell.budget, _length(row))
        panels[key] = panels.get(key, 0) + 1
    depths = 5 if max(panels.values()) <= _FEW else 10
    scores: dict[tuple[str, str, int, int], list[float]] = {}
    for name, row in rows:
        assert row.depth is not None
        depth = min(depths - 1, max(0, int(row.depth * depths)))
        scores.setdefault((name, row.cell.budget, depth, _length(row)), []).append(row.score)
    return Needles(
        names=tuple(dict.fromkeys(name for name, _ in rows)),
        budgets=tuple(sorted({row.cell.budget for _, row in rows}, key=budget_order)),
        lengths=tuple(lengths),
        depths=depths,
        cells={key: (fmean(values), len(values)) for key, values in scores.items()},
    )


def draw(found: Needles, name: str, theme: Theme) -> Any:
    """A matplotlib Figure of one series: a panel per budget, depth downwards, length to the right."""
    import numpy as np
    from matplotlib.figure import Figure

    budgets = [b for b in found.budgets if any(k[0] == name and k[1] == b for k in found.cells)]
    wide = max(1.7, 0.62 * len(found.lengths))
    down = math.ceil(len(budgets) / max(1, int(7.5 / wide)))
    across = math.ceil(len(budgets) / down)
    figure = Figure(
        figsize=(max(3.2, wide * across + 1.4), 0.9 + (0.8 + 0.36 * found.depths) * down),
        layout="constrained",
    )
    panels = figure.subplots(down, across, squeeze=False, sharex=True, sharey=True)
    image: Any = None
    for index, panel in enumerate(panels.flat):
        if index >= len(budgets):
            panel.set_visible(False)
            continue
        budget = budgets[index]
        values = np.full((found.depths, len(found.lengths)), np.nan)
        panel.add_patch(_hatched(len(found.lengths), found.depths, theme))
        for row in range(found.depths):
            for column, length in enumerate(found.lengths):
                score, count = found.cells.get((name, budget, row, length), (math.nan, 0))
                if count:
                    values[row, column] = score
                    ink = "#ffffff" if score < 0.55 else "#111111"
                    # Out of the layout, which would else measure each of hundreds of texts.
                    style = {"ha": "center", "va": "center", "color": ink, "in_layout": False}
                    panel.text(column, row - 0.14, f"{100 * score:.0f}", fontsize=9, **style)
                    panel.text(column, row + 0.26, f"n={count}", fontsize=6.5, **style)
        image = panel.imshow(values, vmin=0, vmax=1, cmap="viridis", aspect="auto", zorder=1)
        panel.set_xticks(range(len(found.lengths)), [_tokens(n) for n in found.lengths])
        edges = np.linspace(0, 100, found.depths + 1)
        panel.set_yticks(np.arange(found.depths + 1) - 0.5, [f"{e:.0f}" for e in edges])
        panel.set_title("all tokens" if budget == "full" else budget, fontsize=10.5)
        panel.tick_params(labelsize=8.5, length=2)
        if index + across >= len(budgets):
            panel.tick_params(labelbottom=True)
    figure.suptitle(name, x=0.01, ha="left", fontweight="bold", fontsize=12)
    figure.supxlabel("length (tokens)", fontsize=10)
    figure.supylabel("depth of the needle (% of the context)", fontsize=10)
    bar = figure.colorbar(image, ax=panels, label="score (%)", fraction=0.04, pad=0.02, aspect=40)
    bar.set_ticks([0, 0.5, 1], labels=["0", "50", "100"])
    bar.outline.set_visible(False)
    return figure


def _hatched(columns: int, rows: int, theme: Theme) -> Any:
    """What shows where no cell lies: nothing was measured there."""
    from matplotlib.patches import Rectangle

    return Rectangle(
        (-0.5, -0.5),
        columns,
        rows,
        facecolor="none",
        edgecolor=theme.faint,
        hatch="////",
        linewidth=0,
        zorder=0,
    )


def _length(row: Row) -> int:
    """As asked for, or to two figures where samples are as long as their data."""
    if row.cell.length is not None:
        return row.cell.length
    return int(float(f"{row.context_tokens:.2g}"))


def _tokens(length: int) -> str:
    return f"{length / 1024:g}k" if length >= 1024 and length % 512 == 0 else f"{length:,}"
