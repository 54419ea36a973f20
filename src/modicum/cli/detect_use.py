"""`modicum detect evaluate` and `run`: detectors on annotated data, and on pictures."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from modicum.cli.console import complain, print_json, print_table, progress_bar
from modicum.cli.options import JsonOption
from modicum.errors import InputError

if TYPE_CHECKING:
    from modicum.vision.detect.detector import Detector
    from modicum.vision.detect.evaluation import Evaluation
    from modicum.vision.detect.onnx_detector import OnnxDetector

ModelArgument = Annotated[
    Path,
    typer.Argument(help="A detector that modicum wrote; .onnx runs in onnxruntime.", metavar="MODEL"),
]


def evaluate(
    model: ModelArgument,
    data: Annotated[
        Path, typer.Argument(help="A folder in Pascal VOC's layout, or a COCO .json file.", metavar="DATA")
    ],
    split: Annotated[
        str | None,
        typer.Option(
            help="A file of VOC's ImageSets/Main, such as test; by default all.", show_default=False
        ),
    ] = None,
    html: Annotated[
        Path | None,
        typer.Option(
            help="Write a page with curves, worst images and speed.", metavar="FILE", show_default=False
        ),
    ] = None,
    skip_unknown: Annotated[
        bool, typer.Option("--skip-unknown", help="Skip boxes of classes that the detector does not know.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Mean average precision of a detector, as COCO and as Pascal VOC compute it."""
    from modicum.vision.detect.evaluation import evaluate_with
    from modicum.vision.detect.loaded_images import load_test_images
    from modicum.vision.detect.read_dataset import read_dataset

    if html is not None and not html.parent.is_dir():
        raise InputError(f"cannot write {html}: there is no folder {html.parent}")
    if html is not None and html.is_dir():
        raise InputError(f"cannot write {html}: it is a folder; give a file such as {html / 'page.html'}")
    detector = load_any(model)
    found = read_dataset(data, split, detector.classes, skip_unknown)
    for line in found.faults.lines():  # images that cannot be read are told of when they are
        complain(f"warning: {line}")
    with progress_bar() as progress:
        images = load_test_images(found, detector.input_size, progress)
        evaluation = evaluate_with(detector.detect_inputs, detector.classes, images, progress)
    if html is not None:
        _write_page(detector, model, evaluation, images, found.faults.lines(), html)
    if as_json:
        print_json({**evaluation.to_dict(), "faults": vars(found.faults)})
        return
    _tell(evaluation)
    if html is not None:
        complain(f"page: {html}")


def run(
    model: ModelArgument,
    images: Annotated[list[Path], typer.Argument(help="Images, or folders of them.", metavar="IMAGE…")],
    out: Annotated[
        Path | None,
        typer.Option("--out", "-o", help="Draw pictures with boxes into this folder.", metavar="FOLDER"),
    ] = None,
    min_score: Annotated[float, typer.Option(help="Of what is shown, 0 to 1.")] = 0.5,
    as_json: JsonOption = False,
) -> None:
    """Find objects in images: a line for each, and pictures with boxes in the folder of --out.

    An image that cannot be read is named on stderr, and the others are done; the exit code is then 1.
    """
    from modicum.vision.detect.detector import detection_rows
    from modicum.vision.detect.drawing import drawn, picture_path, save_picture
    from modicum.vision.detect.image import images_in, open_image
    from modicum.vision.detect.nms import NmsSettings

    settings = NmsSettings(min_score=min_score)
    detector = load_any(model)
    for path in images:
        if not path.exists():
            raise InputError(f"there is no {path}: give an image, or a folder of images")
    paths = [(path, root) for root in images for path in images_in(root)]
    if out is not None:
        _check_pictures(out, paths)
    rows: list[dict[str, Any]] = []
    num_failed = 0
    for path, root in paths:
        try:
            image = open_image(path)
        except InputError as error:
            complain(f"warning: {error}")
            num_failed += 1
            continue
        found = detector.detect(image, settings)
        row: dict[str, Any] = {"image": str(path), "detections": detection_rows(found, detector.classes)}
        if out is not None:
            target = picture_path(out, path, root)
            save_picture(drawn(image, found, detector.classes), target)
            row["picture"] = str(target)
        rows.append(row)
        if not as_json:
            print(_line(row), flush=True)
    if as_json:
        print_json(rows)
    if num_failed:
        complain(f"{num_failed:,} of {len(paths):,} images could not be read")
        raise typer.Exit(2 if num_failed == len(paths) else 1)


def _check_pictures(out: Path, paths: list[tuple[Path, Path]]) -> None:
    """That no two images have the same picture."""
    from modicum.vision.detect.drawing import picture_path

    if out.exists() and not out.is_dir():
        raise InputError(f"--out is the file {out}: give a folder")
    made: dict[Path, Path] = {}
    for path, root in paths:
        target = picture_path(out, path, root)
        if made.setdefault(target, path) != path:
            raise InputError(
                f"{made[target]} and {path} would have the same picture, {target}: run them one after the "
                "other with an --out of their own"
            )


def load_any(path: Path) -> Detector | OnnxDetector:
    """A detector of either format.

    Raises:
        InputError, ModelError: it cannot be read.
    """
    from modicum.vision.detect.detector_file import load_detector
    from modicum.vision.detect.onnx_detector import OnnxDetector

    return OnnxDetector.load(path) if path.suffix == ".onnx" else load_detector(path)


def _line(row: dict[str, Any]) -> str:
    counts: dict[str, int] = {}
    for found in row["detections"]:
        counts[found["class"]] = counts.get(found["class"], 0) + 1
    told = ", ".join(f"{count} {name}" for name, count in sorted(counts.items())) or "nothing"
    name = str(row["image"]).encode(errors="surrogateescape").decode(errors="replace")
    return f"{name}: {told}" + (f" -> {row['picture']}" if "picture" in row else "")


def _tell(evaluation: Evaluation) -> None:
    rows = [
        ["IoU 0.5 (COCO)", f"{evaluation.map50:.3f}"],
        ["IoU 0.5 to 0.95 (COCO)", f"{evaluation.map:.3f}"],
        ["IoU 0.5 (VOC, area)", f"{evaluation.voc:.3f}"],
        ["IoU 0.5 (VOC, 11 points)", f"{evaluation.voc11:.3f}"],
    ]
    for name, value in zip(evaluation.classes, evaluation.by_class, strict=True):
        rows.append([f"{name}, IoU 0.5 (COCO)", f"{value:.3f}"])
    print_table(["average precision", "value"], rows)
    boxes = sum(len(one.boxes) for one in evaluation.truth)
    print(f"{len(evaluation.truth):,} images, {boxes:,} boxes")


def _write_page(
    detector: Detector | OnnxDetector,
    path: Path,
    evaluation: Evaluation,
    images: Any,
    faults: list[str],
    html: Path,
) -> None:
    from modicum.vision.detect.detector import Detector
    from modicum.vision.detect.evaluation_page import PageInput, write_evaluation
    from modicum.vision.detect.speed import measure_speed

    settings = detector.network.settings if isinstance(detector, Detector) else detector.settings
    speed = measure_speed(detector, images[0].pixels)
    told = PageInput(path.name, settings, evaluation, images, path.stat().st_size, speed, faults)
    write_evaluation(told, html)
