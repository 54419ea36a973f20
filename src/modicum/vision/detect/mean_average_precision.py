"""Mean average precision, as COCO and as Pascal VOC compute it.

COCO's is computed by pycocotools: precision at 101 recalls, averaged, at an intersection over union of 0.5,
and as the mean over 0.5, 0.55, … 0.95. VOC's is ours: at 0.5, as the area under the interpolated curve (since
2010) or as the mean at 11 recalls (until 2009; Everingham et al. 2010, section 4.2). Difficult boxes count
neither as found nor as missed.
"""

from __future__ import annotations

import contextlib
import io
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from modicum.packages import import_package
from modicum.vision.detect.boxes import iou
from modicum.vision.detect.nms import Detections

RECALLS_11 = [number / 10 for number in range(11)]


@dataclass(frozen=True)
class Truth:
    """The boxes of an image: [G, 4], labels [G], and which are difficult [G]."""

    boxes: Tensor
    labels: Tensor
    is_difficult: Tensor


@dataclass(frozen=True)
class Curve:
    """Precision and recall of a class at one IoU, by falling score, both [N]."""

    recall: Tensor
    precision: Tensor
    scores: Tensor
    num_boxes: int


def precision_curve(
    found: Sequence[Detections], truth: Sequence[Truth], label: int, min_iou: float = 0.5
) -> Curve:
    """The curve of a class over images, after the VOC devkit.

    Each detection, by falling score over all images, is compared with the box of its class and image that it
    overlaps most. It is right if they overlap by at least min_iou and no earlier one took that box; it is
    left out if that box is difficult.
    """
    scores, is_right, counts = [], [], []
    num_boxes = 0
    for one, true in zip(found, truth, strict=True):
        of_class = true.labels == label
        boxes, difficult = true.boxes[of_class], true.is_difficult[of_class]
        num_boxes += int((~difficult).sum())
        mine = (one.labels == label).nonzero()[:, 0]
        mine = mine[one.scores[mine].argsort(dim=0, descending=True, stable=True)]
        overlaps = iou(one.boxes[mine].double(), boxes.double())
        taken: set[int] = set()
        for row, place in enumerate(mine.tolist()):
            best = int(overlaps[row].argmax()) if len(boxes) else -1
            is_hit = best >= 0 and float(overlaps[row, best]) >= min_iou
            scores.append(float(one.scores[place]))
            counts.append(not (is_hit and bool(difficult[best])))
            is_right.append(is_hit and best not in taken)
            if is_hit:
                taken.add(best)
    order = sorted(range(len(scores)), key=lambda number: -scores[number])
    order = [number for number in order if counts[number]]
    hits = torch.tensor([is_right[number] for number in order], dtype=torch.float64).cumsum(0)
    ranks = torch.arange(1, len(order) + 1, dtype=torch.float64)
    ranked = torch.tensor([scores[number] for number in order], dtype=torch.float64)
    recall = hits / num_boxes if num_boxes else torch.full_like(hits, math.nan)
    return Curve(recall, hits / ranks, ranked, num_boxes)


def average_precision(curve: Curve, is_11_point: bool = False) -> float:
    """Of a class; nan where no image has it.

    The interpolated precision at a recall is the highest at that recall or above.
    """
    if not curve.num_boxes:
        return math.nan
    if is_11_point:
        best = [
            float(curve.precision[curve.recall >= recall - 1e-12].max())
            if bool((curve.recall >= recall - 1e-12).any())
            else 0.0
            for recall in RECALLS_11
        ]
        return sum(best) / len(best)
    if not len(curve.precision):
        return 0.0
    ceiling = curve.precision.flip(0).cummax(0).values.flip(0)
    steps = torch.diff(curve.recall, prepend=torch.zeros(1, dtype=torch.float64))
    return float((steps * ceiling).sum())


def coco_average_precision(
    found: Sequence[Detections], truth: Sequence[Truth], num_classes: int, max_detections: int = 100
) -> np.ndarray[Any, np.dtype[np.float64]]:
    """By pycocotools: [10, K], at each IoU from 0.5 to 0.95 and of each class; nan where no image has it.

    Raises:
        InputError: pycocotools is not installed.
    """
    coco_module, eval_module = (
        import_package("pycocotools.coco", "detect"),
        import_package("pycocotools.cocoeval", "detect"),
    )
    images = [{"id": number} for number in range(len(truth))]
    annotations: list[dict[str, Any]] = []
    for number, true in enumerate(truth):
        for box, label, difficult in zip(true.boxes, true.labels, true.is_difficult, strict=True):
            x1, y1, x2, y2 = box.double().tolist()
            # Numbers begin at 1: pycocotools takes 0 for no match.
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": number,
                    "category_id": int(label),
                    "bbox": [x1, y1, x2 - x1, y2 - y1],
                    "area": (x2 - x1) * (y2 - y1),
                    "iscrowd": int(difficult),
                }
            )
    rows = [
        [number, x1, y1, x2 - x1, y2 - y1, score, label]
        for number, one in enumerate(found)
        for (x1, y1, x2, y2), score, label in zip(
            one.boxes.double().tolist(), one.scores.tolist(), one.labels.tolist(), strict=True
        )
    ]
    with contextlib.redirect_stdout(io.StringIO()):
        coco = coco_module.COCO()
        categories = [{"id": label} for label in range(num_classes)]
        coco.dataset = {"images": images, "annotations": annotations, "categories": categories}
        coco.createIndex()
        if not rows:
            has_boxes = [any(a["category_id"] == label for a in annotations) for label in range(num_classes)]
            return np.tile([0.0 if has else math.nan for has in has_boxes], (10, 1))
        evaluation = eval_module.COCOeval(coco, coco.loadRes(np.array(rows)), "bbox")
        evaluation.params.maxDets = [1, 10, max_detections]
        evaluation.evaluate()
        evaluation.accumulate()
    precision = evaluation.eval["precision"][:, :, :, 0, 2]  # [IoU, recall, class]
    mean: np.ndarray[Any, np.dtype[np.float64]] = precision.mean(1)
    return np.where(mean < 0, math.nan, mean)
