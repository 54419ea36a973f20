"""Word lengths: bits that the numbers of semi-global matching need, and the proof that no number needs more.

With costs 0 <= C <= C_max, penalties 0 <= P1 <= P2, and m = min_k L(p - r, k) (0 at a border, as L there):

    L(p, d) = C(p, d) + min{L(p-r, d), L(p-r, d-1) + P1, L(p-r, d+1) + P1, m + P2} - m

1. The inner minimum is at least m, as each of its terms is. So L >= C >= 0.
2. The inner minimum is at most m + P2. So L <= C_max + P2.
3. For the k with L(p-r, k) = m the inner minimum is m. So L(p, k) = C(p, k), and min_d L(p, d) <= C_max.
   So m <= C_max, and m + P2 <= C_max + P2.
4. The largest number within is L(p-r, d+-1) + P1 <= C_max + P2 + P1.
5. S is a sum of `paths` of them: S <= paths * (C_max + P2).

Bound 2 is reached: where the best disparity changes between two pixels that cost C_max elsewhere. P2 may
differ from pixel to pixel, as an adaptive one does; the largest one counts.
"""

from __future__ import annotations

from dataclasses import dataclass

from modicum.errors import InputError

KERNEL_BITS = 16
"""Of a number in the CPU's kernels."""


@dataclass(frozen=True)
class WordLengths:
    """The largest values, and bits for them.

    Args:
        max_cost: C_max.
        p1: penalty of a change of one disparity.
        p2: penalty of a larger change; the largest one if it is adaptive.
        paths: how many are summed.
    """

    max_cost: int
    p1: int
    p2: int
    paths: int

    @property
    def max_path(self) -> int:
        """Of L."""
        return self.max_cost + self.p2

    @property
    def max_within(self) -> int:
        """Of numbers on the way to L."""
        return self.max_path + self.p1

    @property
    def max_sum(self) -> int:
        """Of S."""
        return self.paths * self.max_path

    @property
    def cost_bits(self) -> int:
        """Of C."""
        return self.max_cost.bit_length()

    @property
    def path_bits(self) -> int:
        """Of L."""
        return self.max_path.bit_length()

    @property
    def sum_bits(self) -> int:
        """Of S."""
        return self.max_sum.bit_length()

    def check(self, bits: int = KERNEL_BITS) -> None:
        """Raise if a number may not fit.

        Raises:
            InputError: it may not; names the largest value and what would fit.
        """
        most = max(self.max_within, self.max_sum)
        if most >= 2**bits:
            raise InputError(
                f"{self.paths} paths with costs up to {self.max_cost:,}, P1 {self.p1:,} and P2 {self.p2:,} "
                f"reach {most:,}, and {bits} bits hold {2**bits - 1:,}: give a smaller window, smaller "
                f"penalties, a limit of the cost, or a cost on ranks"
            )
