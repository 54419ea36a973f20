"""Evaluation page: precision and recall, the worst images, sizes and speed, as HTML."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from modicum.report.page import Head, Report, Section, slug, write_page
from modicum.report.style import Picture, Theme, paint
from modicum.report.tables import Cell, Table
from modicum.vision.detect.boxes import iou
from modicum.vision.detect.cost import CostTable
from modicum.vision.detect.drawing import COLOURS
from modicum.vision.detect.evaluation import Evaluation
from modicum.vision.detect.image import open_image
from modicum.vision.detect.loaded_images import TestImage
from modicum.vision.detect.mean_average_precision import average_precision, precision_curve
from modicum.vision.detect.speed import Speed
from modicum.vision.detect.ssd_settings import SSDSettings

_WORST = 6
_SHOWN_SCORE = 0.5
"""Detections below are not drawn, and count as not found, in the worst images."""


@dataclass(frozen=True)
class PageInput:
    """What the page is of.

    Attributes:
        name: of the detector.
        settings: its record.
        evaluation: what was measured.
        images: of the evaluation, in its order.
        nbytes: of the file.
        speed: of one image.
        faults: lines about the data set.
    """

    name: str
    settings: SSDSettings
    evaluation: Evaluation
    images: Sequence[TestImage]
    nbytes: int
    speed: Speed
    faults: Sequence[str]


def write_evaluation(told: PageInput, out: str | Path) -> Report:
    """Write the page, its pictures and tables beside it.

    Raises:
        InputError: the folder does not exist or cannot be written.
    """
    evaluation, settings = told.evaluation, told.settings
    head = Head(
        "What the detector finds",
        f"{len(told.images):,} images",
        "modicum detect evaluate",
        "Average precision at an overlap (IoU) of 0.5 unless told otherwise.",
        "COCO's values are computed by pycocotools; VOC's are ours.",
        {
            "detector": [told.name],
            "backbone": [f"{settings.backbone.kind} {list(settings.backbone.blocks)}"],
            "input": [f"{settings.width} × {settings.height}"],
            "boxes": [f"{sum(len(one.boxes) for one in evaluation.truth):,}"],
        },
        list(told.faults),
    )
    return write_page(out, head, _sections(told))


def _sections(told: PageInput) -> list[Section]:
    evaluation = told.evaluation
    curves = paint(
        "precision-recall",
        "Precision against recall of each class",
        partial(draw_curves, evaluation),
    )
    worst = sorted(range(len(told.images)), key=lambda n: (-sum(mistakes(evaluation, n)), n))[:_WORST]
    pictures = [_worst_picture(told, number) for number in worst]
    return [
        Section("accuracy", "Accuracy", "", (curves,), (_accuracy(evaluation),)),
        Section("cost", "Size and speed", "One image at a time.", tables=(_cost(told),)),
        Section(
            "worst",
            "Worst images",
            f"Images with the most boxes missed or found wrongly at a score of {_SHOWN_SCORE}. Dashed: "
            "annotated; solid: found.",
            tuple(pictures),
        ),
    ]


def mistakes(evaluation: Evaluation, number: int) -> tuple[int, int]:
    """Boxes of an image that are missed, and detections that are wrong, at a score of 0.5."""
    found, true = evaluation.detections[number], evaluation.truth[number]
    shown = found.scores >= _SHOWN_SCORE
    boxes, labels = found.boxes[shown], found.labels[shown]
    free = torch.ones(len(true.boxes), dtype=torch.bool)
    wrong = 0
    overlaps = iou(boxes, true.boxes)
    for row in range(len(boxes)):
        fits = free & (true.labels == labels[row]) & (overlaps[row] >= 0.5)
        if bool(fits.any()):
            free[int(torch.where(fits, overlaps[row], -1.0).argmax())] = False
        else:
            wrong += 1
    return int((free & ~true.is_difficult).sum()), wrong


def draw_curves(evaluation: Evaluation, theme: Theme) -> Any:
    """A matplotlib Figure: precision against recall of each class."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 4.2), layout="constrained")
    panel = figure.add_subplot()
    for label, name in enumerate(evaluation.classes):
        curve = precision_curve(evaluation.detections, evaluation.truth, label)
        if curve.num_boxes:
            ap = average_precision(curve)
            panel.plot(
                curve.recall, curve.precision, color=COLOURS[label % len(COLOURS)], label=f"{name}: {ap:.3f}"
            )
    panel.set_xlim(0, 1.01)
    panel.set_ylim(0, 1.03)
    panel.set_xlabel("recall")
    panel.set_ylabel("precision")
    panel.grid(alpha=0.35, linewidth=0.6)
    if panel.lines:  # no class has a box, and there is no curve
        panel.legend(loc="lower left", frameon=False)
    return figure


def _worst_picture(told: PageInput, number: int) -> Picture:
    missed, wrong = mistakes(told.evaluation, number)
    path = told.images[number].annotated.path
    title = f"{path.name}: {missed} missed, {wrong} wrong"
    return paint(f"worst-{slug(path.stem)}", title, partial(_draw_image, told, number, title))


def _draw_image(told: PageInput, number: int, title: str, theme: Theme) -> Any:
    from matplotlib.figure import Figure
    from matplotlib.patches import Rectangle

    found, true = told.evaluation.detections[number], told.evaluation.truth[number]
    annotated = told.images[number].annotated
    image = open_image(annotated.path, (annotated.width, annotated.height))
    figure = Figure(figsize=(5.4, 0.4 + 5.4 * image.height / image.width), layout="constrained")
    panel = figure.add_subplot()
    panel.imshow(image)
    panel.set_axis_off()
    panel.set_title(title, loc="left", fontsize=9)

    def draw(box: Any, label: int, dash: str, line: float) -> None:
        x1, y1, x2, y2 = box.tolist()
        colour = COLOURS[label % len(COLOURS)]
        panel.add_patch(
            Rectangle(
                (x1, y1), x2 - x1, y2 - y1, fill=False, edgecolor=colour, linestyle=dash, linewidth=line
            )
        )

    for box, label in zip(true.boxes, true.labels.tolist(), strict=True):
        draw(box, label, "--", 1.0)
    for box, label, score in zip(found.boxes, found.labels.tolist(), found.scores.tolist(), strict=True):
        if score >= _SHOWN_SCORE:
            draw(box, label, "-", 1.6)
    return figure


def _accuracy(evaluation: Evaluation) -> Table:
    rows = [
        _row("mean average precision, IoU 0.5 (COCO)", evaluation.map50),
        _row("mean average precision, IoU 0.5 to 0.95 (COCO)", evaluation.map),
        _row("mean average precision, IoU 0.5 (VOC, area)", evaluation.voc),
        _row("mean average precision, IoU 0.5 (VOC, 11 points)", evaluation.voc11),
    ]
    for name, value in zip(evaluation.classes, evaluation.by_class, strict=True):
        rows.append(_row(f"{name}, IoU 0.5 (COCO)", value))
    return Table("accuracy", "Accuracy", ("measure", "value"), tuple(rows))


def _row(name: str, value: float) -> tuple[Cell, ...]:
    return Cell(name, name), Cell("–" if math.isnan(value) else f"{value:.3f}", value)


def _cost(told: PageInput) -> Table:
    table, channels = CostTable.of(told.settings), told.settings.channels
    cells: list[tuple[str, str, float]] = [
        ("parameters", f"{table.num_parameters(channels):,}", table.num_parameters(channels)),
        ("multiply-accumulates", f"{table.macs(channels) / 1e6:.1f} M", table.macs(channels)),
        ("file", f"{told.nbytes / 1e3:,.0f} KB", told.nbytes),
    ]
    speed = told.speed
    for name, spread in (("network", speed.network), ("with suppression", speed.detect)):
        if spread is not None:
            text = f"{1e3 * spread.median:.2f} ms ({1e3 * spread.low:.2f} to {1e3 * spread.high:.2f})"
            what = f"{name}, in {speed.runtime}, {speed.num_threads} thread(s), median and quartiles"
            cells.append((what, text, spread.median))
    rows = tuple((Cell(name, name), Cell(text, value)) for name, text, value in cells)
    return Table("cost", "Size and speed", ("what", "value"), rows)
