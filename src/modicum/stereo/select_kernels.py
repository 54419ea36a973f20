"""Kernels of the selection: the disparity of the smallest sum, checks, sub-pixel, median, filling.

Disparities are int16 in units of 1/16 pixel; -1 is no disparity.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from modicum.stereo.compiler import compiled

U16 = np.uint16
LARGEST = 65_535
NONE = -1
Fixed = NDArray[np.int16]


@compiled
def select_row(
    sums: NDArray[np.uint16], subpixel: bool, check: tuple[int, bool], uniqueness: int, fixed: Fixed
) -> None:
    """Disparities [W] of a row of sums [W, D]. Of equal sums the smallest disparity wins.

    Args:
        check: how far the match of the right pixel may differ; below 0 for no check. That match is the d of
            the smallest S(x + d, d). And whether a pixel stays whose match is outside the right image.
        uniqueness: percent.
    """
    width, disparities = sums.shape
    left_right, keeps_outside = check
    right_best = np.full(width, LARGEST, np.uint16)  # in reversed order
    right_match = np.zeros(width, np.uint16)
    for x in range(width):
        row = sums[x]
        best = U16(LARGEST)
        for d in range(disparities):
            best = min(best, row[d])
        winner = 0
        while row[winner] != best:
            winner += 1
        fixed[x] = winner
        if left_right >= 0:
            inside = min(disparities, x + 1)
            start = width - 1 - x
            least, match = right_best[start : start + inside], right_match[start : start + inside]
            for d in range(inside):
                match[d] = U16(d) if row[d] < least[d] else match[d]
                least[d] = min(least[d], row[d])
    for x in range(width):
        row, winner = sums[x], int(fixed[x])
        best = row[winner]
        if left_right >= 0:
            if winner > x:
                is_good = keeps_outside
            else:
                is_good = abs(int(right_match[width - 1 - x + winner]) - winner) <= left_right
            if not is_good:
                fixed[x] = NONE
                continue
        if uniqueness > 0:
            second = U16(LARGEST)
            for d in range(0, winner - 1):
                second = min(second, row[d])
            for d in range(winner + 2, disparities):
                second = min(second, row[d])
            if int(second) * (100 - uniqueness) < int(best) * 100:
                fixed[x] = NONE
                continue
        shift = 0
        if subpixel and 0 < winner < disparities - 1:
            lower, upper = int(row[winner - 1]), int(row[winner + 1])
            bend = lower + upper - 2 * int(best)
            if bend > 0:
                shift = ((lower - upper) * 16 + bend) // (2 * bend)
        fixed[x] = 16 * winner + shift


@compiled
def select_rows(
    sums: NDArray[np.uint16], subpixel: bool, check: tuple[int, bool], uniqueness: int, fixed: Fixed
) -> None:
    """`select_row` of each row of sums [n, W, D]."""
    for y in range(sums.shape[0]):
        select_row(sums[y], subpixel, check, uniqueness, fixed[y])


@compiled
def median_rows(fixed: Fixed, first: int, out: Fixed) -> None:
    """3 x 3 median of the rows from `first` on, as many as `out` has.

    A neighbour that has no disparity, or is outside, counts as the pixel itself.
    """
    height, width = fixed.shape
    window = np.zeros((9, width), np.int16)
    for row in range(out.shape[0]):
        y = first + row
        own = fixed[y]
        for k in range(9):
            dy, dx = k // 3 - 1, k % 3 - 1
            target = window[k]
            target[:] = own
            if not 0 <= y + dy < height:
                continue
            start, stop = max(0, -dx), min(width, width - dx)
            other = fixed[y + dy, start + dx : stop + dx]
            place = target[start:stop]
            for x in range(len(place)):
                place[x] = other[x] if other[x] >= 0 else place[x]
        a, b, c, d, e = window[0], window[1], window[2], window[3], window[4]
        f, g, h, i = window[5], window[6], window[7], window[8]
        result = out[row]
        for x in range(width):
            # Each row of three sorted; then the middle of: largest of the least, middle of the middles,
            # least of the largest (Smith, "Implementing median filters in XC4000E FPGAs", 1996).
            low1, high1 = min(a[x], b[x]), max(a[x], b[x])
            low2, high2 = min(d[x], e[x]), max(d[x], e[x])
            low3, high3 = min(g[x], h[x]), max(g[x], h[x])
            mid1, high1 = min(high1, c[x]), max(high1, c[x])
            mid2, high2 = min(high2, f[x]), max(high2, f[x])
            mid3, high3 = min(high3, i[x]), max(high3, i[x])
            low1, mid1 = min(low1, mid1), max(low1, mid1)
            low2, mid2 = min(low2, mid2), max(low2, mid2)
            low3, mid3 = min(low3, mid3), max(low3, mid3)
            low = max(max(low1, low2), low3)
            high = min(min(high1, high2), high3)
            mid = max(min(mid1, mid2), min(max(mid1, mid2), mid3))
            middle = max(min(low, mid), min(max(low, mid), high))
            result[x] = middle if own[x] >= 0 else NONE


@compiled
def fill_rows(fixed: Fixed) -> None:
    """Give a pixel without a disparity the smaller of the next ones to its left and right; in place.

    Where objects hide a part of the background, the background is the one with the smaller disparity. A row
    without any disparity stays as it is.
    """
    height, width = fixed.shape
    for y in range(height):
        row = fixed[y]
        x = 0
        while x < width:
            if row[x] >= 0:
                x += 1
                continue
            stop = x
            while stop < width and row[stop] < 0:
                stop += 1
            if x > 0 and stop < width:
                value = min(row[x - 1], row[stop])
            elif x > 0:
                value = row[x - 1]
            elif stop < width:
                value = row[stop]
            else:
                value = np.int16(NONE)
            row[x:stop] = value
            x = stop
