"""`modicum speech quantize`: a recognizer in int8."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from modicum.cli.console import complain, print_json, progress_bar
from modicum.cli.options import JsonOption


def quantize(
    model: Annotated[
        Path, typer.Argument(help="The recognizer: a convdfsmn or wav2letter model.", metavar="MODEL")
    ],
    manifest: Annotated[
        Path,
        typer.Argument(
            help="What it was trained on: a folder of audio with transcripts, a .jsonl manifest, or lines "
            "file<TAB>text.",
            metavar="MANIFEST",
        ),
    ],
    out: Annotated[
        Path, typer.Option("--out", "-o", help="Where the int8 recognizer goes.", metavar="FOLDER")
    ],
    scheme: Annotated[
        str,
        typer.Option(help="direct, or int8 Winograd: rsq, limited, or tapwise (no kernel, slow)."),
    ] = "rsq",
    epochs: Annotated[int, typer.Option(help="Of training with fake quantisation; 0 for none.")] = 2,
    rate: Annotated[float, typer.Option(help="The highest learning rate.")] = 3e-4,
    batch_seconds: Annotated[float, typer.Option(help="Seconds of audio in a step.")] = 30.0,
    noise_weight: Annotated[float, typer.Option(help="μ, of the layers' noise in the loss.")] = 0.1,
    distillation_weight: Annotated[
        float, typer.Option(help="κ, of the divergence from the float model in the loss.")
    ] = 1.0,
    spec_augment: Annotated[bool, typer.Option(help="Mask bands of the features in training.")] = True,
    oracle: Annotated[
        bool, typer.Option(help="Use Winograd only in layers where it is faster on this machine.")
    ] = True,
    calibration: Annotated[int, typer.Option(help="Utterances that set the ranges.")] = 32,
    features: Annotated[
        Path | None,
        typer.Option(help="Compute features here and keep them for other runs.", metavar="FOLDER"),
    ] = None,
    seed: Annotated[int, typer.Option(help="Of order and masks.")] = 0,
    as_json: JsonOption = False,
) -> None:
    """Turn a recognizer into int8, and train it to lose little by that.

    A run that is stopped goes on if it is started again with the same --out.
    """
    from modicum.kv.budget import format_size
    from modicum.quant.loss import RSQLossSettings
    from modicum.speech.quantization import QuantizationSettings, layer_lines
    from modicum.speech.quantize_entry import quantize_recognizer

    settings = QuantizationSettings(
        scheme=scheme,
        epochs=epochs,
        learning_rate=rate,
        batch_seconds=batch_seconds,
        spec_augment=spec_augment,
        loss=RSQLossSettings(noise_weight, distillation_weight),
        use_oracle=oracle and scheme != "direct",
        num_calibration=calibration,
        seed=seed,
    )
    with progress_bar() as progress:
        report = quantize_recognizer(model, manifest, out, settings, features, progress)
    if as_json:
        print_json(report.to_dict())
        return
    for line in layer_lines(report.result.recognizer):
        print(line)
    losses = report.result.losses
    if losses:
        print(
            f"{report.num_utterances:,} utterances, {len(losses):,} steps in {report.result.seconds:.0f} s; "
            f"loss {losses[0]:.3f} at the first, {losses[-1]:.3f} at the last"
        )
    print(f"{format_size(report.float_nbytes)} before, {format_size(report.nbytes)} now: {out}")
    complain(f"use it as --model {out}")
