"""References for quantised convolution: plain loops over Python's numbers, from the formulas alone."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from typing import Any

Rows = Sequence[Sequence[Any]]


def convolve(
    x: Rows,
    weight: Sequence[Rows],
    padding: tuple[int, int],
    stride: int = 1,
    dilation: int = 1,
    groups: int = 1,
) -> list[list[Any]]:
    """x [C][T], weight [K][C / groups][r] -> [K][T_out]; exact for ints and Fractions."""
    channels, length, taps = len(x), len(x[0]), len(weight[0][0])
    total = length + sum(padding) - dilation * (taps - 1) - 1
    found = []
    for k, filters in enumerate(weight):
        first = k * groups // len(weight) * (channels // groups)
        row = []
        for t in range(total // stride + 1):
            value: Any = 0
            for c, kernel in enumerate(filters):
                for i, w in enumerate(kernel):
                    place = t * stride + i * dilation - padding[0]
                    if 0 <= place < length:
                        value += x[first + c][place] * w
            row.append(value)
        found.append(row)
    return found


def product(matrix: Rows, vector: Sequence[Any]) -> list[Any]:
    return [sum(a * b for a, b in zip(row, vector, strict=True)) for row in matrix]


def tile(transform: Any, data: Sequence[Any], kernel: Sequence[Any]) -> list[Any]:
    """Aᵀ[(G g) ⊙ (Bᵀ d)] of one tile."""
    inputs, filters = product(transform.input, data), product(transform.filter, kernel)
    return product(transform.output, [u * v for u, v in zip(filters, inputs, strict=True)])


def tiles_of(x: Rows, outputs: int, taps: int, padding: tuple[int, int]) -> list[list[list[Any]]]:
    """[P][C][n]: the inputs of every tile, zeros outside."""
    length = len(x[0])
    size = length + sum(padding) - taps + 1
    number = -(-size // outputs)
    width = outputs + taps - 1
    return [
        [
            [
                row[p * outputs + i - padding[0]] if 0 <= p * outputs + i - padding[0] < length else 0
                for i in range(width)
            ]
            for row in x
        ]
        for p in range(number)
    ]


def saturate(value: Any) -> int:
    return max(-128, min(127, round_half_even(value)))


def round_half_even(value: Any) -> int:
    return round(Fraction(value))


def winograd_sums(
    x: Rows, filters: Sequence[Rows], transform: Any, padding: tuple[int, int]
) -> tuple[list[list[Any]], int]:
    """Aᵀ Σ_c U ⊙ sat8(Bᵀ q): x [C][T] integers, filters U [n][K][C]; also how many values were clipped."""
    length = len(x[0]) + sum(padding) - transform.taps + 1
    found: list[list[Any]] = [[] for _ in filters[0]]
    clipped = 0
    for channels in tiles_of(x, transform.outputs, transform.taps, padding):
        exact = [product(transform.input, data) for data in channels]
        clipped += sum(saturate(v) != round_half_even(v) for row in exact for v in row)
        inputs = [[saturate(v) for v in row] for row in exact]
        for k in range(len(found)):
            products = [
                sum(filters[i][k][c] * inputs[c][i] for c in range(len(inputs)))
                for i in range(transform.products)
            ]
            found[k] += product(transform.output, products)
    return [row[:length] for row in found], clipped
