"""Non-maximum suppression: of boxes of one class that overlap, the one with the highest score stays."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from modicum.errors import InputError
from modicum.vision.detect.boxes import iou

_BLOCK = 256


@dataclass(frozen=True)
class Detections:
    """What was found in one image, by falling score."""

    boxes: Tensor
    """[N, 4] corners in pixels of the image."""
    scores: Tensor
    """[N], 0 to 1."""
    labels: Tensor
    """[N] int64: numbers of classes, from 0, background left out."""

    def __len__(self) -> int:
        return len(self.scores)


@dataclass(frozen=True)
class NmsSettings:
    """What is kept of a detector's outputs.

    Attributes:
        min_score: outputs with a lower or equal score are dropped.
        max_iou: a box that overlaps a better one of its class by more is dropped.
        max_detections: kept of an image.

    Raises:
        InputError: a value is out of range.
    """

    min_score: float = 0.01
    max_iou: float = 0.45
    max_detections: int = 100

    def __post_init__(self) -> None:
        for name in ("min_score", "max_iou"):
            if not 0 <= getattr(self, name) <= 1:
                raise InputError(f"{name} is {getattr(self, name)}: give a number from 0 to 1")
        if self.max_detections < 1:
            raise InputError(f"max_detections is {self.max_detections}: give 1 or more")


def nms(boxes: Tensor, scores: Tensor, max_iou: float, max_kept: int | None = None) -> Tensor:
    """Indices [M] int64 of the boxes that stay, by falling score; of equal scores the lower index is better.

    The same as the sequential greedy algorithm, without a loop over boxes: in blocks of falling score, those
    that overlap a kept box are dropped, and of the rest of a block a box stays if none of those that stay
    before it overlaps it. That equation has one solution; it is iterated until nothing changes, at most once
    for each box, in practice a few times.

    Args:
        boxes: [N, 4] corners.
        scores: [N].
        max_kept: stop when so many stay; None for all.
    """
    order = scores.argsort(dim=0, descending=True, stable=True)
    most = len(order) if max_kept is None else max_kept
    kept = order[:0]
    for start in range(0, len(order), _BLOCK):
        if len(kept) >= most:
            break
        block = order[start : start + _BLOCK]
        if len(kept):
            block = block[~(iou(boxes[kept], boxes[block]) > max_iou).any(0)]
        kept = torch.cat([kept, block[_stays(boxes[block], max_iou)]])
    return kept[:most]


def _stays(ranked: Tensor, max_iou: float) -> Tensor:
    """Which of boxes [N, 4] by falling score stay, [N] bool."""
    drops = (iou(ranked, ranked) > max_iou).triu(1)  # [better, worse]
    stays = torch.ones(len(ranked), dtype=torch.bool, device=ranked.device)
    while True:
        now = ~(drops & stays[:, None]).any(0)
        if torch.equal(now, stays):
            return stays
        stays = now


def batched_nms(boxes: Tensor, scores: Tensor, settings: NmsSettings) -> list[Detections]:
    """The detections of each image; classes do not suppress each other.

    Args:
        boxes: [B, A, 4] corners.
        scores: [B, A, K] of the classes, background left out.
    """
    found = []
    for image_boxes, image_scores in zip(boxes, scores, strict=True):
        kept_anchors, kept_labels = [], []
        for label in range(image_scores.shape[1]):
            places = (image_scores[:, label] > settings.min_score).nonzero()[:, 0]
            stays = nms(
                image_boxes[places], image_scores[places, label], settings.max_iou, settings.max_detections
            )
            kept_anchors.append(places[stays])
            kept_labels.append(torch.full_like(kept_anchors[-1], label))
        anchors, labels = torch.cat(kept_anchors), torch.cat(kept_labels)
        kept = image_scores[anchors, labels]
        best = kept.argsort(dim=0, descending=True, stable=True)[: settings.max_detections]
        found.append(Detections(image_boxes[anchors[best]], kept[best], labels[best]))
    return found
