"""Anchors: the boxes that a detector's outputs are offsets from, some at each cell of each feature map."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from modicum.errors import InputError
from modicum.vision.detect.boxes import to_corners


@dataclass(frozen=True)
class AnchorSettings:
    """Sizes and shapes of anchors, after SSD (arXiv 1512.02325, section 2.2) with our sizes.

    At a map of stride s the square anchors have sides `size` · s and √2 · `size` · s. For each aspect ratio r
    there is one of side `size` · s · √r by `size` · s / √r.

    Attributes:
        size: side of the smallest square anchor, in cells of its map.
        ratios: width by height of the others.

    Raises:
        InputError: a value is not above 0.
    """

    size: float = 2.0
    ratios: tuple[float, ...] = (2.0, 0.5)

    def __post_init__(self) -> None:
        for value in (self.size, *self.ratios):
            if not 0 < value < math.inf:
                raise InputError(f"an anchor has the size or ratio {value}: give numbers above 0")

    @property
    def num_per_cell(self) -> int:
        """Anchors at each cell."""
        return 2 + len(self.ratios)

    def sides(self, stride: int) -> list[tuple[float, float]]:
        """Width and height in pixels of the anchors of a cell."""
        side = self.size * stride
        squares = [(side, side), (side * math.sqrt(2), side * math.sqrt(2))]
        return squares + [(side * math.sqrt(r), side / math.sqrt(r)) for r in self.ratios]


def make_anchors(settings: AnchorSettings, maps: Sequence[tuple[int, int]], strides: Sequence[int]) -> Tensor:
    """Anchors [A, 4] as corners in pixels: by map, then row, then column, then shape of `sides`.

    Args:
        maps: height and width of each feature map, in cells.
        strides: pixels between cells of each map.
    """
    found = []
    for (rows, columns), stride in zip(maps, strides, strict=True):
        y = (torch.arange(rows, dtype=torch.float64) + 0.5) * stride
        x = (torch.arange(columns, dtype=torch.float64) + 0.5) * stride
        sides = torch.tensor(settings.sides(stride), dtype=torch.float64)
        grid = torch.empty(rows, columns, len(sides), 4, dtype=torch.float64)
        grid[..., 0] = x[None, :, None]
        grid[..., 1] = y[:, None, None]
        grid[..., 2:] = sides
        found.append(to_corners(grid).reshape(-1, 4))
    return torch.cat(found).float()
