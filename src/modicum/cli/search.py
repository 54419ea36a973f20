"""`modicum search`: networks for a folder of images that fit a device."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from modicum.cli.console import complain, options_named, print_json, print_table, progress_bar
from modicum.cli.options import JsonOption

if TYPE_CHECKING:
    from modicum.vision.reference import ReferenceSettings
    from modicum.vision.report import SearchReport

ReferenceOption = Annotated[
    str, typer.Option(help="Network that is searched around: residual, mobilenetv2 or vit.")
]
SpaceOption = Annotated[str, typer.Option(help="Variants of each block: tiny, small, medium or full.")]
ChannelsOption = Annotated[str, typer.Option(help="Of each block's output; of a vit the width of a token.")]
StridesOption = Annotated[str, typer.Option(help="Of each block, which divide height and width.")]
SizeOption = Annotated[int, typer.Option(help="Side of the images in pixels.")]
RuntimeOption = Annotated[
    str, typer.Option(help="What runs the blocks: torch, onnxruntime or onnxruntime-int8.")
]
ThreadsOption = Annotated[int, typer.Option(help="Of a call.")]

_OPTIONS = {
    "variants_per_block": "--variants",
    "sample_epochs": "--sample-epochs",
    "winner_epochs": "--winner-epochs",
    "winners": "--winners",
}


def search(
    images: Annotated[
        Path, typer.Argument(help="A folder or zip file with a folder of images for each class.")
    ],
    out: Annotated[Path, typer.Option("--out", "-o", help="Where all goes.", metavar="FOLDER")],
    test: Annotated[
        Path | None,
        typer.Option(
            help="Images for the end; by default a share of the others.",
            metavar="PATH",
            show_default=False,
        ),
    ] = None,
    table: Annotated[
        Path | None,
        typer.Option(
            help="Block times of another device, from modicum measure.", metavar="FILE", show_default=False
        ),
    ] = None,
    reference: ReferenceOption = "residual",
    space: SpaceOption = "small",
    channels: ChannelsOption = "24,32,48,64",
    strides: StridesOption = "1,2,1,2",
    size: SizeOption = 32,
    epochs: Annotated[int, typer.Option(help="Of the reference.")] = 20,
    block_epochs: Annotated[int, typer.Option(help="Of a variant of a block.")] = 1,
    variants: Annotated[
        int | None,
        typer.Option(
            help="Of each block that are trained; others are predicted. By default all.", show_default=False
        ),
    ] = None,
    samples: Annotated[int, typer.Option(help="Networks finetuned for the predictor.")] = 20,
    sample_epochs: Annotated[int, typer.Option(help="Of each of them.")] = 2,
    winners: Annotated[int, typer.Option(help="Networks of the front that are finetuned.")] = 3,
    winner_epochs: Annotated[int, typer.Option(help="Of each of them.")] = 10,
    method: Annotated[str, typer.Option(help="milp for the exact front, nsga2 for evolution.")] = "milp",
    most_images: Annotated[
        int | None, typer.Option(help="Of a class at most; by default all.", show_default=False)
    ] = None,
    runtime: RuntimeOption = "torch",
    threads: ThreadsOption = 1,
    seed: Annotated[int, typer.Option(help="Of splits, weights and draws.")] = 0,
    as_json: JsonOption = False,
) -> None:
    """Search networks for images: accurate for the time that they take on a device.

    Trains a reference, then each variant of each of its blocks in isolation, then a few whole networks, from
    which it predicts all others. A run that is stopped goes on if it is started again with the same --out.
    """
    from modicum.measure.runtimes import Runtime
    from modicum.search.blockwise import BlockwiseSettings
    from modicum.vision.recipe import ImageRecipe
    from modicum.vision.search import search as run
    from modicum.vision.search_images import SearchImages
    from modicum.vision.settings import VisionSearchSettings

    with options_named(_OPTIONS):
        settings = VisionSearchSettings(
            reference=reference_settings(reference, channels, strides, size),
            recipe=ImageRecipe(epochs=epochs, seed=seed),
            space=space,
            variants_per_block=variants,
            blockwise=BlockwiseSettings(epochs=block_epochs, seed=seed),
            samples=samples,
            sample_epochs=sample_epochs,
            winners=winners,
            winner_epochs=winner_epochs,
            method=method,  # type: ignore[arg-type]  # the settings check it
            runtime=Runtime(runtime, threads),  # type: ignore[arg-type]  # likewise
            table=table,
            most_images=most_images,
            seed=seed,
        )
    with progress_bar() as progress:
        loaded = SearchImages.load(images, settings, test, progress)
        for name, reason in list(loaded.unreadable.items())[:10]:
            complain(f"warning: {name} is left out ({reason})")
        if len(loaded.unreadable) > 10:
            complain(f"warning: {len(loaded.unreadable) - 10} more images are left out; see search.json")
        report = run(loaded, out, settings, progress=progress)
    if as_json:
        print_json(report.to_dict())
        return
    _summary(report, out)


def reference_settings(reference: str, channels: str, strides: str, size: int) -> ReferenceSettings:
    """The settings of a reference from its options."""
    from modicum.errors import InputError
    from modicum.vision.reference import ReferenceSettings

    try:
        widths, steps = ([int(x) for x in text.split(",")] for text in (channels, strides))
    except ValueError:
        raise InputError(
            f"channels are {channels!r} and strides {strides!r}: give whole numbers with commas between"
        ) from None
    if reference == "vit":
        # 8 patches by 8.
        patch = max(1, size // 8)
        return ReferenceSettings(
            "vit", (widths[0],) * len(widths), (1,) * len(widths), stem_stride=patch, size=size
        )
    settings = ReferenceSettings(channels=tuple(widths), strides=tuple(steps), size=size)
    return replace(settings, kind=reference)  # type: ignore[arg-type]  # the settings check it


def _summary(report: SearchReport, out: Path) -> None:
    train, validation, test = report.images
    print(
        f"{train:,} images to learn from, {validation:,} to compare with, {test:,} to test on; "
        f"{len(report.classes)} classes; {report.num_networks:,} networks"
    )
    if report.failed_variants:
        complain(f"warning: dropped, as training failed: {', '.join(report.failed_variants)}")
    print(
        f"predictor: Kendall's tau {report.kendall_tau:.2f}, error {100 * report.error:.1f} points, with "
        f"each sample left out; the plain sum of block errors {report.kendall_tau_sum:.2f}"
    )
    rows = []
    for name, one in (("reference", report.reference), *((one.folder or "", one) for one in report.front)):
        told = "" if one.milliseconds is None else f"{one.milliseconds:.3f}"
        measured = [f"{100 * x:.1f} %" if x is not None else "" for x in (one.validation, one.test)]
        rows.append(
            [
                name,
                told,
                f"{one.parameters:,}",
                f"{one.macs / 1e6:.2f} M",
                f"{100 * one.predicted:.1f} %",
                *measured,
            ]
        )
    print_table(
        ["saved in", "ms", "parameters", "MACs", "predicted", "validation", "test"],
        rows,
        f"{report.device}, {report.runtime}",
    )
    complain(f"picture: {out / 'front.png'}; blocks of each network: {out / 'search.json'}")
