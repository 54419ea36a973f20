"""Layers: how much of the sparsity each decoder block takes."""

from __future__ import annotations

from collections.abc import Sequence

from modicum.errors import InputError

MOST = 0.98
"""No block loses more than this."""


def spread(wanted: Sequence[float], sizes: Sequence[int], sparsity: float) -> list[float]:
    """Clip each block's share to [0, 0.98] and shift the rest by one constant, so that the weighted mean is
    the sparsity; sizes are numbers of weights.

    Raises:
        InputError: the sparsity is above 0.98.
    """
    if sparsity > MOST:
        raise InputError(
            f"a sparsity of {sparsity} is above {MOST}, the most that a block may lose where blocks lose "
            f'unequal shares: give at most sparsity={MOST}, or layers="uniform"'
        )
    total = sum(sizes)
    low, high = -2.0, 2.0
    for _ in range(200):  # the mean rises with the shift: bisection
        middle = (low + high) / 2
        mean = sum(n * min(MOST, max(0.0, w + middle)) for w, n in zip(wanted, sizes, strict=True)) / total
        if mean < sparsity:
            low = middle
        else:
            high = middle
    return [min(MOST, max(0.0, w + high)) for w in wanted]


def owl(outliers: Sequence[float], sparsity: float, reach: float = 0.08) -> list[float]:
    """OWL (Yin et al., 2023, arXiv 2310.05175): blocks with more outliers keep more.

    outliers: D_b, of each block the share of its Wanda scores above m times their mean. With
    t_b = 2·reach·(D_b - min D) / (max D - min D), s_b = S - (t_b - mean t).
    """
    least, most = min(outliers), max(outliers)
    if len(outliers) == 1 or most == least:
        return [sparsity] * len(outliers)
    t = [2 * reach * (d - least) / (most - least) for d in outliers]
    mean = sum(t) / len(t)
    return [sparsity - (x - mean) for x in t]


def atp(blocks: int, sparsity: float, slope: float) -> list[float]:
    """ATP (arXiv 2502.14770): s_b = S - slope·(B-1)/2 + slope·(b-1), b = 1 … B: later blocks lose more."""
    return [sparsity - slope * (blocks - 1) / 2 + slope * b for b in range(blocks)]


def slopes(blocks: int, sparsity: float, tries: int = 10) -> list[float]:
    """The slopes that ATP tries, uniform first: j·β_max / tries with β_max = min(2S, 2(1-S)) / (B-1)."""
    if blocks < 2:
        return [0.0]
    most = min(2 * sparsity, 2 * (1 - sparsity)) / (blocks - 1)
    return [j * most / tries for j in range(tries)]
