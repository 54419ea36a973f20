"""Winograd's matrices, in exact arithmetic."""

from __future__ import annotations

from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from modicum.errors import InputError
from modicum.quant import WinogradTransform, winograd_transform
from modicum.quant.transform import TILES
from tests.quant import reference

tiles = pytest.mark.parametrize(("outputs", "taps"), TILES)
numbers = st.fractions(-100, 100, max_denominator=50)


@tiles
@given(data=st.data())
def test_a_tile_is_direct_convolution_exactly(outputs: int, taps: int, data: st.DataObject) -> None:
    transform = winograd_transform(outputs, taps)
    values = data.draw(st.lists(numbers, min_size=outputs + taps - 1, max_size=outputs + taps - 1))
    kernel = data.draw(st.lists(numbers, min_size=taps, max_size=taps))
    assert reference.tile(transform, values, kernel) == reference.convolve([values], [[kernel]], (0, 0))[0]


@tiles
@given(data=st.data())
def test_the_integral_transform_is_its_divisor_times_as_large(
    outputs: int, taps: int, data: st.DataObject
) -> None:
    integral = winograd_transform(outputs, taps).integral
    whole = st.integers(-127, 127)
    values = data.draw(st.lists(whole, min_size=outputs + taps - 1, max_size=outputs + taps - 1))
    kernel = data.draw(st.lists(whole, min_size=taps, max_size=taps))
    found = reference.tile(integral, values, kernel)
    assert all(isinstance(x, int) for x in found)
    direct = reference.convolve([values], [[kernel]], (0, 0))[0]
    assert found == [integral.divisor * x for x in direct]


# Tile, products, growth of inputs, range that cannot overflow, growth of filters and of outputs.
TABLE = [
    ((2, 3), 4, 2, 63, Fraction(3, 2), 3),
    ((4, 3), 6, 10, 12, 1, 19),
    ((2, 5), 6, 10, 12, Fraction(31, 24), 7),
    ((4, 5), 8, 15, 8, Fraction(62, 45), Fraction(77, 4)),
    ((6, 3), 8, 15, 8, Fraction(56, 45), Fraction(1073, 16)),
]


@pytest.mark.parametrize(("tile", "products", "growth", "limit", "filters", "outputs"), TABLE)
def test_growth(
    tile: tuple[int, int], products: int, growth: int, limit: int, filters: Fraction, outputs: Fraction
) -> None:
    transform = winograd_transform(*tile)
    assert (transform.products, transform.growth, transform.safe_limit) == (products, growth, limit)
    assert (transform.filter_growth, transform.output_growth) == (filters, outputs)
    assert transform.saving == Fraction(tile[0] * tile[1], products)


def test_the_smallest_tile_is_as_it_is_printed_everywhere() -> None:
    half = Fraction(1, 2)
    assert winograd_transform(2, 3) == WinogradTransform(
        2,
        3,
        input=((1, 0, -1, 0), (0, 1, 1, 0), (0, -1, 1, 0), (0, -1, 0, 1)),
        filter=((1, 0, 0), (half, half, half), (half, -half, half), (0, 0, 1)),
        output=((1, 1, 1, 0), (0, 1, -1, 1)),
    )


@pytest.mark.parametrize(("outputs", "taps"), [(0, 3), (2, 0), (1, 1), (7, 3), (2, 8)])
def test_tiles_that_cannot_be_had(outputs: int, taps: int) -> None:
    with pytest.raises(InputError, match=rf"F\({outputs},{taps}\) needs .* interpolation points"):
        winograd_transform(outputs, taps)
