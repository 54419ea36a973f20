"""Sizes: what the launchers of the kernels have in common when they choose tiles."""

from __future__ import annotations

ROOMY = ((8, 0), (9, 0), (10, 0), (10, 3))
"""Compute capabilities with over 160 KiB of shared memory a block."""


def pow2(n: int) -> int:
    """The least power of two that is at least n, and at least 1."""
    return 1 << (n - 1).bit_length() if n > 1 else 1
