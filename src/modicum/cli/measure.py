"""`modicum measure`: how long each block takes on this machine, or on a device that cannot run modicum."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from modicum.cli.console import complain, print_json, print_table, progress_bar
from modicum.cli.options import JsonOption
from modicum.cli.search import (
    ChannelsOption,
    ReferenceOption,
    RuntimeOption,
    SizeOption,
    SpaceOption,
    StridesOption,
    ThreadsOption,
    reference_settings,
)
from modicum.errors import InputError

if TYPE_CHECKING:
    from modicum.measure.block_table import BlockTable
    from modicum.search.latency import LatencyCheck
    from modicum.search.space import SearchSpace


def measure(
    out: Annotated[
        Path, typer.Option("--out", "-o", help="The table, or with --onnx a folder.", metavar="PATH")
    ],
    reference: ReferenceOption = "residual",
    space: SpaceOption = "small",
    channels: ChannelsOption = "24,32,48,64",
    strides: StridesOption = "1,2,1,2",
    size: SizeOption = 32,
    classes: Annotated[int, typer.Option(help="Of the images; the head depends on it.")] = 10,
    runtime: RuntimeOption = "torch",
    threads: ThreadsOption = 1,
    batch: Annotated[int, typer.Option(help="Images of a call.")] = 1,
    check: Annotated[int, typer.Option(help="Whole networks that are measured beside; 0 for none.")] = 10,
    onnx: Annotated[
        bool, typer.Option("--onnx", help="Write each block as an ONNX file, and a list to fill in.")
    ] = False,
    times: Annotated[
        Path | None,
        typer.Option(
            help="Make the table from a list that was filled in.", metavar="FILE", show_default=False
        ),
    ] = None,
    device: Annotated[str, typer.Option(help="What the times are of, with --times.")] = "another device",
    as_json: JsonOption = False,
) -> None:
    """Measure how long each block of a search takes on this machine, and write a table for modicum search.

    Give the options that the search has. A run that is stopped goes on with the same --out. For a device that
    does not run modicum: --onnx writes the blocks, you time them there, and --times reads the list.
    """
    from modicum.measure.block_table import export_blocks, import_times, measure_blocks
    from modicum.measure.runtimes import Runtime
    from modicum.search.latency import check_latency, timed_blocks
    from modicum.search.samples import draw

    if onnx and times is not None:
        raise InputError("--onnx writes a list and --times reads one: give one of them")
    if check < 0:
        raise InputError(f"--check is {check}: give 0 or more networks")
    if times is not None:
        table = import_times(times, device)
        _check_other(table, out)
        table.save(out)
        _told(table, None, out, as_json)
        return
    settings = Runtime(runtime, threads, batch)  # type: ignore[arg-type]  # it checks the name
    searched = _space(reference, space, channels, strides, size, classes)
    blocks = timed_blocks(searched)
    if onnx:
        path = export_blocks(blocks, out, batch)
        if as_json:
            print_json({"list": str(path), "blocks": len(blocks)})
        else:
            print(f"{len(blocks)} blocks in {out}; time them, fill in {path}, and give it with --times")
        return
    with progress_bar() as progress:
        table = measure_blocks(blocks, settings, out, progress=progress)
        found = None
        if check:
            picks = draw([list(range(size)) for size in searched.sizes], check, 0)
            found = check_latency(searched, table, settings, picks)
    _told(table, found, out, as_json)


def _check_other(table: BlockTable, out: Path) -> None:
    """Refuse to write over what was measured on another device, maybe for hours."""
    from modicum.measure.block_table import BlockTable

    if not out.exists():
        return
    other = BlockTable.load(out)
    if (other.device, other.runtime) != (table.device, table.runtime):
        raise InputError(f"{out} has times of {other.device} ({other.runtime}): give another --out")


def _space(reference: str, space: str, channels: str, strides: str, size: int, classes: int) -> SearchSpace:
    import torch

    from modicum.search.space import SearchSpace
    from modicum.vision.settings import VisionSearchSettings

    if classes < 2:
        raise InputError(f"--classes is {classes}: give 2 or more")
    settings = VisionSearchSettings(
        reference=reference_settings(reference, channels, strides, size), space=space
    )
    torch.manual_seed(0)
    network = settings.reference.build(classes)
    return SearchSpace(network, settings.reference.example, settings.variants())


def _told(table: BlockTable, check: LatencyCheck | None, out: Path, as_json: bool) -> None:
    milliseconds = {key: 1000 * table[key] for key in table.seconds}
    if as_json:
        print_json(
            {
                "device": table.device,
                "runtime": table.runtime,
                "table": str(out),
                "milliseconds": milliseconds,
                "check": None
                if check is None
                else {
                    # JSON has no NaN, which it is of a single network.
                    "kendall_tau": None if math.isnan(check.kendall_tau) else check.kendall_tau,
                    "measured_to_predicted": check.ratio.median,
                    "predicted_ms": [1000 * x for x in check.predicted],
                    "measured_ms": [1000 * x for x in check.measured],
                },
            }
        )
        return
    print_table(
        ["block", "ms"],
        [[key, f"{value:.4f}"] for key, value in milliseconds.items()],
        f"{table.device}, {table.runtime}",
    )
    if check is not None:
        print(
            f"{len(check.measured)} whole networks: Kendall's tau of sum and measurement "
            f"{check.kendall_tau:.2f}; measured to sum {check.ratio.median:.2f} "
            f"({check.ratio.low:.2f} to {check.ratio.high:.2f})"
        )
    complain(f"use it as modicum search --table {out}")
