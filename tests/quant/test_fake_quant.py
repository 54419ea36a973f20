"""Fake quantisation: integers, ranges, gradients, clipped values."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from modicum.errors import InputError
from modicum.quant import FakeQuant, FakeQuantSettings
from tests.bounds import assert_within, exactly, gamma
from tests.quant.samples import laplace

limits = st.sampled_from([1, 12, 31, 63, 127, 1270])


def sample(seed: int, *shape: int) -> Tensor:
    return laplace(torch.Generator().manual_seed(seed), *shape)


def quantizer(
    limit: int = 127, method: str = "max", momentum: float = 0.1, shape: tuple[int, ...] = ()
) -> FakeQuant:
    return FakeQuant(FakeQuantSettings(limit, method, momentum), shape, "layer 7")  # type: ignore[arg-type]


@given(seed=st.integers(0, 2**31), limit=limits, reach=st.floats(0.05, 3))
def test_integers_are_rounded_and_clipped(seed: int, limit: int, reach: float) -> None:
    x = sample(seed, 40)
    quant = quantizer(limit)
    quant.observe(torch.tensor([reach]))
    quant.is_counting = True
    integers, scale = quant.quantize(x)
    quant.is_counting = False
    inverse = scale.reciprocal()
    expected, clipped = [], 0
    for value in (x * inverse).tolist():
        rounded = round(value)  # Python rounds halves to even, too
        clipped += abs(rounded) > limit
        expected.append(max(-limit, min(limit, rounded)))
    assert integers.tolist() == expected
    assert torch.equal(quant(x), integers * scale)
    counter = quant.counter
    assert (int(counter.num_saturated), int(counter.num_values)) == (clipped, 40)
    assert float(scale) == exactly_float32(reach / limit)


def exactly_float32(value: float) -> object:
    return pytest.approx(value, rel=gamma(3, torch.float32))


def test_clipped_values_are_counted_only_when_asked() -> None:
    quant = quantizer(63)
    quant.observe(torch.tensor([1.0]))
    x = torch.tensor([0.5, 1.0, 1.007, 1.009, -3.0])  # 63.44 is rounded to 63, 63.6 is not
    quant.quantize(x)
    assert int(quant.counter.num_values) == 0
    assert quant.counter.rate == 0
    quant.is_counting = True
    quant.quantize(x)
    quant.quantize(x[:3])
    assert (int(quant.counter.num_saturated), int(quant.counter.num_values)) == (2, 8)
    assert quant.counter.rate == 0.25
    quant.counter.reset()
    assert quant.counter.rate == 0


@pytest.mark.parametrize("shape", [(), (3, 1, 1), (1, 4, 1), (3, 4, 1)])
def test_each_scale_is_of_its_own_part(shape: tuple[int, ...]) -> None:
    x = sample(1, 3, 4, 5)
    quant = quantizer(shape=shape)
    quant.observe(x)
    for i in range(3):
        for j in range(4):
            part = x
            if shape and shape[0] > 1:
                part = part[i : i + 1]
            if shape and shape[1] > 1:
                part = part[:, j : j + 1]
            scale = quant.scale.expand(3, 4, 1)[i, j] if shape else quant.scale
            assert float(scale) == exactly_float32(float(part.abs().max()) / 127)


def test_one_scale_for_each_tap_of_many_dimensions() -> None:
    x = sample(2, 6, 2, 3, 7)
    quant = quantizer(shape=(6, 1, 1, 1))
    quant.observe(x)
    assert torch.equal(quant.scale.flatten(), x.abs().flatten(1).max(1).values / 127)


def test_the_largest_range_so_far() -> None:
    quant = quantizer(method="max")
    for largest, expected in ((2.0, 2.0), (1.0, 2.0), (3.0, 3.0)):
        quant.observe(torch.tensor([-largest, 0.5]))
        assert float(quant.scale) == exactly_float32(expected / 127)


@given(st.lists(st.floats(0.125, 10, width=32), min_size=1, max_size=8), st.floats(0.05, 1))
def test_a_moving_average(values: list[float], momentum: float) -> None:
    quant = quantizer(method="ema", momentum=momentum)
    expected = values[0]
    for value in values:
        quant.observe(torch.tensor([value, -value / 2]))
        expected += momentum * (value - expected)
    # Four roundings a batch, of numbers up to the largest.
    error = gamma(4 * len(values) + 2, torch.float32) * 2 * max(values) / 127
    assert_within(quant.scale.double(), torch.tensor(expected / 127).double(), error)


def squared_error(x: list[float], reach: float, limit: int) -> float:
    scale = reach / limit
    return math.fsum((max(-limit, min(limit, round(v / scale))) * scale - v) ** 2 for v in x)


@pytest.mark.parametrize("limit", [3, 7, 31])
def test_the_range_of_the_least_error(limit: int) -> None:
    x = sample(3, 400)
    quant = quantizer(limit, "mse", 1.0)
    quant.observe(x)
    largest, values = float(x.abs().max()), x.double().tolist()
    errors = {step: squared_error(values, largest * step / 64, limit) for step in range(1, 65)}
    best = min(errors, key=lambda step: errors[step])
    found = round(float(quant.scale) * limit / largest * 64)
    # Computed in float32 there, so one that is as good to its rounding will do.
    assert errors[found] <= errors[best] * (1 + gamma(2 * 400, torch.float32))
    assert best < 64  # clipping pays here: the largest value alone would not be found
    assert float(quant.scale) == exactly_float32(largest * found / 64 / limit)


@given(seed=st.integers(0, 2**31), limit=limits)
def test_the_gradient_of_a_learned_step(seed: int, limit: int) -> None:
    """Esser et al. 2020, equation 3: round(v) - v inside, ±Q outside, times 1 / sqrt(N · Q)."""
    x = sample(seed, 50).double().requires_grad_()
    quant = quantizer(limit, "lsq").double()
    quant.observe(x)
    assert float(quant.step.detach()) == exactly(2 * float(x.detach().abs().mean()) / math.sqrt(limit), 200)
    with torch.no_grad():
        quant.step.mul_(0.6)
    upstream = sample(seed + 1, 50).double()
    (quant(x) * upstream).sum().backward()
    step, total = float(quant.step.detach()), 0.0
    passed, size = [], 0.0
    for value, gradient in zip(x.tolist(), upstream.tolist(), strict=True):
        v = value / step
        inside = abs(v) <= limit
        passed.append(gradient * inside)
        slope = round(v) - v if inside else math.copysign(limit, v)
        total += gradient * slope
        size += abs(gradient) * (abs(v) + limit)
    factor = 1 / math.sqrt(50 * limit)
    assert quant.step.grad is not None
    assert abs(float(quant.step.grad) - total * factor) <= gamma(200, torch.float64) * size * factor
    assert x.grad is not None
    # The gradient by x is the upstream one: times the scale, times its reciprocal.
    assert_within(x.grad, torch.tensor(passed).double(), gamma(4, torch.float64) * upstream.abs())


def test_a_learned_step_is_trained_and_stays_positive() -> None:
    quant = quantizer(7, "lsq")
    x = sample(5, 1000)
    quant.observe(x)
    first = (quant(x) - x).square().mean().item()
    optimizer = torch.optim.SGD(quant.parameters(), 1.0)
    for _ in range(200):
        optimizer.zero_grad()
        (quant(x) - x).square().mean().backward()
        optimizer.step()
    assert (quant(x) - x).square().mean().item() < 0.8 * first
    with torch.no_grad():
        quant.step.neg_()
    assert float(quant.scale) > 0


def test_another_limit_keeps_the_range() -> None:
    for method in ("max", "lsq"):
        quant = quantizer(63, method)
        quant.observe(sample(6, 30))
        reach = float(quant.scale.detach() * 63)
        quant.set_limit(126)
        assert float(quant.scale.detach() * 126) == exactly_float32(reach)


def test_zeros_are_quantised_to_zeros() -> None:
    quant = quantizer(shape=(2, 1))
    x = torch.tensor([[0.0, 0.0], [1.0, -1.0]])
    quant.observe(x)
    assert torch.equal(quant.quantize(x)[0], torch.tensor([[0.0, 0.0], [127.0, -127.0]]))


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_is_not_a_number_names_the_layer(value: float) -> None:
    quant = quantizer(method="ema")
    with pytest.raises(InputError, match="layer 7 was given values that are not finite"):
        quant.observe(torch.tensor([1.0, value]))
    assert not quant.is_calibrated


def test_without_a_range_and_with_bad_settings() -> None:
    with pytest.raises(InputError, match=r"layer 7 has no range yet: run modicum\.quant\.calibrate"):
        quantizer().quantize(torch.ones(2))
    for wrong, message in (
        ({"limit": 0}, "the limit is 0: give a whole number of 1 to 32,767"),
        ({"limit": 12.5}, "the limit is 12.5"),
        ({"limit": 40_000}, "the limit is 40000"),
        ({"method": "minmax"}, "choose one of max, ema, mse, lsq"),
        ({"momentum": 0.0}, "the momentum is 0.0"),
        ({"momentum": math.nan}, "the momentum is nan"),
    ):
        with pytest.raises(InputError, match=message):
            FakeQuantSettings(**wrong)  # type: ignore[arg-type]
