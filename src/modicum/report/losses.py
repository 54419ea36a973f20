"""Losses: pictures of what pruning took: each layer's error, each block's weights, perplexity for bytes."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from modicum.report.pruned import Pruned, Weight
from modicum.report.style import FULL_LOOK, Look, Theme, byte_axis, legend

_STEEP = 4  # largest over smallest perplexity from which their axis is logarithmic


@dataclass(frozen=True)
class Line:
    """An error through all layers."""

    name: str
    look: Look
    weights: Sequence[Weight]
    error: Callable[[Weight], float | None]

    def at(self, kind: str) -> dict[int, list[float]]:
        """Errors of a kind of layer by block (of several experts several); those that are 0 have no place on
        a logarithmic axis.
        """
        found: dict[int, list[float]] = {}
        for weight in self.weights:
            error = self.error(weight)
            if weight.kind == kind and error is not None and 0 < error < math.inf:
                found.setdefault(weight.block, []).append(error)
        return found


def kinds(weights: Sequence[Weight]) -> list[str]:
    """Kinds of layers, in their order in a block."""
    return list(dict.fromkeys(w.kind for w in weights))


def draw_errors(lines: Sequence[Line], title: str, theme: Theme) -> Any:
    """A matplotlib Figure: a panel for each kind of layer, blocks to the right."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    names = kinds(lines[0].weights)
    across = min(4 if len(names) in (4, 7, 8) or len(names) > 9 else 3, len(names))
    down = math.ceil(len(names) / across)
    figure = Figure(figsize=(max(5.0, 0.6 + 2.5 * across), 1.0 + 2.0 * down), layout="constrained")
    panels = figure.subplots(down, across, squeeze=False, sharex=True, sharey=True)
    entries: dict[str, Any] = {}
    seen: list[float] = []
    for index, panel in enumerate(panels.flat):
        if index >= len(names):
            panel.set_visible(False)
            continue
        for line in sorted(lines, key=lambda line: line.look.labelled):  # labelled ones last, above the grey
            values = line.at(names[index])
            seen += [error for errors in values.values() for error in errors]
            drawn = _line(panel, values, line.look, theme)
            entries[line.name if line.look.labelled else "others, in the tables"] = drawn
        panel.set_title(names[index], loc="left", fontsize=10)
        panel.grid(alpha=0.35, linewidth=0.6)
        panel.tick_params(labelsize=9)
        if index + across >= len(names):  # the last of its column
            panel.tick_params(labelbottom=True)
        if index >= across * (down - 1):
            panel.set_xlabel("decoder block", fontsize=10)
    _log_axis(panels[0, 0], seen)
    panels[0, 0].xaxis.set_major_locator(MaxNLocator(8, integer=True))
    figure.suptitle(title, x=0.01, ha="left", fontweight="bold", fontsize=12)
    figure.supylabel("share of squared output lost (lower is better)", fontsize=10)
    figure.set_figheight(1.0 + 2.0 * down + 0.2 * legend(figure, entries))
    return figure


def _line(panel: Any, values: Mapping[int, Sequence[float]], look: Look, theme: Theme) -> Any:
    blocks = sorted(values)
    few = len(blocks) <= 16  # markers of more would touch
    colour = look.colour or theme.faint
    if any(len(values[block]) > 1 for block in blocks):
        low, high = [min(values[b]) for b in blocks], [max(values[b]) for b in blocks]
        panel.fill_between(blocks, low, high, color=colour, alpha=0.15, linewidth=0, zorder=1)
    return panel.plot(
        blocks,
        [fmean(values[block]) for block in blocks],
        marker=look.marker,
        markersize=5.5 if few else 3.5,
        markeredgecolor=theme.paper,
        markeredgewidth=0.5 if few else 0,
        linestyle=look.dash,
        linewidth=1.4,
        color=colour,
        zorder=3 if look.labelled else 2,
    )[0]


def draw_removed(runs: Sequence[tuple[str, Pruned]], looks: Mapping[str, Look], theme: Theme) -> Any:
    """A matplotlib Figure: the share of each block that is gone; bars for one run, lines for several."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator, PercentFormatter

    figure = Figure(figsize=(7.2, 3.6), layout="constrained")
    panel = figure.add_subplot()
    entries: dict[str, Any] = {}
    for name, run in runs:
        blocks = sorted({w.block for w in run.weights})
        shares = [run.removed_of(block) for block in blocks]
        look = looks[name]
        colour = look.colour or theme.faint
        if len(runs) == 1:
            panel.bar(blocks, shares, color=colour, width=0.75, zorder=2)
            drawn = panel.axhline(run.removed, color=theme.ink, linestyle="--", linewidth=1, zorder=3)
            entries["all blocks together"] = drawn
            continue
        drawn = _line(panel, dict(zip(blocks, ([x] for x in shares), strict=True)), look, theme)
        entries[name if look.labelled else "others, in the tables"] = drawn
    panel.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    if len(runs) > 1:
        panel.margins(y=0.15)
        panel.yaxis.set_major_formatter(PercentFormatter(1))
    panel.xaxis.set_major_locator(MaxNLocator("auto", integer=True))
    panel.set_xlabel("decoder block")
    panel.set_ylabel("share removed")
    panel.grid(alpha=0.35, linewidth=0.6)
    figure.set_figheight(3.4 + 0.2 * legend(figure, entries))
    return figure


def draw_perplexity(runs: Sequence[tuple[str, Pruned]], looks: Mapping[str, Look], theme: Theme) -> Any:
    """A matplotlib Figure: perplexity against the packed file's bytes. runs: all with both."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.6, 5.0), layout="constrained")
    panel = figure.add_subplot()
    entries: dict[str, Any] = {}
    sizes: list[float] = []
    values: list[float] = []
    for name in dict.fromkeys(run.name for _, run in runs):
        path = sorted(_place(run) for _, run in runs if run.name == name)
        panel.plot(*zip(*path, strict=True), "-", color=theme.faint, linewidth=1, zorder=1)
    for name, run in sorted(runs, key=lambda pair: looks[pair[0]].labelled):
        x, y = _place(run)
        look = looks[name]
        drawn = panel.plot(
            x,
            y,
            marker=look.marker,
            linestyle="none",
            color=look.colour or theme.faint,
            markersize=9,
            markeredgecolor=theme.paper,
            zorder=3 if look.labelled else 2,
        )[0]
        entries[name if look.labelled else "others, in the tables"] = drawn
        sizes.append(x)
        values.append(y)
    dense = {(run.dense_bytes, run.before) for _, run in runs if run.dense_bytes and run.before}
    for x, y in sorted(dense):
        star = panel.plot(x, y, FULL_LOOK.marker, color=theme.ink, markersize=12)
        entries["not pruned"] = star[0]
        panel.axhline(y, color=theme.ink, linestyle="--", linewidth=1, alpha=0.7, zorder=0.5)
        sizes.append(x)
        values.append(y)
    byte_axis(panel, sizes, "bytes of the model")
    if max(values) > _STEEP * min(values):
        _log_axis(panel, values)
    else:
        panel.margins(y=0.1)
    panel.set_ylabel("perplexity of held-back text (lower is better)")
    panel.grid(alpha=0.35, linewidth=0.6)
    figure.set_figheight(4.4 + 0.2 * legend(figure, entries))
    return figure


def _place(run: Pruned) -> tuple[float, float]:
    assert run.packed_bytes is not None
    assert run.perplexities is not None
    return run.packed_bytes, run.perplexities[1]


def _log_axis(panel: Any, values: Sequence[float]) -> None:
    """A logarithmic y-axis with ticks at 1, 2 and 5, or at powers of ten where these are many."""
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

    low, high = (min(values), max(values)) if values else (0.1, 1.0)
    pad = max((high / low) ** 0.06, 1.1)
    low, high = low / pad, high * pad
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    ticks = [m * 10.0**k for k in powers for m in (1, 2, 5) if low <= m * 10.0**k <= high]
    if len(ticks) > 7:
        ticks = [10.0**k for k in powers if low <= 10.0**k <= high]
    panel.set_yscale("log")
    panel.set_ylim(low, high)
    panel.yaxis.set_major_locator(FixedLocator(ticks))
    panel.yaxis.set_minor_locator(NullLocator())
    panel.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,g}"))
