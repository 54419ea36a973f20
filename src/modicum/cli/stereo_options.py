"""What the commands of `modicum stereo` share: options, reading a pair, lines of results."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from modicum.cli.console import complain
from modicum.errors import InputError

DisparitiesOption = Annotated[int, typer.Option("--disparities", "-d", help="How many are tried, from 0.")]
CostOption = Annotated[
    str,
    typer.Option(help="rank-structure, rank-sad (both after Rank SAD), rank-ad, unified, census, sad or ad."),
]
RankWindowOption = Annotated[int, typer.Option(help="Side of the neighbourhood of rank and census; odd.")]
WindowOption = Annotated[int, typer.Option(help="Side of the window of rank-sad, unified and sad; odd.")]
LimitOption = Annotated[int | None, typer.Option(help="Cut costs off at this.", show_default=False)]
P1Option = Annotated[
    int | None,
    typer.Option("--p1", help="Penalty of a change by one; by default a share of the largest cost."),
]
P2Option = Annotated[
    int | None,
    typer.Option("--p2", help="Penalty of a larger change; by default a share of the largest cost."),
]
ContrastOption = Annotated[
    int, typer.Option(help="P2 is divided by (change of intensity / this); 0 for the same P2 everywhere.")
]
ScaleOption = Annotated[
    float | None,
    typer.Option(
        help="Divides a true picture's numbers. By default 256 for 16 bits, and for 8 bits 4, a guess "
        "(Middlebury 2003 at quarter size; 2001 has 8). Needed for an 8-bit disp1 (2005, 2006): 1 full, "
        "2 half, 3 third size.",
        show_default=False,
    ),
]
PathsOption = Annotated[int, typer.Option(help="8, or the 4 that hardware has.")]


def read_pair(left: Path, right: Path) -> tuple[Any, Any]:
    from modicum.stereo.images import read_image

    (one, is_coloured), (two, is_second) = (read_image(path) for path in (left, right))
    if is_coloured or is_second:
        complain(f"{left.name if is_coloured else right.name} has colours: matched as grey")
    return one, two


def tell_of_compiling() -> None:
    """Once in a run, where numba has nothing on disk yet."""
    from modicum.stereo.compiler import is_compiled

    if not is_compiled():
        complain("compiling the kernels, once: some seconds")


def cost_kind(name: str) -> Any:
    from modicum.stereo.cost import COSTS

    name = name.strip()
    if name not in COSTS:
        raise InputError(f"--cost is {name!r}: give one of {', '.join(COSTS)}")
    return name


def errors_line(row: dict[str, Any]) -> str:
    return (
        f"bad-1 {percent(row['bad_1'])}, bad-2 {percent(row['bad_2'])}, D1 {percent(row['d1'])}, "
        f"mean {pixels(row['mean'])} pixels"
    )


def pixels(value: float | None) -> str:
    """A mean error; a dash where nothing was found."""
    return "–" if value is None else f"{value:.2f}"


def percent(value: float) -> str:
    return f"{100 * value:.1f} %"
