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
CHUNK = 32
"""Disparities in a loop of known length: else LLVM takes 128 bytes at a time, mostly more than there are."""
Values = NDArray[np.uint16]
Words = NDArray[Any]
"""uint8 where the word lengths allow it, which is twice as fast, else uint16."""


@compiled
def path_row(
    costs: NDArray[Any],
    before: tuple[Words, Words],
    after: tuple[Words, Words],
    penalties: tuple[Any, Words],
    step: int,
    is_reversed: bool,
    total: Values,
) -> None:
    """Path values of a row, added to `total` [W, D].

    Args:
        costs: C [W, D].
        before: L [W + 2, D + 2] and min_k L [W + 2] of the row where the path comes from, which is `after`
            itself for a horizontal path. A border pixel has 0, a border disparity the largest word less P1.
        after: where those of this row go.
        penalties: P1, and P2 [W], in words.
        step: x minus that of the pixel where the path comes from.
        is_reversed: from the last pixel to the first.
    """
    width, disparities = costs.shape
    values, minima = before
    p1, p2 = penalties
    word = values.dtype.type
    for i in range(width):
        x = width - 1 - i if is_reversed else i
        source = values[x + 1 - step]
        lower, same, upper = source[:disparities], source[1 : disparities + 1], source[2 : disparities + 2]
        least = minima[x + 1 - step]
        jump = word(least + p2[x])
        cost, out, row = costs[x], after[0][x + 1][1 : disparities + 1], total[x]
        best = word(lower[0] | word(~lower[0]))
        whole = disparities - disparities % CHUNK
        for start in range(0, whole, CHUNK):
            for k in range(CHUNK):
                d = start + k
                value = min(min(same[d], word(min(lower[d], upper[d]) + p1)), jump)
                value = word(word(value - least) + word(cost[d]))
                out[d] = value
                best = min(best, value)
                row[d] = U16(row[d] + U16(value))
        for d in range(whole, disparities):
            value = min(min(same[d], word(min(lower[d], upper[d]) + p1)), jump)
            value = word(word(value - least) + word(cost[d]))
            out[d] = value
            best = min(best, value)
            row[d] = U16(row[d] + U16(value))
        after[1][x + 1] = best


@compiled
def penalty_row(
    image: NDArray[np.uint16], y: int, source: tuple[int, int], table: Words, shift: int, p2: Words
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
    p1: Any,
    tables: tuple[Words, int],
    directions: NDArray[np.bool_],
    is_upward: bool,
    total: Values,
) -> None:
    """Path values of up to four directions in one pass over the rows; `total` [H, W, D] is written.

    Args:
        costs: C [H, W, D].
        image: the left one, for an adaptive P2.
        p1: in words, uint8 or uint16, which all path values are then.
        tables: P2 in words, by the change of intensity, 256 entries, and the bits of the change left out.
        directions: which are summed: horizontal, then from the row before at -1, 0 and +1 column. In an
            upward pass all four are turned by 180 degrees.
        is_upward: from the last row to the first.
    """
    height, width, disparities = costs.shape
    table, shift = tables
    values = np.zeros((4, 2, width + 2, disparities + 2), table.dtype)
    minima = np.zeros((4, 2, width + 2), table.dtype)
    values[:, :, :, 0] = ~p1  # the largest word less P1
    values[:, :, :, disparities + 1] = ~p1
    p2 = np.full(width, table[0], table.dtype)
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
