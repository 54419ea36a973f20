"""Style: one colour and marker per series through all pictures, light and dark."""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from modicum.kv.budget import format_size
from modicum.report.points import HELD, points
from modicum.report.results import View

LABELLED = 12
"""Series with a colour of their own; the others are drawn in grey."""

# Okabe and Ito's colours, told apart by the colour-blind; black is the full cache's, yellow is lost on white.
_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
_MARKERS = ("o", "s", "^", "D", "v", "P", "X", "<", "p", ">", "*", "h")

_DASHED = (0, (4.0, 1.5))


@dataclass(frozen=True)
class Theme:
    """The colours of paper and ink."""

    name: str
    ink: str
    paper: str
    faint: str

    @property
    def settings(self) -> Any:
        """For matplotlib.rc_context."""
        return {
            "figure.facecolor": self.paper,
            "axes.facecolor": self.paper,
            "savefig.facecolor": self.paper,
            "text.color": self.ink,
            "axes.labelcolor": self.ink,
            "axes.edgecolor": self.faint,
            "xtick.color": self.ink,
            "ytick.color": self.ink,
            "grid.color": self.faint,
            "legend.labelcolor": self.ink,
            "hatch.color": self.faint,
            "font.family": "DejaVu Sans",
            "font.size": 11,
            "axes.titlesize": 12,
            "legend.fontsize": 9.5,
            "axes.spines.top": False,
            "axes.spines.right": False,
            "hatch.linewidth": 0.8,
        }


LIGHT = Theme("light", "#1f2328", "#ffffff", "#9aa2ab")
DARK = Theme("dark", "#e6e8eb", "#14171a", "#6b737c")


@dataclass(frozen=True)
class Look:
    """How a series is drawn."""

    colour: str | None
    """None: the theme's ink (full cache) or its faint grey (not labelled)."""
    marker: str
    dash: str | tuple[int, tuple[float, ...]]
    labelled: bool = True


OTHERS = Look(None, ".", ":", labelled=False)
FULL_LOOK = Look(None, "*", "--")


def looks(views: Iterable[View]) -> dict[str, Look]:
    """A look for every series: where there are too many, those that do best on average are labelled."""
    best: dict[str, float] = {}
    full: set[str] = set()
    for view in views:
        for loss in (False, True):
            for point in points(view, view.tasks(loss=loss))[0]:
                if point.full:
                    full.add(point.series)
                    continue
                score = math.exp(-point.score) if loss else point.score
                best[point.series] = max(best.get(point.series, -math.inf), score)
        for stratum in view.strata:
            if stratum.full:
                full.add(stratum.series)
            else:
                best.setdefault(stratum.series, -math.inf)
    return dress(best) | dict.fromkeys(full, FULL_LOOK)


def dress(best: Mapping[str, float]) -> dict[str, Look]:
    """A look for each name, in their order; of too many, those of the highest value are labelled."""
    chosen = sorted(best, key=lambda name: -best[name])[:LABELLED]
    made = dict.fromkeys(best, OTHERS)
    for index, name in enumerate(name for name in best if name in chosen):
        dash = "-" if index < len(_COLOURS) else _DASHED
        made[name] = Look(_COLOURS[index % len(_COLOURS)], _MARKERS[index], dash)
    return made


@dataclass(frozen=True)
class Picture:
    """A picture in two themes."""

    name: str
    """Of its file, without the ending."""
    alt: str
    """What it shows, for those who do not see it."""
    light: bytes
    dark: bytes
    width: int
    """Pixels at which it is meant to be seen."""
    axis: str = HELD


def paint(name: str, alt: str, draw: Callable[[Theme], Any], axis: str = HELD) -> Picture:
    """Draw a figure twice, and give it as PNGs."""
    made = {}
    width = 0
    for theme in (LIGHT, DARK):
        import matplotlib

        with matplotlib.rc_context(theme.settings):
            figure = draw(theme)
            width = round(figure.get_size_inches()[0] * 96)
            made[theme.name] = _png(figure)
    return Picture(name, alt, made["light"], made["dark"], width, axis)


def _png(figure: Any) -> bytes:
    """Few colours: a page holds dozens of pictures, and a palette takes a third of the bytes."""
    from PIL import Image

    raw, small = io.BytesIO(), io.BytesIO()
    figure.savefig(raw, format="png", dpi=150)
    image = Image.open(raw).convert("RGB")
    image.quantize(256, method=Image.Quantize.MEDIANCUT, dither=Image.Dither.NONE).save(
        small, format="PNG", compress_level=9
    )
    return small.getvalue()


def legend(figure: Any, entries: Mapping[str, Any]) -> int:
    """Names below a figure, in as many columns as they leave room for; the number of lines."""
    longest = max(map(len, entries))
    columns = 1 if longest > 44 else 2 if longest > 22 or len(entries) <= 4 else 3
    figure.legend(
        entries.values(),
        entries.keys(),
        loc="outside lower center",
        ncols=columns,
        frameon=False,
        handlelength=2.6,
        columnspacing=1.4,
    )
    return math.ceil(len(entries) / columns)


def byte_axis(axis: Any, values: Sequence[float], label: str) -> None:
    """A logarithmic x-axis in bytes, with ticks at sizes that people say."""
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

    low, high = min(values), max(values)
    pad = max((high / low) ** 0.06, 1.08)
    axis.set_xscale("log", base=2)
    axis.set_xlim(low / pad, high * pad)
    axis.xaxis.set_major_locator(FixedLocator(_ticks(low / pad, high * pad)))
    axis.xaxis.set_minor_locator(NullLocator())
    axis.xaxis.set_major_formatter(FuncFormatter(lambda x, _: format_size(int(x)).replace(".0 ", " ")))
    axis.set_xlabel(label)


def _ticks(low: float, high: float) -> list[float]:
    """Three to six: powers of two, or round numbers of KiB, MiB, ... where the range is narrow."""
    for step in (4.0, 2.0, 1.0):
        ticks = [2**k for k in _steps(math.log2(low), math.log2(high), step)]
        if 3 <= len(ticks) <= 6:
            return ticks
    unit = 1024 ** max(0, math.floor(math.log(low, 1024)))
    step = unit * 10 ** math.floor(math.log10((high - low) / unit))
    for factor in (5, 2, 1, 0.5, 0.2):
        ticks = _steps(low, high, step * factor)
        if 3 <= len(ticks) <= 6:
            return ticks
    return [low, high]


def _steps(low: float, high: float, step: float) -> list[float]:
    return [k * step for k in range(math.ceil(low / step), math.floor(high / step) + 1)]
