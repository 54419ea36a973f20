"""Accuracy: score (or loss) against measured bytes, a line per series, and the Pareto front."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from modicum.report.points import HELD, PEAK, Point, pareto
from modicum.report.style import DARK, Look, Theme, byte_axis, legend

_APART = 0.05  # nominal and held bytes differ by at least this share to be shown apart
AXES = {HELD: "bytes held after the context", PEAK: "most bytes ever held"}


def draw(points: Sequence[Point], looks: Mapping[str, Look], title: str, axis: str, theme: Theme) -> Any:
    """A matplotlib Figure. points: not empty, all of losses or none."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.2, 5.6), layout="constrained")
    panel = figure.add_subplot()
    loss = points[0].loss
    entries: dict[str, Any] = {}
    nominal_shown = False
    series = list(dict.fromkeys(p.series for p in points))
    # Labelled ones last, above the grey.
    for name in sorted(series, key=lambda name: looks[name].labelled):
        line = sorted((p for p in points if p.series == name), key=lambda p: p.at(axis))
        entries |= _line(panel, name, line, looks[name], axis, theme)
        if axis == HELD:
            nominal_shown |= _nominal(panel, line, looks[name], theme)
    others = sum(not looks[name].labelled for name in series)
    front = pareto(points, axis)
    entries["Pareto front"] = _front(panel, front, axis, theme)
    if nominal_shown:
        entries["size in name only"] = panel.plot(
            [], [], "o", mfc="none", mec=theme.ink, linestyle="none", alpha=0.8
        )[0]
    if others:
        entries[f"{others} more, in the tables"] = panel.plot([], [], ".:", color=theme.faint)[0]
    shown = [p.at(axis) for p in points]
    if axis == HELD:
        shown += [p.nominal for p in points if _apart(p) and p.nominal]
    byte_axis(panel, shown, AXES[axis])
    _score_axis(panel, points, loss)
    panel.set_title(title, loc="left", fontweight="bold")
    panel.grid(alpha=0.35, linewidth=0.6)
    figure.set_figheight(4.5 + 0.2 * legend(figure, entries))
    return figure


def _line(
    panel: Any, name: str, line: Sequence[Point], look: Look, axis: str, theme: Theme
) -> dict[str, Any]:
    x, y = [p.at(axis) for p in line], [p.score for p in line]
    if line[0].full:
        panel.axhline(y[0], color=theme.ink, linestyle="--", linewidth=1, alpha=0.7, zorder=1)
        drawn = panel.plot(x, y, marker="*", markersize=12, color=theme.ink, linestyle="--", linewidth=1)[0]
        return {name: drawn}
    if not look.labelled:
        panel.plot(x, y, marker=".", color=theme.faint, linestyle=":", linewidth=1, alpha=0.8, zorder=1)
        return {}
    errors = [[p.score - p.low for p in line], [p.high - p.score for p in line]]
    panel.errorbar(
        x, y, yerr=errors, fmt="none", ecolor=look.colour, elinewidth=1, capsize=2.5, alpha=0.45, zorder=2
    )
    drawn = panel.plot(
        x,
        y,
        marker=look.marker,
        linestyle=look.dash,
        color=look.colour,
        markersize=6.5,
        markeredgecolor=theme.paper,
        markeredgewidth=0.6,
        linewidth=1.6,
        zorder=3,
    )[0]
    return {name: drawn}


def _apart(point: Point) -> bool:
    """Whether a peer's budget in its own words is another than what it holds."""
    if not point.peer or point.nominal is None:
        return False
    return abs(point.nominal - point.held) > _APART * point.held


def _nominal(panel: Any, line: Sequence[Point], look: Look, theme: Theme) -> bool:
    """Hollow markers where the budget's words would put the points; whether there are any."""
    apart = [p for p in line if _apart(p)]
    for p in apart:
        colour = look.colour or theme.faint
        panel.plot([p.nominal, p.held], [p.score] * 2, ":", color=colour, linewidth=1, alpha=0.7, zorder=2)
        panel.plot([p.nominal], [p.score], look.marker, mfc=theme.paper, mec=colour, zorder=2.5)
    return bool(apart)


def _front(panel: Any, front: Sequence[Point], axis: str, theme: Theme) -> Any:
    """Steps: what is the best that so many bytes can buy; and the series' names where they change."""
    from matplotlib.patheffects import withStroke

    colour = "#f0e442" if theme is DARK else "#e8d400"
    drawn = panel.step(
        [p.at(axis) for p in front],
        [p.score for p in front],
        where="post",
        color=colour,
        linewidth=7,
        alpha=0.5 if theme is not DARK else 0.35,
        solid_capstyle="round",
        zorder=0.5,
    )[0]
    before = None
    for p in front:
        if p.series != before and not p.full:
            panel.annotate(
                p.series,
                (p.at(axis), p.score),
                (0, -14 if p.loss else 9),
                textcoords="offset points",
                ha="center",
                fontsize=8.5,
                zorder=4,
                in_layout=False,
                path_effects=[withStroke(linewidth=2.5, foreground=theme.paper)],
            )
        before = p.series
    return drawn


def _score_axis(panel: Any, points: Sequence[Point], loss: bool) -> None:
    from matplotlib.ticker import PercentFormatter

    if loss:
        panel.set_ylabel("loss, nats per token (lower is better)")
        panel.margins(y=0.08)
        return
    top = max(p.high for p in points)
    low = min(p.low for p in points)
    panel.set_ylim(min(low, 0.0) - 0.02, max(top, 1.0) * 1.03 if top > 0.5 else top * 1.25 + 0.02)
    panel.yaxis.set_major_formatter(PercentFormatter(1, decimals=0 if top > 0.1 else 1))
    panel.set_ylabel("score (higher is better)")
