"""Transforms that keep the order of intensities only: rank, and census bits.

After Zabih and Woodfill, "Non-parametric local transforms for computing visual correspondence", ECCV 1994.
They do not change under any strictly rising change of the intensities, such as gain, bias or gamma.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from modicum.stereo.compiler import compiled

U16, U64 = np.uint16, np.uint64


@compiled
def rank_rows(image: NDArray[np.uint16], radius: int, first: int, ranks: NDArray[np.uint16]) -> None:
    """Ranks of the rows from `first` on, as many as `ranks` [n, W] has, of an image [H, W]."""
    height, width = image.shape
    for row in range(ranks.shape[0]):
        y = first + row
        out = ranks[row]
        out[:] = 0
        for dy in range(-radius, radius + 1):
            if y + dy < 0 or y + dy >= height:
                continue
            for dx in range(-radius, radius + 1):
                start, stop = max(0, -dx), min(width, width - dx)
                if stop <= start:
                    continue
                other = image[y + dy, start + dx : stop + dx]
                own, target = image[y, start:stop], out[start:stop]
                for x in range(stop - start):
                    target[x] += U16(other[x] < own[x])


@compiled
def census_rows(image: NDArray[np.uint16], radius: int, first: int, bits: NDArray[np.uint64]) -> None:
    """As `rank_rows`, with the comparisons as bits in reading order, not their sum."""
    height, width = image.shape
    for row in range(bits.shape[0]):
        y = first + row
        out = bits[row]
        out[:] = 0
        for dy in range(-radius, radius + 1):
            for dx in range(-radius, radius + 1):
                if dx == 0 and dy == 0:
                    continue
                for x in range(width):
                    out[x] <<= U64(1)
                if y + dy < 0 or y + dy >= height:
                    continue
                start, stop = max(0, -dx), min(width, width - dx)
                if stop <= start:
                    continue
                other = image[y + dy, start + dx : stop + dx]
                own, target = image[y, start:stop], out[start:stop]
                for x in range(stop - start):
                    target[x] |= U64(other[x] < own[x])
