"""Schemes: their integer sums, what they clip, and how much noise they make."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from modicum.errors import InputError
from modicum.quant import (
    DirectInt8,
    ExactWinograd,
    QuantConv1d,
    RangeLimitedWinograd,
    RangeSettings,
    RSQWinograd,
    TapwiseWinograd,
    calibrate,
    counting,
    search_alphas,
    sqnr,
    winograd_transform,
)
from modicum.quant.convolution import ConvSettings, direct_conv1d
from modicum.quant.schemes import SCHEMES, Scheme, WinogradScheme
from modicum.quant.transform import TILES
from tests.bounds import assert_within, gamma
from tests.quant import reference
from tests.quant.samples import EVERY, integers, laplace, layer

EVERY_RANGE = RangeSettings(input="max")


def taps_of(scheme: Scheme) -> int:
    return scheme.taps if isinstance(scheme, WinogradScheme) else 3


def calibrated(scheme: Scheme, seed: int = 0, padding: int = 1) -> tuple[QuantConv1d, Tensor]:
    """A small layer with its ranges, and an input [2, 5, 17]."""
    x = laplace(torch.Generator().manual_seed(seed + 1), 2, 5, 17)
    quant = QuantConv1d.of(layer(seed, taps=taps_of(scheme), padding=padding), scheme, EVERY_RANGE)
    calibrate(quant, [x])
    return quant.eval(), x


def whole(seed: int, limit: int, *shape: int) -> Tensor:
    return integers(torch.Generator().manual_seed(seed), limit, *shape).double()


@pytest.mark.parametrize("scheme", EVERY)
def test_training_and_inference_agree_in_every_integer(scheme: Scheme) -> None:
    for seed in range(3):
        quant, x = calibrated(scheme, seed)
        sums, scale = quant.double().sums(x.double())
        integer = quant.convert()
        assert torch.equal(sums, sums.round())
        assert torch.equal(integer.sums(x.double()).double(), sums)
        assert torch.equal(integer(x.double()), quant(x.double()))
        assert int(integer.weights.abs().max()) == scheme.weight_limit
        inputs = integer.quantize(x.double())
        assert float(inputs.abs().max()) == scheme.input_limit
        assert scale.numel() in (1, 4, 4 * winograd_products(scheme))


def winograd_products(scheme: Scheme) -> int:
    return scheme.transform.products if isinstance(scheme, WinogradScheme) else 1


@pytest.mark.parametrize("scheme", EVERY)
def test_the_output_is_near_the_float_layer(scheme: Scheme) -> None:
    quant, x = calibrated(scheme)
    # No scheme here is worse than 3 dB, and a wrong scale or sign would leave no signal at all.
    assert sqnr(quant(x), quant.float_output(x)) > 3
    assert quant(x).shape == quant.float_output(x).shape


@pytest.mark.parametrize("tile", TILES)
@given(
    length=st.integers(1, 12),
    padding=st.tuples(st.integers(0, 4), st.integers(0, 4)),
    seed=st.integers(0, 2**31),
)
def test_exact_sums_are_those_of_direct_convolution(
    tile: tuple[int, int], length: int, padding: tuple[int, int], seed: int
) -> None:
    taps = tile[1]
    length = max(length, taps)
    x, weight = whole(seed, 127, 1, 2, length), whole(seed + 1, 31, 2, 2, taps)
    conv = ConvSettings(taps, padding)
    scheme = ExactWinograd(31, *tile)
    scheme.check(conv, 2)
    found = scheme.sums(x, weight, conv, conv.out_length(length))
    expected = reference.convolve(x[0].int().tolist(), weight.int().tolist(), padding)
    assert found[0].tolist() == expected


@pytest.mark.parametrize("kind", [RangeLimitedWinograd, RSQWinograd])
@pytest.mark.parametrize("tile", TILES)
@given(
    length=st.integers(1, 12), padding=st.integers(0, 3), seed=st.integers(0, 2**31), alpha=st.floats(1, 4)
)
def test_sums_and_clipped_values_are_those_of_the_loops(
    kind: Any, tile: tuple[int, int], length: int, padding: int, seed: int, alpha: float
) -> None:
    from modicum.quant.saturation import SaturationCounter

    transform = winograd_transform(*tile)
    scheme = kind(127, *tile, **({"alpha": alpha} if kind is RSQWinograd else {}))
    length = max(length, tile[1])
    x = whole(seed, scheme.input_limit, 1, 2, length)
    filters = whole(seed + 1, 127, transform.products, 2, 2)
    conv, counter = ConvSettings(tile[1], (padding, padding)), SaturationCounter()
    found = scheme.sums(x, filters, conv, conv.out_length(length), counter)
    rows, clipped = reference.winograd_sums(
        x[0].int().tolist(), filters.int().tolist(), transform, (padding, padding)
    )
    assert (found[0] / scheme.denominator).tolist() == [[float(y) for y in row] for row in rows]
    if kind is RSQWinograd:
        tiles = -(-conv.out_length(length) // tile[0])
        assert int(counter.num_saturated) == clipped
        assert int(counter.num_values) == tiles * 2 * transform.products
    else:
        assert clipped == 0  # the limited range leaves nothing to clip


def test_clipping_happens_and_is_counted_in_a_layer() -> None:
    quant, _ = calibrated(RSQWinograd(alpha=2.0))
    x = torch.zeros(1, 5, 6)
    quant.input_quant.step.fill_(1 / 126)
    x[0, 0] = torch.tensor([1.0, 1, -1, 1, 1, 1])  # d0 - d2 = 252, d1 + d2 = 0, d2 - d1 = -252, …
    with counting(quant):
        quant(x)
    data = reference.tiles_of(
        [[0 if v == 0 else int(126 * v) for v in row] for row in x[0].tolist()], 2, 3, (1, 1)
    )
    expected = sum(
        not -128 <= v <= 127
        for channels in data
        for tile in channels
        for v in reference.product(winograd_transform(2, 3).input, tile)
    )
    assert expected > 0
    assert quant.saturation_rate == expected / (3 * 5 * 4)
    quant(x)
    assert quant.saturation_rate == expected / (3 * 5 * 4)  # counted while it is open only


@pytest.mark.parametrize("tile", TILES)
def test_alpha_of_one_is_the_limited_scheme_bit_for_bit(tile: tuple[int, int]) -> None:
    results = []
    for scheme in (RangeLimitedWinograd(127, *tile), RSQWinograd(127, *tile, alpha=1.0)):
        quant, x = calibrated(scheme)
        x.requires_grad_()
        out = quant(x)
        out.square().sum().backward()
        assert x.grad is not None
        assert quant.weight.grad is not None
        results.append((out, x.grad.clone(), quant.weight.grad.clone(), quant.convert()(x.detach())))
    for one, other in zip(*results, strict=True):
        assert torch.equal(one, other)


@given(seed=st.integers(0, 2**31), length=st.integers(3, 20), padding=st.integers(0, 3))
def test_limited_sums_of_whole_filters_are_direct_convolution(seed: int, length: int, padding: int) -> None:
    """With ±63 inputs and ±42 weights 2·G w is int8 exactly, and nothing is rounded on the way."""
    x, weight = whole(seed, 63, 1, 3, length), whole(seed + 1, 42, 2, 3, 3)
    conv = ConvSettings(3, (padding, padding))
    scheme = RangeLimitedWinograd()
    filters = 2 * scheme.prepare_weight(weight)
    assert float(filters.abs().max()) <= 127
    found = scheme.sums(x, filters, conv, conv.out_length(length))
    assert torch.equal(found, 2 * direct_conv1d(x, weight, conv))


def test_tapwise_sums_are_products_of_integers() -> None:
    scheme = TapwiseWinograd()
    quant, x = calibrated(scheme)
    integer = quant.convert()
    inputs, filters = integer.quantize(x).int().tolist(), integer.weights.int().tolist()
    found = integer.sums(x)  # [n, N, K, P]
    for i in range(4):
        for n in range(2):
            for k in range(4):
                for p in range(found.shape[-1]):
                    expected = sum(filters[i][k][c] * inputs[i][n][c][p] for c in range(5))
                    assert int(found[i, n, k, p]) == expected
    # Each tap has its own scale, and uses its whole range.
    assert integer.quantize(x).abs().amax((1, 2, 3)).tolist() == [127] * 4
    assert integer.weights.abs().amax(2).unique().tolist() == [127]


@pytest.mark.parametrize("scheme", [scheme for scheme in EVERY if "tapwise" not in str(scheme.id)])
def test_gradients_are_those_of_convolution_with_the_rounded_weights(scheme: Scheme) -> None:
    """Straight through the input's rounding: by x the layer is linear, with weights that the sums define."""
    if isinstance(scheme, RSQWinograd):
        scheme = replace(scheme, alpha=1.0)
    quant, x = calibrated(scheme)
    quant = quant.double()
    # Nothing is clipped: the largest input, which is at ±Q but for a rounding, is made smaller.
    x = (0.9 * x.double()).requires_grad_()
    upstream = laplace(torch.Generator().manual_seed(9), *quant(x).shape).double()
    (quant(x) * upstream).sum().backward()
    assert x.grad is not None
    n, c, t = 1, 2, 7
    # The response to one unit of one input integer, by the scheme's own sums of integers, times its scales.
    unit = torch.zeros_like(x)
    unit[n, c, t] = 1
    with torch.no_grad():
        weights, weight_scale = quant.quantize_weight()
        length = quant.conv.out_length(x.shape[-1])
        unrounded = 840 * unit  # so many that V is whole for every tile, and nothing is rounded
        sums = unclipped(scheme, unrounded, weights, quant.conv, length)
        response = sums / 840 * scheme.output_scale(torch.ones(()), weight_scale)
    expected = (response * upstream).sum()
    size = (response.abs() * upstream.abs()).sum() * 15 * 67  # terms are larger than sums by the growths
    assert_within(x.grad[n, c, t], expected, gamma(500, torch.float64) * size)


def unclipped(scheme: Any, x: Tensor, weights: Tensor, conv: ConvSettings, length: int) -> Tensor:
    if isinstance(scheme, RSQWinograd):
        scheme = RangeLimitedWinograd(scheme.weight_limit, scheme.outputs, scheme.taps)
    found: Tensor = scheme.sums(x, weights, conv, length)
    return found


@pytest.mark.parametrize("scheme", EVERY)
def test_training_lowers_the_noise(scheme: Scheme) -> None:
    quant, x = calibrated(scheme)
    quant.train()
    target = quant.float_output(x).detach()
    optimizer = torch.optim.Adam(quant.parameters(), 1e-3)
    losses = []
    for _ in range(60):
        loss = (quant(x) - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert min(losses[1:]) < 0.95 * losses[0]


def noise_table(tile: tuple[int, int]) -> dict[str, float]:
    """SQNR of each scheme, in dB: 128 channels to 64 filters, Laplace weights, half-Laplace activations."""
    generator = torch.Generator().manual_seed(0)
    x = laplace(generator, 1, 128, 400).abs()
    conv = nn.Conv1d(128, 64, tile[1], padding=tile[1] // 2, bias=False)
    with torch.no_grad():
        conv.weight.copy_(laplace(generator, *conv.weight.shape))
    found = {}
    for name, scheme in {
        "direct": DirectInt8(),
        "exact6": ExactWinograd(31, *tile),
        "limited": RangeLimitedWinograd(127, *tile),
        "rsq1.5": RSQWinograd(127, *tile, alpha=1.5),
        "rsq2": RSQWinograd(127, *tile, alpha=2.0),
        "searched": RSQWinograd(127, *tile),
        "tensor": TapwiseWinograd(127, *tile, is_per_tap=False),
        "tapwise": TapwiseWinograd(127, *tile),
    }.items():
        quant = QuantConv1d.of(conv, scheme, EVERY_RANGE)
        calibrate(quant, [x])
        if name == "searched":
            search_alphas(quant, [x])
        with torch.no_grad():
            found[name] = sqnr(quant.eval()(x), quant.float_output(x))
    return found


@pytest.mark.parametrize("tile", TILES)
def test_noise_is_ordered_as_the_design_measured_it(tile: tuple[int, int]) -> None:
    table = noise_table(tile)
    assert table["limited"] < table["rsq1.5"] < table["rsq2"]  # a larger range, less rounding
    assert max(table["limited"], table["rsq1.5"]) < table["searched"]
    assert table["tensor"] < table["tapwise"]
    if tile != (6, 3):  # not in the design's table; one scale for its taps is as bad as a limited range
        assert table["limited"] < table["tensor"]
    assert table["exact6"] < table["direct"]
    if tile == (2, 3):
        # Range scaling alone regains direct int8, to a decibel or so; so does a scale for each tap.
        assert abs(table["searched"] - table["direct"]) < 1.5
        assert abs(table["tapwise"] - table["direct"]) < 1.5
    else:
        assert table["searched"] < table["tapwise"] < table["direct"]


@pytest.mark.parametrize("tile", [(2, 3), (4, 3), (2, 5)])
def test_exact_in_eight_bits_has_the_noise_of_direct(tile: tuple[int, int]) -> None:
    one, x = calibrated(ExactWinograd(127, *tile))
    conv = layer(0, taps=tile[1])
    other = QuantConv1d.of(conv, DirectInt8(), EVERY_RANGE)
    calibrate(other, [x])
    assert torch.equal(one.convert().sums(x), other.eval().convert().sums(x))


def test_what_schemes_refuse() -> None:
    for alpha in (0.9, math.nan, math.inf, -1.0):
        with pytest.raises(InputError, match="alpha is"):
            RSQWinograd(alpha=alpha)
    for kind in SCHEMES.values():
        for limit in (0, 128, 255, -1, 31.5, True):
            with pytest.raises(
                InputError, match=f"the weights' limit is {limit}: give a whole number of 1 to"
            ):
                kind(weight_limit=limit)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="past 16 or 32 bits: lower the weights' limit"):
        ExactWinograd(127, 6, 3).check(ConvSettings(3), 64)
    for conv in (nn.Conv1d(4, 4, 3, stride=2), nn.Conv1d(4, 4, 3, groups=2), nn.Conv1d(4, 4, 5)):
        with pytest.raises(InputError, match=r"F\(2,3\) cannot compute"):
            QuantConv1d.of(conv, RSQWinograd())


@pytest.mark.parametrize("limit", range(63, 128))
def test_every_integer_range_has_its_alpha(limit: int) -> None:
    assert RSQWinograd(alpha=limit / 63).input_limit == limit
    assert RSQWinograd(alpha=5.0).input_limit == 127
