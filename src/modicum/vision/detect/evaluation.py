"""Evaluation: how well a detector finds the boxes of a data set."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor, stack

from modicum.vision.detect.detector import Detector, in_image
from modicum.vision.detect.loaded_images import Progress, TestImage
from modicum.vision.detect.mean_average_precision import (
    Truth,
    average_precision,
    coco_average_precision,
    precision_curve,
)
from modicum.vision.detect.nms import Detections, NmsSettings

_BATCH = 8


@dataclass(frozen=True)
class Evaluation:
    """What was measured.

    Attributes:
        classes: names.
        map50: mean average precision at an IoU of 0.5 (COCO's), 0 to 1.
        map: the mean over IoU 0.5 to 0.95 (COCO's).
        voc: VOC's mean average precision at 0.5, area under the curve.
        voc11: at 11 recalls.
        by_class: COCO's average precision at 0.5 of each class; nan where no image has it.
        detections: of each image, in its pixels.
        truth: of each image.
    """

    classes: tuple[str, ...]
    map50: float
    map: float
    voc: float
    voc11: float
    by_class: tuple[float, ...]
    detections: list[Detections]
    truth: list[Truth]

    def to_dict(self) -> dict[str, Any]:
        """As JSON takes it, without detections."""
        return {
            "map50": _number(self.map50),
            "map50_95": _number(self.map),
            "voc_map50": _number(self.voc),
            "voc_map50_11_points": _number(self.voc11),
            "ap50": {name: _number(value) for name, value in zip(self.classes, self.by_class, strict=True)},
            "images": len(self.truth),
            "boxes": sum(len(one.boxes) for one in self.truth),
        }


def evaluate(
    detector: Detector,
    images: Sequence[TestImage],
    settings: NmsSettings | None = None,
    progress: Progress | None = None,
) -> Evaluation:
    """Run a detector over images and compare. Detections of a score down to 0.01 count.

    Raises:
        InputError: pycocotools is not installed.
    """
    return evaluate_with(
        lambda inputs: detector.detect_inputs(inputs, settings), detector.classes, images, progress
    )


def evaluate_with(
    detect: Callable[[Tensor], list[Detections]],
    classes: tuple[str, ...],
    images: Sequence[TestImage],
    progress: Progress | None = None,
) -> Evaluation:
    """As `evaluate`, with a function from inputs [B, 3, H, W] to detections, such as onnxruntime's."""
    tell = progress or (lambda *_: None)
    found: list[Detections] = []
    for start in range(0, len(images), _BATCH):
        batch = images[start : start + _BATCH]
        for image, one in zip(batch, detect(stack([image.pixels for image in batch])), strict=True):
            found.append(in_image(one, image.letterbox, (image.annotated.height, image.annotated.width)))
        tell("detecting", len(found), len(images))
    truth = [Truth(i.annotated.boxes, i.annotated.labels, i.annotated.is_difficult) for i in images]
    coco = coco_average_precision(found, truth, len(classes))
    curves = [precision_curve(found, truth, label) for label in range(len(classes))]
    return Evaluation(
        classes,
        _mean(coco[0]),
        _mean(coco),
        _mean([average_precision(curve) for curve in curves]),
        _mean([average_precision(curve, is_11_point=True) for curve in curves]),
        tuple(float(value) for value in coco[0]),
        found,
        truth,
    )


def _number(value: float) -> float | None:
    """JSON has no NaN."""
    return None if math.isnan(value) else value


def _mean(values: Any) -> float:
    """Of those that are numbers; nan where none is."""
    kept = np.asarray(values, dtype=np.float64)
    kept = kept[~np.isnan(kept)]
    return float(kept.mean()) if kept.size else math.nan
