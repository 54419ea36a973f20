"""Maps of a trace: kept positions per layer and KV head, and attention mass retained per layer and head."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from modicum.report.style import DARK, Theme
from modicum.report.trace import Trace

_COLUMNS = 480  # of a panel: beyond that, neighbouring positions share one


def draw_kept(trace: Trace, name: str, theme: Theme) -> Any:
    """A matplotlib Figure: a panel per layer, a line per KV head."""
    from matplotlib.colors import PowerNorm
    from matplotlib.figure import Figure

    count = len(trace.kept)
    across = 1 if count <= 12 else 2
    down = math.ceil(count / across)
    heads = max(layer.shape[0] for layer in trace.kept)
    figure = Figure(
        figsize=(7.2 * across, 1.3 + max(0.3, min(0.09 * heads + 0.1, 1.0)) * down), layout="constrained"
    )
    layout: Any = figure.get_layout_engine()
    layout.set(h_pad=0.015, hspace=0.0)
    panels = figure.subplots(down, across, sharex=True, squeeze=False)
    cmap = _shades(theme)
    image: Any = None
    for index, panel in enumerate(panels.T.flat):  # layers run down the columns
        if index >= count:
            panel.set_visible(False)
            continue
        shares = column_shares(trace.kept[index])
        # Few kept among many are to be seen too: hence the power.
        image = panel.imshow(
            shares,
            aspect="auto",
            interpolation="nearest",
            cmap=cmap,
            norm=PowerNorm(0.5, 0, 1),
            extent=(0, trace.tokens, shares.shape[0] - 0.5, -0.5),
        )
        panel.set_ylabel(f"{index}", rotation=0, ha="right", va="center", fontsize=9)
        panel.set_yticks([])
        panel.tick_params(labelsize=9, length=2 if (index + 1) % down == 0 else 0)
        for edge in panel.spines.values():
            edge.set_visible(True)
            edge.set_linewidth(0.4)
    for column in range(across):
        last = max(r for r in range(down) if column * down + r < count)
        panels[last, column].tick_params(labelbottom=True, length=2)
        panels[last, column].set_xlabel("position in the context (tokens)", fontsize=10)
    figure.suptitle(f"{name}: {trace.kept_share:.0%} kept", x=0.01, ha="left", fontweight="bold", fontsize=12)
    figure.supylabel("layer; a line per KV head", fontsize=10)
    bar = figure.colorbar(image, ax=panels, label="share kept", fraction=0.04, pad=0.01)
    bar.set_ticks([0, 0.1, 0.5, 1], labels=["0", "10 %", "50 %", "100 %"])
    bar.ax.tick_params(labelsize=8.5)
    bar.outline.set_visible(False)
    return figure


def draw_mass(trace: Trace, name: str, theme: Theme) -> Any:
    """A matplotlib Figure: layers down, query heads across."""
    from matplotlib.figure import Figure

    layers, heads = len(trace.mass), max(len(m) for m in trace.mass)
    values = np.full((layers, heads), np.nan)
    for layer, mass in enumerate(trace.mass):
        values[layer, : len(mass)] = mass
    figure = Figure(
        figsize=(min(9.0, max(4.2, 1.8 + 0.42 * heads)), 1.6 + 0.3 * layers), layout="constrained"
    )
    panel = figure.add_subplot()
    panel.set_facecolor(theme.faint)
    image = panel.imshow(values, vmin=0, vmax=1, cmap="viridis", aspect="auto", interpolation="nearest")
    if heads <= 16:
        for (row, column), value in np.ndenumerate(values):
            if not math.isnan(value):
                ink = "#ffffff" if value < 0.55 else "#111111"
                panel.text(
                    column, row, f"{100 * value:.0f}", ha="center", va="center", color=ink, fontsize=8.5
                )
    for axis, number in ((panel.xaxis, heads), (panel.yaxis, layers)):
        axis.set_ticks(range(0, number, max(1, math.ceil(number / 16))))
    panel.set_xlabel("query head", fontsize=10)
    panel.set_ylabel("layer", fontsize=10)
    panel.tick_params(labelsize=9, length=2)
    figure.suptitle(
        f"{name}: {trace.mean_mass:.0%} of attention", x=0.01, ha="left", fontweight="bold", fontsize=12
    )
    bar = figure.colorbar(image, ax=panel, label="attention retained (%)", fraction=0.06, pad=0.02)
    bar.set_ticks([0, 0.5, 1], labels=["0", "50", "100"])
    bar.outline.set_visible(False)
    return figure


def column_shares(kept: NDArray[np.bool_]) -> NDArray[np.float64]:
    """[H, n] bool -> [H, columns]: of the positions in each column, the share that was kept."""
    n = kept.shape[1]
    width = min(_COLUMNS, n)
    starts = -(-np.arange(width) * n // width)
    sums = np.add.reduceat(kept.astype(np.float64), starts, axis=1)
    shares: NDArray[np.float64] = sums / np.diff(np.append(starts, n))
    return shares


def _shades(theme: Theme) -> Any:
    from matplotlib.colors import LinearSegmentedColormap

    top = "#8ecbff" if theme is DARK else "#003b73"
    return LinearSegmentedColormap.from_list("kept", [theme.paper, top])
