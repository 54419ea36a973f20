"""Cost: what is compared between a pixel of the left image and one of the right image, in integers.

For a neighbourhood N(p) of `rank_window` x `rank_window` pixels without p, and a window w(p) of `window` x
`window` pixels with p. Neighbours outside an image are not counted. Where q - d is to the left of the right
image, the first pixel of its row is used.

    rank      R(p) = #{q in N(p): I(q) < I(p)}        Zabih and Woodfill, ECCV 1994
    ad        |I_l(p) - I_r(p - d)|
    sad       sum over q in w(p) of |I_l(q) - I_r(q - d)|
    census    #{q in N: [I_l(p+q) < I_l(p)] != [I_r(p-d+q) < I_r(p-d)]}
    rank-ad   |R_l(p) - R_r(p - d)|
    rank-sad  sum over q in w(p) of |R_l(q) - R_r(q - d)|
    rank-structure   sum over q in N of |o_l(p, q) - o_r(p - d, q - d)|, o(p, q) = [I(q) > I(p)]
    unified   alpha * rank-ad + beta * rank-sad

Every cost is cut off at `limit`.

"Rank SAD" and the unified model are from arXiv 1905.03716, of which we could read the abstract only:
"rank-sad" and "rank-structure" are two readings of ours. The second is a census of the opposite comparison.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from modicum.errors import InputError

CostKind = Literal["ad", "sad", "census", "rank-ad", "rank-sad", "rank-structure", "unified"]
COSTS: tuple[CostKind, ...] = get_args(CostKind)
MAX_BITS_WINDOW = 7
MAX_WINDOW = 15


@dataclass(frozen=True)
class CostSettings:
    """Which cost, and its windows.

    Attributes:
        kind: its name.
        rank_window: side of the neighbourhood of rank and census; odd, 3 to 15, for census at most 7.
        window: side of the window of a sum; odd, 1 to 15. Costs without a sum do not use it.
        alpha: weight of rank-ad in the unified cost, a power of two or 0.
        beta: weight of rank-sad in the unified cost, a power of two or 0.
        limit: costs above it are set to it; None for no limit.

    Raises:
        InputError: one of them is out of range.
    """

    kind: CostKind = "rank-structure"
    rank_window: int = 5
    window: int = 3
    alpha: int = 1
    beta: int = 1
    limit: int | None = None

    def __post_init__(self) -> None:
        if self.kind not in COSTS:
            raise InputError(f"cost is {self.kind!r}: give one of {', '.join(COSTS)}")
        for name, least in (("rank_window", 3), ("window", 1)):
            value = getattr(self, name)
            if value % 2 == 0 or not least <= value <= MAX_WINDOW:
                raise InputError(f"{name} is {value}: give an odd number from {least} to {MAX_WINDOW}")
        if self.is_binary and self.rank_window > MAX_BITS_WINDOW:
            raise InputError(
                f"rank_window is {self.rank_window}: {self.kind} keeps a bit for each neighbour in 64 bits, "
                f"give at most {MAX_BITS_WINDOW}"
            )
        for name in ("alpha", "beta"):
            value = getattr(self, name)
            if value < 0 or value & (value - 1):
                raise InputError(f"{name} is {value}: give a power of two, or 0")
        if self.kind == "unified" and not self.alpha + self.beta:
            raise InputError("alpha and beta are 0: give one of them a power of two")
        if self.limit is not None and self.limit < 1:
            raise InputError(f"limit is {self.limit}: give at least 1, or leave it out")

    @property
    def is_ranked(self) -> bool:
        """Whether ranks are compared, not intensities."""
        return self.kind in ("rank-ad", "rank-sad", "unified")

    @property
    def is_binary(self) -> bool:
        """Whether strings of bits are compared."""
        return self.kind in ("census", "rank-structure")

    @property
    def sum_window(self) -> int:
        """Side of the window that differences are summed over; 1 for no sum."""
        return self.window if self.kind in ("sad", "rank-sad", "unified") else 1

    @property
    def weights(self) -> tuple[int, int]:
        """Of the difference at the pixel itself, and of the sum."""
        return (self.alpha, self.beta) if self.kind == "unified" else (0, 1)

    @property
    def num_neighbours(self) -> int:
        """Pixels in N."""
        return self.rank_window**2 - 1

    def max_difference(self, intensity_bits: int) -> int:
        """The largest difference of two pixels."""
        return 2**intensity_bits - 1 if self.kind in ("ad", "sad") else self.num_neighbours

    def max_unlimited(self, intensity_bits: int) -> int:
        """The largest cost before it is cut off."""
        of_pixel, of_sum = self.weights
        return (of_pixel + of_sum * self.sum_window**2) * self.max_difference(intensity_bits)

    def max_cost(self, intensity_bits: int) -> int:
        """C_max: the largest cost.

        Args:
            intensity_bits: of a pixel of the images, 1 to 16.
        """
        most = self.max_unlimited(intensity_bits)
        return most if self.limit is None else min(most, self.limit)
