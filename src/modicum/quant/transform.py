"""Winograd transforms of one-dimensional convolution, exact in rational numbers.

F(m, r) computes m outputs of a convolution with r taps by n = m + r - 1 products: y = Aᵀ[(G g) ⊙ (Bᵀ d)]
(Winograd 1980; Lavin and Gray 2015, arXiv 1509.09308). The matrices follow from n - 1 interpolation points
and infinity (Toom-Cook, transposed): with f_i = Π_{l≠i} (a_i - a_l),

    Aᵀ[j, i] = a_i^j,   G[i, k] = a_i^k / f_i,   Bᵀ[i] = coefficients of Π_{l≠i} (x - a_l);

for infinity the last row of Aᵀ and of G has a one, and Bᵀ has the coefficients of Π_l (x - a_l).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import cache, cached_property

import torch
from torch import Tensor

from modicum.errors import InputError

POINTS = tuple(Fraction(*p) for p in ((0, 1), (1, 1), (-1, 1), (2, 1), (-2, 1), (1, 2), (-1, 2)))
"""Interpolation points, in the order in which they are taken. Small ones keep the matrices small."""
TILES = ((2, 3), (4, 3), (2, 5), (4, 5), (6, 3))
"""(m, r) of the transforms that the schemes use."""
KERNEL_TILE = (2, 3)
"""(m, r) of the transform that has a compiled kernel."""

Matrix = tuple[tuple[Fraction, ...], ...]


@dataclass(frozen=True)
class WinogradTransform:
    """The three matrices of F(m, r), n = m + r - 1.

    Attributes:
        outputs: m.
        taps: r.
        input: Bᵀ [n, n].
        filter: G [n, r].
        output: Aᵀ [m, n].
    """

    outputs: int
    taps: int
    input: Matrix
    filter: Matrix
    output: Matrix

    def __str__(self) -> str:
        return f"F({self.outputs},{self.taps})"

    @property
    def products(self) -> int:
        """n: products of a tile, and inputs that it reads."""
        return self.outputs + self.taps - 1

    @property
    def saving(self) -> Fraction:
        """How many times fewer products than direct convolution: m·r / n."""
        return Fraction(self.outputs * self.taps, self.products)

    @cached_property
    def growth(self) -> Fraction:
        """‖Bᵀ‖_∞: how many times larger than the largest input a transformed one can be."""
        return _row_sum(self.input)

    @cached_property
    def filter_growth(self) -> Fraction:
        """‖G‖_∞."""
        return _row_sum(self.filter)

    @cached_property
    def output_growth(self) -> Fraction:
        """‖Aᵀ‖_∞."""
        return _row_sum(self.output)

    @property
    def safe_limit(self) -> int:
        """Q₀: the largest integer input with which no transformed input leaves ±127."""
        return math.floor(127 / self.growth)

    @cached_property
    def integral(self) -> IntegralTransform:
        """The same transform in whole numbers."""
        return _integral(self)


@dataclass(frozen=True)
class IntegralTransform:
    """F(m, r) in whole numbers: divisor · y = Aᵀ[(G g) ⊙ (Bᵀ d)].

    Rows of Bᵀ and G are multiplied by their least common denominators, each by its own, and columns of Aᵀ
    make up for it. ncnn multiplies all rows of F(4, 3) by 24 but the last one; rows of their own are ours.

    Attributes:
        input: Bᵀ [n, n].
        filter: G [n, r].
        output: Aᵀ [m, n].
        divisor: of the result, which it divides exactly.
    """

    input: tuple[tuple[int, ...], ...]
    filter: tuple[tuple[int, ...], ...]
    output: tuple[tuple[int, ...], ...]
    divisor: int


@cache
def winograd_transform(outputs: int, taps: int) -> WinogradTransform:
    """Derive F(outputs, taps).

    Raises:
        InputError: it needs more points than there are, or a number is below 1.
    """
    number = outputs + taps - 2
    if min(outputs, taps) < 1 or not 1 <= number <= len(POINTS):
        raise InputError(
            f"F({outputs},{taps}) needs {number} interpolation points, and there are 1 to {len(POINTS)}: "
            f"give outputs and taps of at least 1 with outputs + taps of 3 to {len(POINTS) + 2}"
        )
    points = POINTS[:number]
    inputs, filters, columns = [], [], []
    for place, point in enumerate(points):
        others = points[:place] + points[place + 1 :]
        scale = math.prod((point - other for other in others), start=Fraction(1))
        sign = 1 if scale > 0 else -1  # so that G's first entries are positive; Bᵀ takes the sign
        inputs.append((*(sign * x for x in _polynomial(others)), Fraction(0)))
        filters.append(tuple(sign * point**k / scale for k in range(taps)))
        columns.append([point**j for j in range(outputs)])
    inputs.append(_polynomial(points))
    filters.append((*(Fraction(0),) * (taps - 1), Fraction(1)))
    columns.append([Fraction(j == outputs - 1) for j in range(outputs)])
    return WinogradTransform(outputs, taps, tuple(inputs), tuple(filters), tuple(zip(*columns, strict=True)))


def as_tensor(matrix: Sequence[Sequence[Fraction | int]], like: Tensor) -> Tensor:
    """A matrix with the dtype and device of another tensor."""
    rows = [[float(x) for x in row] for row in matrix]
    return torch.tensor(rows, dtype=like.dtype, device=like.device)


def _polynomial(roots: Sequence[Fraction]) -> tuple[Fraction, ...]:
    """Coefficients of Π (x - root), lowest degree first."""
    coefficients = [Fraction(1)]
    for root in roots:
        shifted = [Fraction(0), *coefficients]
        coefficients = [
            high - root * low for high, low in zip(shifted, [*coefficients, Fraction(0)], strict=True)
        ]
    return tuple(coefficients)


def _row_sum(matrix: Matrix) -> Fraction:
    return max(sum((abs(x) for x in row), start=Fraction(0)) for row in matrix)


def _denominator(row: Sequence[Fraction]) -> int:
    return math.lcm(*(x.denominator for x in row))


def _integral(transform: WinogradTransform) -> IntegralTransform:
    inputs = [_denominator(row) for row in transform.input]
    filters = [_denominator(row) for row in transform.filter]
    # Column i of Aᵀ is divided by what row i of Bᵀ and of G was multiplied by.
    output = [[x / (b * g) for x, b, g in zip(row, inputs, filters, strict=True)] for row in transform.output]
    divisor = math.lcm(*(_denominator(row) for row in output))
    return IntegralTransform(
        tuple(tuple(int(x * b) for x in row) for row, b in zip(transform.input, inputs, strict=True)),
        tuple(tuple(int(x * g) for x in row) for row, g in zip(transform.filter, filters, strict=True)),
        tuple(tuple(int(x * divisor) for x in row) for row in output),
        divisor,
    )
