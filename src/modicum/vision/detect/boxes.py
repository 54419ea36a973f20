"""Boxes: corners x1, y1, x2, y2 in pixels, with x2 > x1 and y2 > y1; y points down."""

from __future__ import annotations

import torch
from torch import Tensor


def area(boxes: Tensor) -> Tensor:
    """Areas [...] of boxes [..., 4], in square pixels; 0 where a corner pair is reversed."""
    sides = (boxes[..., 2:] - boxes[..., :2]).clamp_min(0)
    return sides[..., 0] * sides[..., 1]


def iou(first: Tensor, second: Tensor) -> Tensor:
    """Intersection over union [N, M] of boxes [N, 4] and [M, 4]; 0 where the union has no area."""
    low = torch.maximum(first[:, None, :2], second[None, :, :2])
    high = torch.minimum(first[:, None, 2:], second[None, :, 2:])
    sides = (high - low).clamp_min(0)
    shared = sides[..., 0] * sides[..., 1]
    union = area(first)[:, None] + area(second)[None] - shared
    return torch.where(union > 0, shared / union, 0.0)


def clip(boxes: Tensor, height: int, width: int) -> Tensor:
    """Boxes [..., 4] cut at the borders of an image."""
    limits = boxes.new_tensor([width, height, width, height])
    return torch.minimum(boxes.clamp_min(0), limits)


def to_centres(boxes: Tensor) -> Tensor:
    """Corners [..., 4] as centre x, centre y, width, height [..., 4]."""
    sides = boxes[..., 2:] - boxes[..., :2]
    return torch.cat([boxes[..., :2] + sides / 2, sides], -1)


def to_corners(centres: Tensor) -> Tensor:
    """Centre x, centre y, width, height [..., 4] as corners [..., 4]."""
    half = centres[..., 2:] / 2
    return torch.cat([centres[..., :2] - half, centres[..., :2] + half], -1)
