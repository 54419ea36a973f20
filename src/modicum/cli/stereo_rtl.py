"""`modicum stereo rtl`: hardware as Verilog."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from modicum.cli.console import complain, print_json
from modicum.cli.options import JsonOption
from modicum.cli.stereo_options import (
    ContrastOption,
    DisparitiesOption,
    LimitOption,
    P1Option,
    P2Option,
    RankWindowOption,
    cost_kind,
)


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
        CostSettings(cost_kind(cost), rank_window, window, limit=limit),
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
