"""Kernels of the path values. Word lengths are proven in word_lengths.py.

Hirschmüller, "Stereo Processing by Semiglobal Matching and Mutual Information", IEEE TPAMI 30(2), 2008,
section 2.3.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from modicum.stereo.compiler import compiled

U16 = np.uint16
LARGEST = 65_535
Values = NDArray[np.uint16]


@compiled
def path_row(
    costs: NDArray[Any],
    before: tuple[Values, Values],
    after: tuple[Values, Values],
    penalties: tuple[np.uint16, Values],
    step: int,
    is_reversed: bool,
    total: Values,
) -> None:
    """Path values of a row, added to `total` [W, D].

    Args:
        costs: C [W, D].
        before: L [W + 2, D + 2] and min_k L [W + 2] of the row where the path comes from, which is `after`
            itself for a horizontal path. A border pixel has 0, a border disparity 65,535 - P1.
        after: where those of this row go.
        penalties: P1, and P2 [W].
        step: x minus that of the pixel where the path comes from.
        is_reversed: from the last pixel to the first.
    """
    width, disparities = costs.shape
    values, minima = before
    p1, p2 = penalties
    for i in range(width):
        x = width - 1 - i if is_reversed else i
        source = values[x + 1 - step]
        lower, same, upper = source[:disparities], source[1 : disparities + 1], source[2 : disparities + 2]
        least = minima[x + 1 - step]
        jump = U16(least + p2[x])
        cost, out, row = costs[x], after[0][x + 1][1 : disparities + 1], total[x]
        best = U16(LARGEST)
        for d in range(disparities):
            value = min(min(same[d], U16(min(lower[d], upper[d]) + p1)), jump)
            value = U16(U16(value - least) + cost[d])
            out[d] = value
            best = min(best, value)
            row[d] = U16(row[d] + value)
        after[1][x + 1] = best


@compiled
def penalty_row(
    image: NDArray[np.uint16], y: int, source: tuple[int, int], table: Values, shift: int, p2: Values
) -> None:
    """P2 [W] of a row by the change of intensity from the pixel where the path comes from.

    Args:
        image: [H, W].
        source: its place relative to the pixel, (dy, dx).
        table: P2 by the change, 256 entries.
        shift: bits of the change that are left out.
    """
    height, width = image.shape
    dy, dx = source
    p2[:] = table[0]
    if not 0 <= y + dy < height:
        return
    for x in range(max(0, -dx), min(width, width - dx)):
        own, other = image[y, x], image[y + dy, x + dx]
        p2[x] = table[(max(own, other) - min(own, other)) >> shift]


@compiled
def sweep(
    costs: NDArray[Any],
    image: NDArray[np.uint16],
    p1: np.uint16,
    tables: tuple[Values, int],
    directions: NDArray[np.bool_],
    is_upward: bool,
    total: Values,
) -> None:
    """Path values of up to four directions in one pass over the rows; `total` [H, W, D] is written.

    Args:
        costs: C [H, W, D].
        image: the left one, for an adaptive P2.
        tables: P2 by the change of intensity, 256 entries, and the bits of the change that are left out.
        directions: which are summed: horizontal, then from the row before at -1, 0 and +1 column. In an
            upward pass all four are turned by 180 degrees.
        is_upward: from the last row to the first.
    """
    height, width, disparities = costs.shape
    table, shift = tables
    values = np.zeros((4, 2, width + 2, disparities + 2), np.uint16)
    minima = np.zeros((4, 2, width + 2), np.uint16)
    values[:, :, :, 0] = U16(LARGEST - p1)
    values[:, :, :, disparities + 1] = U16(LARGEST - p1)
    p2 = np.full(width, table[0], np.uint16)
    is_adaptive = table[255] != table[0]
    sign = -1 if is_upward else 1
    for i in range(height):
        y = height - 1 - i if is_upward else i
        total[y, :, :] = 0
        now = i % 2
        for k in range(4):
            if not directions[k]:
                continue
            step = sign * (1, 1, 0, -1)[k]
            if is_adaptive:
                penalty_row(image, y, (0 if k == 0 else -sign, -step), table, shift, p2)
            old = now if k == 0 else 1 - now
            path_row(
                costs[y],
                (values[k, old], minima[k, old]),
                (values[k, now], minima[k, now]),
                (p1, p2),
                step,
                k == 0 and is_upward,
                total[y],
            )
