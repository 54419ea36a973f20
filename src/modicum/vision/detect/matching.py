"""Matching: which anchors stand for which boxes in training (SSD, arXiv 1512.02325, section 2.2)."""

from __future__ import annotations

import torch
from torch import Tensor

from modicum.vision.detect.boxes import iou

BACKGROUND = -1


def match_anchors(boxes: Tensor, anchors: Tensor, threshold: float = 0.5) -> Tensor:
    """The box that each anchor stands for, [A] int64; -1 for background.

    Each box first gets an anchor of its own: of all pairs of a free box and a free anchor, the one with the
    highest overlap is taken, again and again. Then each anchor left stands for the box that it overlaps most,
    if their intersection over union is at least the threshold. Of equal overlaps the lowest box counts, and
    of those the lowest anchor. A box that overlaps no free anchor gets none.

    Args:
        boxes: [G, 4] corners.
        anchors: [A, 4] corners.
    """
    if not len(boxes):
        return torch.full((len(anchors),), BACKGROUND)
    overlaps = iou(boxes, anchors)
    best, box = overlaps.max(0)
    matched = torch.where(best >= threshold, box, BACKGROUND)
    for number, anchor in _own_anchors(overlaps):
        matched[anchor] = number
    return matched


def _own_anchors(overlaps: Tensor) -> list[tuple[int, int]]:
    """Pairs (box, anchor), of overlaps [G, A]."""
    highest, first = overlaps.max(1)
    is_any = highest > 0
    if len(set(first[is_any].tolist())) == int(is_any.sum()):  # no two boxes want the same anchor
        return [(int(box), int(first[box])) for box in is_any.nonzero()[:, 0]]
    free = overlaps.clone()
    pairs = []
    for _ in range(len(overlaps)):
        place = int(free.argmax())
        box, anchor = divmod(place, free.shape[1])
        if float(free[box, anchor]) <= 0:
            break
        pairs.append((box, anchor))
        free[box] = -1
        free[:, anchor] = -1
    return pairs
