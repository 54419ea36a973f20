"""`modicum detect`: detectors that are trained, pruned to a budget, evaluated and used."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from modicum.cli.console import complain, options_named, print_json, progress_bar
from modicum.cli.detect_export import export, quantize
from modicum.cli.detect_use import evaluate, run
from modicum.cli.options import JsonOption
from modicum.errors import InputError

if TYPE_CHECKING:
    from modicum.vision.detect.dataset import Faults
    from modicum.vision.detect.entry import DetectorSummary
    from modicum.vision.detect.pruning.budget import Budget

app = typer.Typer(no_args_is_help=True, help="Train, prune, evaluate and use small object detectors.")
app.command("evaluate")(evaluate)
app.command("run")(run)
app.command("export")(export)
app.command("quantize")(quantize)

DataArgument = Annotated[
    Path, typer.Argument(help="A folder in Pascal VOC's layout, or a COCO .json file.", metavar="DATA")
]
SplitOption = Annotated[
    str | None,
    typer.Option(
        help="A file of VOC's ImageSets/Main, such as trainval; by default all.", show_default=False
    ),
]
SkipOption = Annotated[
    bool, typer.Option("--skip-unknown", help="Skip boxes of classes that the detector does not know.")
]
OutOption = Annotated[Path, typer.Option("--out", "-o", help="Where the detector goes.", metavar="FILE")]
_OPTIONS = {
    "learning_rate": "--rate",
    "max_ratio": "--max-ratio",
    "branch_factor": "--branch-factor",
    "width factor": "--width",
}


@app.command("train")
def train(
    data: DataArgument,
    out: OutOption,
    split: SplitOption = None,
    backbone: Annotated[
        str, typer.Option("--model", "-m", help="resnet14, resnet26, resnet50 or mobilenet.")
    ] = "resnet26",
    width: Annotated[float, typer.Option(help="Share of the usual channels.")] = 0.25,
    size: Annotated[
        str, typer.Option(help="Width and height of the input in pixels, multiples of 32.")
    ] = "256x192",
    epochs: Annotated[int, typer.Option(help="How often each image is seen.")] = 40,
    rate: Annotated[
        float, typer.Option(help="The highest learning rate; 0.032 is better for mobilenet.")
    ] = 8e-3,
    batch: Annotated[int, typer.Option(help="Images of a step.")] = 8,
    flip_y: Annotated[bool, typer.Option(help="Mirror images from top to bottom, too.")] = True,
    teacher: Annotated[
        Path | None,
        typer.Option(help="A detector of the same classes and input to learn from.", metavar="FILE"),
    ] = None,
    seed: Annotated[int, typer.Option(help="Of weights, order and augmentation.")] = 0,
    as_json: JsonOption = False,
) -> None:
    """Train a detector on images with boxes.

    A run that is stopped goes on if it is started again with the same --out.
    """
    with options_named(_OPTIONS):
        from modicum.vision.detect.augment import AugmentSettings
        from modicum.vision.detect.detector_file import load_detector
        from modicum.vision.detect.entry import check_new_file, train_detector
        from modicum.vision.detect.read_dataset import read_dataset
        from modicum.vision.detect.recipe import Recipe
        from modicum.vision.detect.ssd_settings import SSDSettings

        check_new_file(out)
        recipe = Recipe(epochs, batch, rate, augment=AugmentSettings(flip_y=flip_y), seed=seed)
        SSDSettings.of(("object",), backbone, width, _size(size))  # before the data takes its time
        found = read_dataset(data, split)
        tell_faults(found.faults)  # before the training, which may take long
        settings = SSDSettings.of(found.classes, backbone, width, _size(size))
        guide = None if teacher is None else load_detector(teacher)
        with progress_bar() as progress:
            summary = train_detector(found, settings, recipe, out, teacher=guide, progress=progress)
    if as_json:
        print_json({**summary.to_dict(), "classes": found.classes, "faults": vars(found.faults)})
        return
    print(f"{len(found):,} annotated images, {found.num_boxes:,} boxes of {', '.join(found.classes)}")
    _tell(summary, out)


@app.command("prune")
def prune(
    model: Annotated[Path, typer.Argument(help="A detector that modicum trained.", metavar="MODEL")],
    data: DataArgument,
    out: OutOption,
    split: SplitOption = None,
    macs: Annotated[
        str | None,
        typer.Option(help="Budget of multiply-accumulates, such as 60M or 25%.", show_default=False),
    ] = None,
    nbytes: Annotated[
        str | None,
        typer.Option("--bytes", help="Budget of the file, such as 500KB or 20%.", show_default=False),
    ] = None,
    latency: Annotated[
        str | None,
        typer.Option(help="Budget of one image's time here, such as 4ms or 40%.", show_default=False),
    ] = None,
    score: Annotated[str, typer.Option(help="Which channels go first: magnitude, taylor or bn.")] = "taylor",
    allocator: Annotated[
        str, typer.Option(help="How many of each layer: greedy by scores, or knapsack by sensitivity.")
    ] = "greedy",
    steps: Annotated[int, typer.Option(help="How often it is cut, with training between.")] = 4,
    max_ratio: Annotated[float, typer.Option(help="Of a layer's channels that may go in all.")] = 0.8,
    branch_factor: Annotated[
        float, typer.Option(help="Share of the channels of extra layers and heads that stay.")
    ] = 0.5,
    guidance: Annotated[bool, typer.Option(help="Learn from the unpruned detector.")] = True,
    step_epochs: Annotated[int, typer.Option(help="Of the training between cuts.")] = 2,
    epochs: Annotated[int, typer.Option(help="Of the training at the end.")] = 20,
    rate: Annotated[float, typer.Option(help="The highest learning rate.")] = 4e-3,
    batch: Annotated[int, typer.Option(help="Images of a step.")] = 8,
    flip_y: Annotated[bool, typer.Option(help="Mirror images from top to bottom, too.")] = True,
    skip_unknown: SkipOption = False,
    seed: Annotated[int, typer.Option(help="Of order and augmentation.")] = 0,
    as_json: JsonOption = False,
) -> None:
    """Prune a detector to a budget of multiply-accumulates, bytes or time, and train what is left.

    A run that is stopped goes on if it is started again with the same --out.
    """
    with options_named(_OPTIONS):
        from modicum.vision.detect.augment import AugmentSettings
        from modicum.vision.detect.detector_file import load_detector
        from modicum.vision.detect.entry import check_new_file, prune_detector
        from modicum.vision.detect.guidance import GuidanceSettings
        from modicum.vision.detect.pruning.budget import CostModel
        from modicum.vision.detect.pruning.channel_scores import check_score
        from modicum.vision.detect.pruning.prune import PruneSettings
        from modicum.vision.detect.read_dataset import read_dataset
        from modicum.vision.detect.recipe import Recipe

        check_new_file(out)
        augment = AugmentSettings(flip_y=flip_y)
        settings = PruneSettings(
            budget=_budget(macs, nbytes, latency),
            score=check_score(score),
            allocator=allocator,  # type: ignore[arg-type]  # checked by the settings
            steps=steps,
            max_ratio=max_ratio,
            branch_factor=branch_factor,
            step_recipe=Recipe(step_epochs, batch, rate, augment=augment, seed=seed + 1),
            recipe=Recipe(epochs, batch, rate, augment=augment, seed=seed),
            guidance=GuidanceSettings() if guidance else None,
        )
        given = load_detector(model)
        found = read_dataset(data, split, given.classes, skip_unknown)
        tell_faults(found.faults)
        with progress_bar() as progress:
            result, summary = prune_detector(model, found, settings, out, progress)
    after = result.detector.network.settings
    costs = CostModel(after, settings.budget.resource)
    if as_json:
        told = {"before": result.before, "limit": result.limit, "after": result.after}
        channels = {"channels_before": result.channels_before, "channels": dict(after.channels)}
        print_json({**summary.to_dict(), "budget": told, **channels, "faults": vars(found.faults)})
        return
    print(
        f"{costs.describe(result.before)} before, {costs.describe(result.after)} after; the budget is "
        f"{costs.describe(result.limit)}"
    )
    _tell(summary, out)


def tell_faults(faults: Faults) -> None:
    """What was wrong with a data set, on stderr."""
    for line in faults.lines():
        complain(f"warning: {line}")


def _tell(summary: DetectorSummary, out: Path) -> None:
    print(
        f"{summary.parameters:,} parameters, {summary.macs / 1e6:.1f} M MACs, {summary.nbytes / 1e3:,.0f} KB"
        f": {out}; loss {summary.loss_first:.2f} at the first step, {summary.loss_last:.2f} at the last"
    )
    complain(f"use it as: modicum detect run {out} IMAGE")


def _size(text: str) -> tuple[int, int]:
    """Height and width, of "256x192"."""
    match = re.fullmatch(r"(\d{1,5})x(\d{1,5})", text)
    if match is None:
        raise InputError(f"--size is {text!r}: give width and height, as in 256x192")
    return int(match[2]), int(match[1])


def _budget(macs: str | None, nbytes: str | None, latency: str | None) -> Budget:
    from modicum.vision.detect.pruning.budget import Budget

    if sum(text is not None for text in (macs, nbytes, latency)) != 1:
        raise InputError("give exactly one budget: --macs, --bytes or --latency")
    if macs is not None:
        return Budget.parse("macs", macs)
    if nbytes is not None:
        return Budget.parse("bytes", nbytes)
    assert latency is not None
    return Budget.parse("latency", latency)
