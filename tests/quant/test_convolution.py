"""Convolution by tiles in floating point, and what a convolution can be."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from modicum.errors import InputError
from modicum.quant import ConvSettings, winograd_conv1d, winograd_transform
from modicum.quant.convolution import (
    apply_filter,
    apply_input,
    apply_output,
    direct_conv1d,
    input_tiles,
    multiply,
    transform_input,
)
from modicum.quant.transform import TILES, as_tensor
from tests.bounds import assert_within, gamma
from tests.quant import reference


@pytest.mark.parametrize(("outputs", "taps"), TILES)
@given(
    length=st.integers(1, 30),
    channels=st.integers(1, 4),
    padding=st.tuples(st.integers(0, 9), st.integers(0, 9)),
    seed=st.integers(0, 2**31),
)
def test_tiles_give_direct_convolution(
    outputs: int, taps: int, length: int, channels: int, padding: tuple[int, int], seed: int
) -> None:
    conv = ConvSettings(taps, padding)
    if length + sum(padding) < taps:
        length += taps
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(2, channels, length, generator=generator, dtype=torch.float64)
    weight = torch.randn(3, channels, taps, generator=generator, dtype=torch.float64)
    transform = winograd_transform(outputs, taps)
    found = winograd_conv1d(x, weight, transform, conv)
    rows = [reference.convolve(part, weight.tolist(), padding) for part in x.tolist()]
    expected = torch.tensor(rows, dtype=torch.float64)
    # Rounded once each: entries of the matrices, products and sums of the three transforms, sums
    # over channels.
    operations = 3 + 2 * transform.products + taps + channels + 3
    sizes = apply_output(
        multiply(
            apply_filter(weight.abs(), as_tensor(transform.filter, x).abs()),
            apply_input(input_tiles(x.abs(), transform, conv), as_tensor(transform.input, x).abs()),
        ),
        as_tensor(transform.output, x).abs(),
        conv.out_length(length),
    )
    assert_within(found, expected, 2 * gamma(operations, torch.float64) * sizes)


def test_a_last_tile_is_cut_off() -> None:
    x, conv = torch.ones(1, 1, 6), ConvSettings(3)
    tiles = transform_input(x, winograd_transform(4, 3), conv)
    assert tiles.shape == (6, 1, 1, 1)
    assert winograd_conv1d(x, torch.ones(1, 1, 3), winograd_transform(4, 3), conv).tolist() == [[[3.0] * 4]]


@given(
    taps=st.integers(1, 6),
    padding=st.integers(0, 7),
    stride=st.integers(1, 3),
    dilation=st.integers(1, 3),
    length=st.integers(1, 40),
)
def test_settings_are_those_of_torch(
    taps: int, padding: int, stride: int, dilation: int, length: int
) -> None:
    layer = nn.Conv1d(2, 2, taps, stride, padding, dilation, groups=2, bias=False)
    conv = ConvSettings.of(layer)
    x = torch.zeros(1, 2, length)
    try:
        expected = layer(x).shape[-1]
    except RuntimeError:
        with pytest.raises(InputError, match=f"the sequence has {length} steps"):
            conv.out_length(length)
        return
    assert conv.out_length(length) == expected == direct_conv1d(x, layer.weight, conv).shape[-1]


@pytest.mark.parametrize("dilation", [1, 2, 3])
@pytest.mark.parametrize("taps", [1, 2, 3, 4, 5])
def test_padding_to_the_same_length(taps: int, dilation: int) -> None:
    layer = nn.Conv1d(1, 1, taps, padding="same", dilation=dilation, bias=False).double()
    x = torch.randn(1, 1, 20, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    found = direct_conv1d(x, layer.weight, ConvSettings.of(layer))
    size = direct_conv1d(x.abs(), layer.weight.detach().abs(), ConvSettings.of(layer))
    assert_within(found, layer(x), 2 * gamma(taps, torch.float64) * size)


def test_padding_by_name_and_bad_settings() -> None:
    assert ConvSettings.of(nn.Conv1d(1, 1, 3, padding="valid")) == ConvSettings(3)
    with pytest.raises(InputError, match="padding_mode is 'reflect'"):
        ConvSettings.of(nn.Conv1d(1, 1, 3, padding=1, padding_mode="reflect"))
    for wrong in ({"taps": 0}, {"taps": 3, "stride": 0}, {"taps": 3, "padding": (-1, 0)}):
        with pytest.raises(InputError, match="give paddings of at least 0"):
            ConvSettings(**wrong)  # type: ignore[arg-type]


@pytest.mark.parametrize("conv", [ConvSettings(5), ConvSettings(3, stride=2), ConvSettings(3, dilation=2)])
def test_what_tiles_cannot_compute(conv: ConvSettings) -> None:
    with pytest.raises(InputError, match=r"F\(2,3\) cannot compute .*use direct"):
        winograd_conv1d(torch.zeros(1, 1, 9), torch.zeros(1, 1, conv.taps), winograd_transform(2, 3), conv)
