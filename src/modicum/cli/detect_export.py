"""`modicum detect quantize` and `export`: detectors in int8, and for onnxruntime."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from modicum.cli.console import complain, progress_bar
from modicum.errors import InputError

ModelArgument = Annotated[Path, typer.Argument(help="A detector that modicum wrote.", metavar="MODEL")]
_BATCH = 8


def quantize(
    model: ModelArgument,
    images: Annotated[Path, typer.Argument(help="A folder of images that ranges are found on.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="Where the int8 detector goes.", metavar="FILE")],
    number: Annotated[int, typer.Option(help="Images that are used, spread over the folder.")] = 32,
) -> None:
    """Store weights in int8, and round the inputs of convolutions to int8."""
    import torch

    from modicum.vision.detect.detector_file import load_detector, write_file
    from modicum.vision.detect.entry import check_new_file
    from modicum.vision.detect.image import images_in, letterboxed, open_image
    from modicum.vision.detect.quantization import quantized_bytes, quantized_detector

    check_new_file(out)
    if number < 1:
        raise InputError(f"--number is {number}: give 1 or more")
    detector = load_detector(model)
    if not images.exists():
        raise InputError(f"there is no {images}: give a folder of images")
    paths = images_in(images)
    number = min(number, len(paths))
    paths = [paths[place * len(paths) // number] for place in range(number)]
    inputs = []
    with progress_bar() as progress:
        for done, path in enumerate(paths):
            try:
                inputs.append(letterboxed(open_image(path), detector.input_size)[0])
            except InputError as error:
                complain(f"warning: {error}")
            progress("reading images", done + 1, len(paths))
    batches = [torch.stack(inputs[k : k + _BATCH]) for k in range(0, len(inputs), _BATCH)]
    data = quantized_bytes(quantized_detector(detector, batches))
    write_file(out, data)
    print(f"{model.stat().st_size / 1e3:,.0f} KB before, {len(data) / 1e3:,.0f} KB after: {out}")


def export(
    model: ModelArgument,
    out: Annotated[Path, typer.Option("--out", "-o", help="Where the .onnx file goes.", metavar="FILE")],
    min_score: Annotated[float, typer.Option(help="Of what the file gives out, 0 to 1.")] = 0.01,
) -> None:
    """Write an ONNX file, non-maximum suppression included, for onnxruntime."""
    from modicum.vision.detect.detector_file import load_detector
    from modicum.vision.detect.entry import check_new_file
    from modicum.vision.detect.nms import NmsSettings
    from modicum.vision.detect.onnx_export import export_onnx

    check_new_file(out)
    if out.suffix != ".onnx":
        raise InputError(f"--out is {out}: give a file that ends in .onnx")
    nbytes = export_onnx(load_detector(model), out, NmsSettings(min_score=min_score))
    print(f"{nbytes / 1e3:,.0f} KB: {out}")
