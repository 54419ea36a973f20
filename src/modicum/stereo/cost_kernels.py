"""Kernels of the matching costs: rows of C [W, D] in which the disparities of a pixel are neighbours.

The right row is reversed, so that the pixels x - d of one x lie one after another.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from modicum.stereo.compiler import compiled

U16, U64 = np.uint16, np.uint64
Costs = NDArray[Any]
"""uint8 or uint16 [rows, W, D]."""


@compiled
def difference_row(left: NDArray[np.uint16], reverse: NDArray[np.uint16], out: NDArray[np.uint16]) -> None:
    """|left(x) - right(max(0, x - d))| [W, D] of a row. reverse: the right row, reversed."""
    width, disparities = out.shape
    edge = reverse[width - 1]
    for x in range(width):
        inside = min(disparities, x + 1)
        own, row = left[x], out[x]
        other = reverse[width - 1 - x : width - 1 - x + inside]
        for d in range(inside):
            row[d] = U16(max(own, other[d]) - min(own, other[d]))
        row[inside:] = U16(max(own, edge) - min(own, edge))


@compiled
def sum_rows(
    left: NDArray[np.uint16],
    right: NDArray[np.uint16],
    first: int,
    window: int,
    weights: tuple[np.uint16, np.uint16],
    limit: np.uint16,
    costs: Costs,
) -> None:
    """Costs of sums of differences, of the rows from `first` on, as many as `costs` has.

    Column sums are kept from row to row, the sum of a window from pixel to pixel.

    Args:
        left: ranks or intensities [H, W].
        window: side of the window of the sum; outside the image it has nothing.
        weights: of the difference at the pixel, and of the sum.
        limit: of a cost.
    """
    height, width = left.shape
    rows, _, disparities = costs.shape
    half = window // 2
    ring = np.zeros((window, width, disparities), np.uint16)
    columns = np.zeros((width, disparities), np.uint16)
    total = np.zeros(disparities, np.uint16)
    of_pixel, of_sum = weights
    for y in range(first - half, first + rows + half):
        newest = ring[y % window]
        for x in range(width):
            old, column = newest[x], columns[x]
            for d in range(disparities):
                column[d] = U16(column[d] - old[d])
        if 0 <= y < height:
            difference_row(left[y], right[y, ::-1].copy(), newest)
            for x in range(width):
                new, column = newest[x], columns[x]
                for d in range(disparities):
                    column[d] = U16(column[d] + new[d])
        else:
            newest[:] = 0
        if y < first + half:
            continue
        centre = ring[(y - half) % window]
        out = costs[y - half - first]
        total[:] = 0
        for x in range(min(half, width)):
            column = columns[x]
            for d in range(disparities):
                total[d] = U16(total[d] + column[d])
        for x in range(width):
            if x + half < width:
                column = columns[x + half]
                for d in range(disparities):
                    total[d] = U16(total[d] + column[d])
            if x - half - 1 >= 0:
                column = columns[x - half - 1]
                for d in range(disparities):
                    total[d] = U16(total[d] - column[d])
            own, row = centre[x], out[x]
            if of_pixel:
                for d in range(disparities):
                    row[d] = min(U16(U16(of_pixel * own[d]) + U16(of_sum * total[d])), limit)
            else:
                for d in range(disparities):
                    row[d] = min(total[d], limit)


@compiled
def hamming_rows(
    left: NDArray[np.uint64],
    right: NDArray[np.uint64],
    first: int,
    limit: np.uint16,
    costs: Costs,
) -> None:
    """Costs that count unequal bits, of the rows from `first` on, as many as `costs` has.

    Args:
        left: strings of bits [H, W].
        limit: of a cost.
    """
    rows, width, disparities = costs.shape
    reverse = np.zeros(width, np.uint64)
    for row in range(rows):
        reverse[:] = right[first + row, ::-1]
        for x in range(width):
            inside = min(disparities, x + 1)
            own, out = left[first + row, x], costs[row, x]
            other = reverse[width - 1 - x : width - 1 - x + inside]
            for d in range(inside):
                out[d] = min(U16(_count(own ^ other[d])), limit)
            out[inside:] = min(U16(_count(own ^ reverse[width - 1])), limit)


@compiled
def _count(bits: np.uint64) -> np.uint64:
    """Ones, in the form that LLVM knows as one instruction."""
    bits -= (bits >> U64(1)) & U64(0x5555555555555555)
    bits = (bits & U64(0x3333333333333333)) + ((bits >> U64(2)) & U64(0x3333333333333333))
    bits = (bits + (bits >> U64(4))) & U64(0x0F0F0F0F0F0F0F0F)
    return (bits * U64(0x0101010101010101)) >> U64(56)
