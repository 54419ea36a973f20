"""`modicum stereo evaluate`: errors on scenes with true disparities."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from modicum.cli.console import print_json, print_table, progress_bar
from modicum.cli.options import JsonOption
from modicum.cli.stereo_options import ScaleOption, cost_kind, pixels, read_pair, tell_of_compiling
from modicum.errors import InputError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from modicum.stereo.evaluation import Errors
    from modicum.stereo.pictures import Figure
    from modicum.stereo.scenes import Scene


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
    scale: ScaleOption = None,
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

    kinds = COSTS if cost == "all" else tuple(cost_kind(name) for name in cost.split(",") if name)
    counts = [int(text) if text.strip() in ("4", "8") else 0 for text in paths.split(",")]
    if not kinds or not counts or 0 in counts:
        raise InputError(f"--cost is {cost!r} and --paths {paths!r}: give names of costs, and 4, 8 or 4,8")
    scenes = find_scenes(folder)
    rows: list[dict[str, Any]] = []
    sections = []
    wanted = [(kind, n) for kind in kinds for n in counts]
    options = disparities, scale, fill, threads
    faults: dict[str, list[str]] = {}  # what it is of, by message
    with progress_bar() as tell:
        for done, scene in enumerate(scenes):
            tell(scene.name, done, len(scenes))
            try:
                of_scene, figures, failed = _evaluate(scene, wanted, options)
            except InputError as error:
                faults.setdefault(str(error), []).append(scene.name)
                continue
            rows += of_scene
            if of_scene:
                sections.append((scene.name, figures))
            for message, names in failed.items():
                faults.setdefault(message, []).extend(f"{scene.name} ({name})" for name in names)
    told = "; ".join(f"{', '.join(names)}: {message}" for message, names in faults.items())
    if not rows:
        raise InputError(told)
    if faults:
        num_wanted = len(scenes) * len(wanted)
        warnings.warn(f"{num_wanted - len(rows)} of {num_wanted} rows left out: {told}", stacklevel=2)
    _show(rows, scenes[0].is_kitti, as_json)
    if page is not None:
        from modicum.stereo import pictures
        from modicum.stereo.disparity_file import write_file

        write_file(page, pictures.page(f"modicum stereo: {folder.name}", sections).encode())


def _show(rows: list[dict[str, Any]], is_kitti: bool, as_json: bool) -> None:
    if as_json:
        print_json(rows)
        return
    names = ("bad_1", "d1" if is_kitti else "bad_2")
    shown = [
        [
            row["scene"],
            row["cost"],
            str(row["paths"]),
            *(" / ".join(f"{100 * row[part][n]:.1f}" for part in ("visible", "all")) for n in names),
            " / ".join(pixels(row[part]["mean"]) for part in ("visible", "all")),
        ]
        for row in rows
    ]
    second = "D1" if is_kitti else "bad-2"
    print_table(["scene", "cost", "paths", "bad-1", second, "mean error"], shown)
    print(f"visible / all pixels: bad-1 and {second} in percent, the mean error in pixels")


def _evaluate(
    scene: Scene, wanted: list[tuple[Any, int]], options: tuple[int | None, float | None, bool, int]
) -> tuple[list[dict[str, Any]], list[Figure], dict[str, list[str]]]:
    """Rows of a scene, figures of its page, and which (cost, paths) failed, by message.

    Raises:
        InputError: the scene cannot be used, whatever the cost.
    """
    import numpy as np

    from modicum.stereo import pictures
    from modicum.stereo.evaluation import measure

    disparities, scale, fill, threads = options
    left, right = read_pair(scene.left, scene.right)
    truth, shown = scene.read_truth(scale)
    count = scene.disparities(truth) if disparities is None else disparities
    largest = float(np.nanmax(truth)) if np.isfinite(truth).any() else 1.0
    figures = [
        pictures.Figure(left, "left"),
        pictures.Figure(pictures.disparity_picture(truth, largest), "truth"),
    ]
    rows: list[dict[str, Any]] = []
    failed: dict[str, list[str]] = {}
    for kind, paths in wanted:
        name = f"{kind}, {paths} paths"
        try:
            found = _match((left, right), (kind, paths, count, fill), threads)
            errors: dict[str, Errors] = {
                "all": measure(found, truth),
                "visible": measure(found, truth, shown),
            }
        except InputError as error:
            failed.setdefault(str(error), []).append(name)
            continue
        told = {part: one.to_dict() for part, one in errors.items()}
        rows.append({"scene": scene.name, "cost": kind, "paths": paths, "disparities": count, **told})
        figures.append(pictures.Figure(pictures.disparity_picture(found, largest), name))
        figures.append(
            pictures.Figure(
                pictures.error_picture(found, truth), f"error of {name}: bad-1 {errors['all'].bad_1:.1%}"
            )
        )
    if not rows and len(failed) == 1:
        raise InputError(next(iter(failed)))  # all for one reason: the scene's, not a cost's
    return rows, figures, failed


def _match(
    images: tuple[NDArray[Any], NDArray[Any]], setting: tuple[Any, int, int, bool], threads: int
) -> NDArray[np.float32]:
    """Disparities of a pair in pixels, for (cost, paths, disparities, fill)."""
    from modicum.stereo.cost import CostSettings
    from modicum.stereo.matcher import StereoMatcher
    from modicum.stereo.settings import PathSettings, RefineSettings, StereoSettings

    kind, paths, disparities, fill = setting
    settings = StereoSettings(disparities, CostSettings(kind), PathSettings(paths), RefineSettings(fill=fill))
    matcher = StereoMatcher(settings, threads)
    tell_of_compiling()
    return matcher.match(*images).pixels
