"""`modicum stereo`: depth from two images, its evaluation, and hardware that computes it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from modicum.cli.console import complain, print_json, print_table, progress_bar
from modicum.cli.options import JsonOption
from modicum.errors import InputError

if TYPE_CHECKING:
    from modicum.stereo.evaluation import Errors
    from modicum.stereo.scenes import Scene
    from modicum.stereo.settings import StereoSettings

app = typer.Typer(no_args_is_help=True, help="Depth from two images, and hardware that computes it.")

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
PathsOption = Annotated[int, typer.Option(help="8, or the 4 that hardware has.")]


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
    scale: Annotated[
        float | None,
        typer.Option(
            help="Of a true picture's numbers; by default 4 for 8 bits, 256 for 16.", show_default=False
        ),
    ] = None,
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
    if picture is not None and picture.suffix.lower() != ".png":
        raise InputError(f"--picture is {picture}: give a name in .png")
    settings = StereoSettings(
        disparities,
        CostSettings(_kind(cost), rank_window, window, limit=limit),
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
            print(f"{name:8}" + _errors_line(told[name]))


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
    from modicum.stereo.disparity_file import png, read_disparity, write_disparity, write_whole
    from modicum.stereo.evaluation import measure, visible
    from modicum.stereo.matcher import StereoMatcher

    left, right = _pair(*files)
    exact = None if truth is None else read_disparity(truth, scale)
    if exact is not None and exact.shape != left.shape:
        raise InputError(
            f"the truth is {exact.shape[1]} x {exact.shape[0]} and the left image {left.shape[1]} x "
            f"{left.shape[0]}: give that of the left image"
        )
    matcher = StereoMatcher(settings, threads)
    _tell_of_compiling()
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
        write_whole(picture, png(colours))
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
        write_whole(page, pictures.page("modicum stereo", [(files[0].name, figures)]).encode())
    return told


@app.command("evaluate")
def evaluate(
    folder: Annotated[
        Path,
        typer.Argument(
            help="A scene, a folder of scenes (Middlebury's names), or KITTI's.", metavar="FOLDER"
        ),
    ],
    cost: Annotated[
        str, typer.Option(help="Costs with commas between, or all.", metavar="COSTS")
    ] = "rank-structure",
    paths: Annotated[str, typer.Option(help="4, 8 or 4,8.")] = "8",
    disparities: Annotated[
        int | None,
        typer.Option(
            "--disparities",
            "-d",
            help="How many are tried; by default ndisp of calib.txt, else from the truth.",
            show_default=False,
        ),
    ] = None,
    scale: Annotated[
        float | None,
        typer.Option(
            help="Of a true picture's numbers; by default 4 for 8 bits, 256 for 16.", show_default=False
        ),
    ] = None,
    fill: Annotated[bool, typer.Option(help="Fill pixels that failed a check.")] = True,
    threads: Annotated[int, typer.Option(help="That work at once, 1 to 8.")] = 1,
    page: Annotated[
        Path | None, typer.Option(help="An HTML page of disparities and errors.", metavar="FILE.html")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Errors on scenes with true disparities: bad-1.0, bad-2.0, KITTI's D1, mean error in pixels."""
    from modicum.stereo.cost import COSTS
    from modicum.stereo.scenes import find_scenes

    kinds = COSTS if cost == "all" else tuple(_kind(name) for name in cost.split(",") if name)
    counts = [int(text) if text.strip() in ("4", "8") else 0 for text in paths.split(",")]
    if not kinds or not counts or 0 in counts:
        raise InputError(f"--cost is {cost!r} and --paths {paths!r}: give names of costs, and 4, 8 or 4,8")
    scenes = find_scenes(folder)
    rows: list[dict[str, Any]] = []
    sections = []
    wanted = [(kind, n) for kind in kinds for n in counts]
    options = disparities, scale, fill, threads
    with progress_bar() as tell:
        for done, scene in enumerate(scenes):
            tell(scene.name, done, len(scenes))
            sections.append((scene.name, _evaluate(scene, wanted, rows, options)))
    if page is not None:
        from modicum.stereo import pictures
        from modicum.stereo.disparity_file import write_whole

        write_whole(page, pictures.page(f"modicum stereo: {folder.name}", sections).encode())
    if as_json:
        print_json(rows)
        return
    names = ("bad_1", "d1" if scenes[0].is_kitti else "bad_2")
    shown = [
        [
            row["scene"],
            row["cost"],
            str(row["paths"]),
            *(" / ".join(f"{100 * row[part][n]:.1f}" for part in ("visible", "all")) for n in names),
            " / ".join(f"{row[part]['mean'] or 0:.2f}" for part in ("visible", "all")),
        ]
        for row in rows
    ]
    second = "D1" if scenes[0].is_kitti else "bad-2"
    print_table(["scene", "cost", "paths", "bad-1", second, "mean error"], shown)
    print(f"visible / all pixels: bad-1 and {second} in percent, the mean error in pixels")


def _evaluate(
    scene: Scene,
    wanted: list[tuple[Any, int]],
    rows: list[dict[str, Any]],
    options: tuple[int | None, float | None, bool, int],
) -> list[Any]:
    """Rows of a scene, and figures of its page."""
    import numpy as np

    from modicum.stereo import pictures
    from modicum.stereo.cost import CostSettings
    from modicum.stereo.evaluation import measure
    from modicum.stereo.matcher import StereoMatcher
    from modicum.stereo.settings import PathSettings, RefineSettings, StereoSettings

    disparities, scale, fill, threads = options
    left, right = _pair(scene.left, scene.right)
    truth, shown = scene.read_truth(scale)
    largest = float(np.nanmax(truth)) if np.isfinite(truth).any() else 1.0
    figures = [
        pictures.Figure(left, "left"),
        pictures.Figure(pictures.disparity_picture(truth, largest), "truth"),
    ]
    for kind, paths in wanted:
        settings = StereoSettings(
            scene.disparities(truth) if disparities is None else disparities,
            CostSettings(kind),
            PathSettings(paths),
            RefineSettings(fill=fill),
        )
        matcher = StereoMatcher(settings, threads)
        _tell_of_compiling()
        found = matcher.match(left, right).pixels
        errors: dict[str, Errors] = {"all": measure(found, truth), "visible": measure(found, truth, shown)}
        told = {part: one.to_dict() for part, one in errors.items()}
        rows.append(
            {"scene": scene.name, "cost": kind, "paths": paths, "disparities": settings.disparities, **told}
        )
        name = f"{kind}, {paths} paths"
        figures.append(pictures.Figure(pictures.disparity_picture(found, largest), name))
        figures.append(
            pictures.Figure(
                pictures.error_picture(found, truth), f"error of {name}: bad-1 {errors['all'].bad_1:.1%}"
            )
        )
    return figures


@app.command("rtl")
def rtl(
    out: Annotated[Path, typer.Option("--out", "-o", help="Where the files go.", metavar="DIR")],
    disparities: DisparitiesOption = 64,
    width: Annotated[int, typer.Option(help="Columns of a frame.")] = 640,
    height: Annotated[int, typer.Option(help="Rows of a frame.")] = 480,
    lanes: Annotated[
        int | None,
        typer.Option(help="Disparities in a clock; by default all, one pixel a clock.", show_default=False),
    ] = None,
    cost: Annotated[
        str, typer.Option(help="rank-structure, rank-sad, rank-ad or census.")
    ] = "rank-structure",
    rank_window: RankWindowOption = 5,
    window: Annotated[int, typer.Option(help="Side of the window of rank-sad; odd.")] = 3,
    limit: LimitOption = None,
    bits: Annotated[int, typer.Option(help="Of a pixel, 1 to 16.")] = 8,
    p1: P1Option = None,
    p2: P2Option = None,
    contrast: ContrastOption = 8,
    simulate: Annotated[
        bool,
        typer.Option(
            "--simulate", help="Also run the test bench's frame in Amaranth's simulator: for small ones."
        ),
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Write a hardware core as Verilog, with a test bench that compares it with the software."""
    from modicum.stereo.cost import CostSettings
    from modicum.stereo.hardware import HardwareSettings, write_package
    from modicum.stereo.settings import PathSettings

    settings = HardwareSettings(
        width,
        height,
        disparities,
        lanes,
        CostSettings(_kind(cost), rank_window, window, limit=limit),
        bits,
        PathSettings(4, p1, p2, contrast),
    )
    if not as_json:
        complain("writing Verilog: some seconds, more with more disparities")
    files = write_package(out, settings)
    told = settings.to_dict()
    if simulate:
        told["simulated"] = _simulate(settings)
    if as_json:
        print_json({"files": [str(path) for path in files], **told})
        return
    print(
        f"{files[0]}: {width} x {height} pixels, {disparities} disparities, {settings.num_lanes} in a clock"
    )
    print(
        f"words: costs {told['cost_bits']} bits, path values {told['path_bits']}, sums {told['sum_bits']}; "
        f"{told['clocks_per_frame']:,} clocks a frame"
    )
    if simulate:
        print(f"Amaranth's simulator: {told['simulated']:,} disparities as the software has them")
    if width * height > 10_000:
        complain("simulators take long for this frame: for a check write a core of --width 64 --height 48")
    complain(
        f"simulate it: cd {out} && iverilog -g2005 -o simulation {files[0].name} testbench.v && "
        "vvp -n simulation"
    )


def _simulate(settings: Any) -> int:
    from modicum.errors import ModicumError
    from modicum.stereo.hardware import simulate
    from modicum.stereo.hardware.package import random_frame
    from modicum.stereo.matcher import match as golden

    pair = random_frame(settings)
    (found,), _ = simulate(settings, [pair])
    if not (16 * found == golden(*pair, settings.golden).fixed).all():
        raise ModicumError("the core differs from the software: report this as a defect of modicum")
    return int(found.size)


def _pair(left: Path, right: Path) -> tuple[Any, Any]:
    from modicum.stereo.images import read_image

    (one, is_coloured), (two, is_second) = (read_image(path) for path in (left, right))
    if is_coloured or is_second:
        complain(f"{left.name if is_coloured else right.name} has colours: matched as grey")
    return one, two


def _tell_of_compiling() -> None:
    """Once in a run, where numba has nothing on disk yet."""
    from modicum.stereo.compiler import is_compiled

    if not is_compiled():
        complain("compiling the kernels, once: some seconds")


def _kind(name: str) -> Any:
    from modicum.stereo.cost import COSTS

    name = name.strip()
    if name not in COSTS:
        raise InputError(f"--cost is {name!r}: give one of {', '.join(COSTS)}")
    return name


def _errors_line(row: dict[str, Any]) -> str:
    return (
        f"bad-1 {_percent(row['bad_1'])}, bad-2 {_percent(row['bad_2'])}, D1 {_percent(row['d1'])}, "
        f"mean {row['mean'] or 0:.2f} pixels"
    )


def _percent(value: float) -> str:
    return f"{100 * value:.1f} %"
