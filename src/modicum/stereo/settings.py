"""Settings of a match: the cost, the paths, and what is done with the winner."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from modicum.errors import InputError
from modicum.stereo.cost import CostKind, CostSettings
from modicum.stereo.word_lengths import WordLengths

MAX_DISPARITIES = 512
SUBPIXEL_BITS = 4
"""Disparities are in units of 1/16 pixel."""

# Shares of the largest cost, from the grid of benchmarks/stereo.py.
_PENALTIES: dict[CostKind, tuple[float, float]] = {
    "ad": (0.08, 0.4),
    "sad": (0.06, 0.25),
    "census": (0.8, 3.2),
    "rank-ad": (0.8, 3.2),
    "rank-sad": (0.4, 1.6),
    "rank-structure": (0.8, 3.2),
    "unified": (0.4, 1.6),
}


@dataclass(frozen=True)
class PathSettings:
    """Semi-global aggregation.

    Attributes:
        paths: 8, or the 4 that a stream of pixels allows: from the left, and from the row above at -1, 0, +1.
        p1: penalty of a change of disparity by one; None for a share of the largest cost.
        p2: penalty of a larger change; None for a share of the largest cost.
        contrast: makes P2 smaller at edges of the left image, max(P1 + 1, P2 / (|I(p) - I(p-r)| / contrast)),
            each quotient rounded down and at least 1. 0 for a constant P2. In units of intensity at 8 bits.

    Raises:
        InputError: one of them is out of range, or P2 is below P1.
    """

    paths: int = 8
    p1: int | None = None
    p2: int | None = None
    contrast: int = 8

    def __post_init__(self) -> None:
        if self.paths not in (4, 8):
            raise InputError(f"paths is {self.paths}: give 4 or 8")
        for name in ("p1", "p2"):
            value = getattr(self, name)
            if value is not None and value < 0:
                raise InputError(f"{name} is {value}: give 0 or more")
        if self.p1 is not None and self.p2 is not None and self.p2 < self.p1:
            raise InputError(f"P2 is {self.p2}, below P1, which is {self.p1}: give a P2 of at least P1")
        if not 0 <= self.contrast <= 255:
            raise InputError(f"contrast is {self.contrast}: give 0 to 255")


@dataclass(frozen=True)
class RefineSettings:
    """What is done with the disparity of the smallest sum.

    Attributes:
        subpixel: fit a parabola through the sums beside the smallest.
        left_right: the match of the right image may differ by so many disparities; None for no check. A pixel
            whose match is outside the right image fails, unless `fill` is on: the paths carry a disparity
            there from pixels beside it.
        uniqueness: percent by which any other disparity's sum must be larger, but for the two neighbours; 0
            for no check.
        median: 3 x 3 median of valid pixels.
        fill: give pixels that failed a check the smaller disparity of the next valid ones in their row.

    Raises:
        InputError: one of them is out of range.
    """

    subpixel: bool = True
    left_right: int | None = 1
    uniqueness: int = 0
    median: bool = True
    fill: bool = False

    def __post_init__(self) -> None:
        if self.left_right is not None and self.left_right < 0:
            raise InputError(f"left_right is {self.left_right}: give 0 or more, or None for no check")
        if not 0 <= self.uniqueness < 100:
            raise InputError(f"uniqueness is {self.uniqueness}: give a percentage from 0 to 99")


@dataclass(frozen=True)
class StereoSettings:
    """All settings of a match.

    Attributes:
        disparities: how many are tried, 0 to disparities - 1; 2 to 512.

    Raises:
        InputError: disparities is out of range.
    """

    disparities: int = 64
    cost: CostSettings = field(default_factory=CostSettings)
    path: PathSettings = field(default_factory=PathSettings)
    refine: RefineSettings = field(default_factory=RefineSettings)

    def __post_init__(self) -> None:
        if not 2 <= self.disparities <= MAX_DISPARITIES:
            raise InputError(f"disparities is {self.disparities}: give 2 to {MAX_DISPARITIES}")

    def word_lengths(self, intensity_bits: int = 8) -> WordLengths:
        """The penalties and the largest values of these settings, for images with so many bits a pixel.

        Raises:
            InputError: P2 is below P1.
        """
        most = self.cost.max_cost(intensity_bits)
        small, large = _PENALTIES[self.cost.kind]
        p1 = max(1, round(small * most)) if self.path.p1 is None else self.path.p1
        p2 = max(p1, round(large * most)) if self.path.p2 is None else self.path.p2
        if p2 < p1:
            raise InputError(f"P2 is {p2}, below P1, which is {p1}: give a P2 of at least P1")
        return WordLengths(most, p1, p2, self.path.paths)


def penalty_table(lengths: WordLengths, contrast: int) -> NDArray[np.uint16]:
    """P2 by the change of intensity, 256 entries: max(P1 + 1, P2 / max(1, change / contrast)), rounded down.

    Never above P2, so the word lengths stay proven.

    Args:
        contrast: 0 for a constant P2.
    """
    if contrast == 0:
        return np.full(256, lengths.p2, np.uint16)
    change = np.arange(256)
    table = lengths.p2 // np.maximum(1, change // contrast)
    found: NDArray[np.uint16] = np.minimum(lengths.p2, np.maximum(lengths.p1 + 1, table)).astype(np.uint16)
    return found
