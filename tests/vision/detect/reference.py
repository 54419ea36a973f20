"""Plain loops in Python's float64, for what the package computes with tensors."""

from __future__ import annotations

import math
from collections.abc import Sequence

Corners = Sequence[float]


def iou(a: Corners, b: Corners) -> float:
    """Intersection over union of two boxes."""
    width = min(a[2], b[2]) - max(a[0], b[0])
    height = min(a[3], b[3]) - max(a[1], b[1])
    shared = max(0.0, width) * max(0.0, height)
    areas = [max(0.0, x[2] - x[0]) * max(0.0, x[3] - x[1]) for x in (a, b)]
    union = areas[0] + areas[1] - shared
    return shared / union if union > 0 else 0.0


def nms(boxes: Sequence[Corners], scores: Sequence[float], max_iou: float) -> list[int]:
    """The sequential greedy algorithm."""
    kept: list[int] = []
    for number in sorted(range(len(boxes)), key=lambda n: (-scores[n], n)):
        if all(iou(boxes[number], boxes[other]) <= max_iou for other in kept):
            kept.append(number)
    return kept


def match(boxes: Sequence[Corners], anchors: Sequence[Corners], threshold: float) -> list[int]:
    """Each box its own anchor first, the best pair of all; then every anchor left by threshold."""
    overlaps = [[iou(box, anchor) for anchor in anchors] for box in boxes]
    matched = [-1] * len(anchors)
    for a in range(len(anchors)):
        best = max(range(len(boxes)), key=lambda b: (overlaps[b][a], -b)) if boxes else -1
        if best >= 0 and overlaps[best][a] >= threshold:
            matched[a] = best
    free_boxes, free_anchors = set(range(len(boxes))), set(range(len(anchors)))
    own: dict[int, int] = {}
    while free_boxes and free_anchors:
        pairs = [(overlaps[b][a], -b, -a) for b in free_boxes for a in free_anchors]
        best_pair = max(pairs)
        if best_pair[0] <= 0:
            break
        own[-best_pair[2]] = -best_pair[1]
        free_boxes.remove(-best_pair[1])
        free_anchors.remove(-best_pair[2])
    for anchor, box in own.items():
        matched[anchor] = box
    return matched


def encode(box: Corners, anchor: Corners) -> list[float]:
    """SSD's offsets."""
    w, h, aw, ah = box[2] - box[0], box[3] - box[1], anchor[2] - anchor[0], anchor[3] - anchor[1]
    x, y, ax, ay = box[0] + w / 2, box[1] + h / 2, anchor[0] + aw / 2, anchor[1] + ah / 2
    return [
        (x - ax) / aw / 0.1,
        (y - ay) / ah / 0.1,
        math.log(w / aw) / 0.2,
        math.log(h / ah) / 0.2,
    ]


def log_softmax(logits: Sequence[float]) -> list[float]:
    """Of one row."""
    top = max(logits)
    total = top + math.log(sum(math.exp(x - top) for x in logits))
    return [x - total for x in logits]


def mined(logits: Sequence[Sequence[float]], labels: Sequence[int], ratio: int = 3) -> set[int]:
    """Anchors of one image that count for classes."""
    positive = [a for a, label in enumerate(labels) if label > 0]
    background = [a for a, label in enumerate(labels) if label == 0]
    background.sort(key=lambda a: (log_softmax(logits[a])[0], a))
    return set(positive) | set(background[: ratio * max(1, len(positive))])


def multibox(
    logits: Sequence[Sequence[Sequence[float]]],
    offsets: Sequence[Sequence[Sequence[float]]],
    labels: Sequence[Sequence[int]],
    wanted: Sequence[Sequence[Sequence[float]]],
) -> float:
    """The loss of a batch."""
    total, count = 0.0, 0
    for image in range(len(labels)):
        for anchor in mined(logits[image], labels[image]):
            total -= log_softmax(logits[image][anchor])[labels[image][anchor]]
        for anchor, label in enumerate(labels[image]):
            if label > 0:
                count += 1
                for ours, theirs in zip(offsets[image][anchor], wanted[image][anchor], strict=True):
                    gap = abs(ours - theirs)
                    total += 0.5 * gap * gap if gap < 1 else gap - 0.5
    return total / max(1, count)
