"""Box coding: a box as offsets from an anchor (Liu et al. 2016, "SSD", arXiv 1512.02325, section 2.2).

With a box's centre and sides (x, y, w, h), an anchor's (X, Y, W, H), and the scales 0.1 and 0.2 that SSD's
published code calls variances:

    t = ((x - X) / (0.1 W), (y - Y) / (0.1 H), ln(w / W) / 0.2, ln(h / H) / 0.2)
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from modicum.vision.detect.boxes import to_centres, to_corners

CENTRE_SCALE, SIDE_SCALE = 0.1, 0.2
_LARGEST = math.log(1000.0)
"""Sides are at most 1,000 times the anchor's, so that an untrained network decodes to finite boxes."""


def encode_boxes(boxes: Tensor, anchors: Tensor) -> Tensor:
    """Offsets [..., 4] of boxes [..., 4] from anchors [..., 4], both as corners in pixels."""
    box, anchor = to_centres(boxes), to_centres(anchors)
    centre = (box[..., :2] - anchor[..., :2]) / anchor[..., 2:] / CENTRE_SCALE
    sides = (box[..., 2:] / anchor[..., 2:]).log() / SIDE_SCALE
    return torch.cat([centre, sides], -1)


def decode_boxes(offsets: Tensor, anchors: Tensor) -> Tensor:
    """Boxes [..., 4] as corners in pixels, from offsets [..., 4] and anchors [..., 4]."""
    anchor = to_centres(anchors)
    centre = anchor[..., :2] + CENTRE_SCALE * offsets[..., :2] * anchor[..., 2:]
    sides = anchor[..., 2:] * (SIDE_SCALE * offsets[..., 2:]).clamp_max(_LARGEST).exp()
    return to_corners(torch.cat([centre, sides], -1))
