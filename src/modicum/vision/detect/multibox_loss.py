"""Multibox loss: classes by cross-entropy with hard negative mining, boxes by smooth L1.

SSD (arXiv 1512.02325, section 2.2):

    L = (Σ over matched and mined anchors of CE + Σ over matched anchors of smooth L1) / number matched

Mined are, in each image, the background anchors with the highest cross-entropy, `negatives` times as many as
are matched. An image without boxes has as many as for one match, so that its background is learned; the paper
is silent there.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from modicum.vision.detect.box_coding import encode_boxes
from modicum.vision.detect.matching import BACKGROUND, match_anchors


@dataclass(frozen=True)
class Targets:
    """What a batch of images should give.

    Attributes:
        labels: [B, A] int64: 0 for background, else 1 + the number of the class.
        offsets: [B, A, 4]: encoded boxes; 0 for background.
    """

    labels: Tensor
    offsets: Tensor

    @property
    def is_matched(self) -> Tensor:
        """[B, A]."""
        return self.labels > 0


def make_targets(boxes: list[Tensor], labels: list[Tensor], anchors: Tensor) -> Targets:
    """Targets of images from their boxes [G, 4] and labels [G], numbers of classes from 0."""
    all_labels, all_offsets = [], []
    for image_boxes, image_labels in zip(boxes, labels, strict=True):
        matched = match_anchors(image_boxes, anchors)
        is_matched = matched != BACKGROUND
        target = torch.zeros(len(anchors), dtype=torch.long)
        target[is_matched] = image_labels[matched[is_matched]] + 1
        offsets = torch.zeros_like(anchors)
        offsets[is_matched] = encode_boxes(image_boxes[matched[is_matched]], anchors[is_matched])
        all_labels.append(target)
        all_offsets.append(offsets)
    return Targets(torch.stack(all_labels), torch.stack(all_offsets))


def mined_anchors(logits: Tensor, targets: Targets, negatives: float = 3.0) -> Tensor:
    """Matched anchors and hard negatives, [B, A] bool."""
    with torch.no_grad():
        hardness = -logits.log_softmax(-1)[..., 0]
        hardness = hardness.masked_fill(targets.is_matched, -torch.inf)
        order = hardness.argsort(dim=1, descending=True, stable=True)
        rank = torch.empty_like(order).scatter_(
            1, order, torch.arange(order.shape[1]).expand_as(order).contiguous()
        )
        wanted = (negatives * targets.is_matched.sum(1, keepdim=True).clamp_min(1)).long()
        is_background = ~targets.is_matched
        return targets.is_matched | (is_background & (rank < wanted))


def multibox_loss(logits: Tensor, offsets: Tensor, targets: Targets, mined: Tensor | None = None) -> Tensor:
    """The loss of a batch, a scalar.

    Args:
        logits: [B, A, K + 1], background first.
        offsets: [B, A, 4].
        mined: of `mined_anchors`; None to find them.
    """
    mined = mined_anchors(logits, targets) if mined is None else mined
    count = num_matched(targets)
    classes = functional.cross_entropy(logits[mined], targets.labels[mined], reduction="sum")
    is_matched = targets.is_matched
    boxes = functional.smooth_l1_loss(offsets[is_matched], targets.offsets[is_matched], reduction="sum")
    return (classes + boxes) / count


def num_matched(targets: Targets) -> int:
    """Matched anchors of a batch, at least 1: what losses are divided by."""
    return max(1, int(targets.is_matched.sum()))
