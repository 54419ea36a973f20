"""`modicum stereo`: depth from two images, its evaluation, and hardware that computes it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from modicum.cli.console import complain, print_json
from modicum.cli.options import JsonOption
from modicum.cli.stereo_evaluate import evaluate
from modicum.cli.stereo_options import (
    ContrastOption,
    CostOption,
    DisparitiesOption,
    LimitOption,
    P1Option,
    P2Option,
    PathsOption,
    RankWindowOption,
    ScaleOption,
    WindowOption,
    cost_kind,
    errors_line,
    read_pair,
    tell_of_compiling,
)
from modicum.cli.stereo_rtl import rtl
from modicum.errors import InputError

if TYPE_CHECKING:
    from modicum.stereo.settings import StereoSettings

app = typer.Typer(no_args_is_help=True, help="Depth from two images, and hardware that computes it.")
app.command("evaluate")(evaluate)
app.command("rtl")(rtl)


@app.command("match")
def match(
    left: Annotated[Path, typer.Argument(help="Left image of a rectified pair.", metavar="LEFT")],
    right: Annotated[Path, typer.Argument(help="Right image.", metavar="RIGHT")],
    out: Annotated[
        Path | None,
        typer.Option(
            "--out",
            "-o",
            help="Disparities: .pfm, or .png of 16 bits (256 a pixel, 0 for none).",
            metavar="FILE",
        ),
    ] = None,
    picture: Annotated[
        Path | None, typer.Option(help="A picture in colours: red is near.", metavar="FILE.png")
    ] = None,
    page: Annotated[
        Path | None, typer.Option(help="An HTML page of the images and the disparities.", metavar="FILE.html")
    ] = None,
    disparities: DisparitiesOption = 64,
    cost: CostOption = "rank-structure",
    paths: PathsOption = 8,
    rank_window: RankWindowOption = 5,
    window: WindowOption = 3,
    limit: LimitOption = None,
    p1: P1Option = None,
    p2: P2Option = None,
    contrast: ContrastOption = 8,
    uniqueness: Annotated[int, typer.Option(help="Percent by which the winner must be better.")] = 0,
    left_right: Annotated[
        int, typer.Option(help="How far the right image's match may differ; -1 for no check.")
    ] = 1,
    median: Annotated[bool, typer.Option(help="3 x 3 median.")] = True,
    fill: Annotated[bool, typer.Option("--fill", help="Fill pixels that failed a check.")] = False,
    threads: Annotated[int, typer.Option(help="That work at once, 1 to 8.")] = 1,
    truth: Annotated[
        Path | None,
        typer.Option(
            help="True disparities, .pfm, .png or .pgm: adds errors.", metavar="FILE", show_default=False
        ),
    ] = None,
    scale: ScaleOption = None,
    as_json: JsonOption = False,
) -> None:
    """Find the disparity of each pixel of the left image.

    Depth is focal length · distance of the cameras / disparity.
    """
    from modicum.stereo.cost import CostSettings
    from modicum.stereo.settings import PathSettings, RefineSettings, StereoSettings

    if out is None and picture is None and page is None:
        raise InputError("there is nothing to write: give --out, --picture or --page")
    if out is not None and out.suffix.lower() not in (".png", ".pfm"):
        raise InputError(f"--out is {out}: give a name in .pfm or .png")
    if out is not None and out.suffix.lower() == ".png" and disparities > 256:
        raise InputError(
            f"--out is {out} and there are {disparities} disparities, and a PNG holds 256: give a name in "
            ".pfm"
        )
    if picture is not None and picture.suffix.lower() != ".png":
        raise InputError(f"--picture is {picture}: give a name in .png")
    settings = StereoSettings(
        disparities,
        CostSettings(cost_kind(cost), rank_window, window, limit=limit),
        PathSettings(paths, p1, p2, contrast),
        RefineSettings(True, None if left_right < 0 else left_right, uniqueness, median, fill),
    )
    told = _match((left, right), settings, threads, truth, scale, (out, picture, page))
    if as_json:
        print_json(told)
        return
    width, height = told["size"]
    written = [str(path) for path in (out, picture, page) if path is not None]
    print(
        f"{width} x {height} pixels, {disparities} disparities: {told['density']:.1%} of the pixels have "
        f"one, median {told['median']:.1f}, in {told['seconds']:.2f} s; {', '.join(written)}"
    )
    for name in ("all", "visible"):
        if name in told:
            print(f"{name:8}" + errors_line(told[name]))


def _match(
    files: tuple[Path, Path],
    settings: StereoSettings,
    threads: int,
    truth: Path | None,
    scale: float | None,
    targets: tuple[Path | None, Path | None, Path | None],
) -> dict[str, Any]:
    import time

    import numpy as np

    from modicum.stereo import pictures
    from modicum.stereo.disparity_file import png, read_disparity, write_disparity, write_file
    from modicum.stereo.evaluation import measure, visible
    from modicum.stereo.matcher import StereoMatcher

    left, right = read_pair(*files)
    exact = None if truth is None else read_disparity(truth, scale)
    if exact is not None and exact.shape != left.shape:
        raise InputError(
            f"the truth is {exact.shape[1]} x {exact.shape[0]} and the left image {left.shape[1]} x "
            f"{left.shape[0]}: give that of the left image"
        )
    matcher = StereoMatcher(settings, threads)
    tell_of_compiling()
    started = time.perf_counter()
    found = matcher.match(left, right).pixels
    seconds = time.perf_counter() - started
    has = np.isfinite(found)
    told: dict[str, Any] = {
        "size": [left.shape[1], left.shape[0]],
        "density": float(has.mean()),
        "median": float(np.median(found[has])) if has.any() else 0.0,
        "seconds": seconds,
    }
    if left.min() == left.max() or right.min() == right.max():
        complain("warning: an image is one constant grey: its disparities mean nothing")
    if exact is not None:
        told["all"] = measure(found, exact).to_dict()
        told["visible"] = measure(found, exact, visible(exact)).to_dict()
    out, picture, page = targets
    if out is not None:
        write_disparity(out, found)
    colours = pictures.disparity_picture(found, float(np.nanmax(found)) if has.any() else 1.0)
    if picture is not None:
        write_file(picture, png(colours))
    if page is not None:
        figures = [
            pictures.Figure(left, f"left: {files[0].name}"),
            pictures.Figure(right, f"right: {files[1].name}"),
            pictures.Figure(colours, f"disparity, {settings.cost.kind}, {settings.path.paths} paths"),
        ]
        if exact is not None:
            largest = float(np.nanmax(exact))
            figures.append(pictures.Figure(pictures.disparity_picture(exact, largest), "truth"))
            figures.append(
                pictures.Figure(pictures.error_picture(found, exact), "error: white 0, red 4 pixels")
            )
        write_file(page, pictures.page("modicum stereo", [(files[0].name, figures)]).encode())
    return told
