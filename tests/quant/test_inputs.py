"""What layers are given: shapes, dtypes, nan, gradients; both forms and both backends alike."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from modicum.errors import InputError
from modicum.quant import (
    DirectInt8,
    ExactWinograd,
    FakeQuant,
    FakeQuantSettings,
    IntegerConv1d,
    QuantConv1d,
    RangeSettings,
    RSQWinograd,
    TapwiseWinograd,
    calibrate,
    quantize_model,
    search_alphas,
)
from modicum.quant.native import NativeConv
from modicum.quant.schemes import Scheme
from tests.quant.samples import integers, kernels_or_skip, laplace, layer

SCHEMES = [DirectInt8(), ExactWinograd(), RSQWinograd(alpha=1.5), TapwiseWinograd()]
HALVES = [torch.float16, torch.bfloat16]


def forms(scheme: Scheme, dtype: torch.dtype = torch.float32, size: float = 1.0) -> tuple[list[Any], Tensor]:
    """A layer in training form and converted, by torch and (if there are kernels) natively; an input."""
    x = (size * laplace(torch.Generator().manual_seed(1), 2, 5, 17)).to(dtype)
    quant = QuantConv1d.of(layer().to(dtype), scheme, RangeSettings(input="max"), "layer 7").eval()
    calibrate(quant, [x])
    found: list[Any] = [quant]
    for backend in ("torch", "auto"):
        integer = quant.convert()
        integer.backend = backend  # type: ignore[assignment]  # one of them
        found.append(integer)
    return found, x


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_other_shapes_are_refused_in_words(scheme: Scheme) -> None:
    for form in forms(scheme)[0]:
        for shape in ((2, 4, 17), (2, 6, 17), (2, 17, 5), (17,), (1, 2, 5, 17), (4, 17)):
            with pytest.raises(
                InputError, match=r"layer 7 was given an input of shape .*: give \[N, 5, T\] or"
            ):
                form(torch.zeros(shape))
        with pytest.raises(InputError, match=r"layer 7 was given an input of torch\.int64"):
            form(torch.zeros((1, 5, 17), dtype=torch.int64))


def test_the_kernels_themselves_compare_sizes() -> None:
    kernels = kernels_or_skip()
    weight = integers(torch.Generator().manual_seed(0), 127, 3, 6, 1)
    conv = NativeConv(weight, layer_settings(), "direct", 127, kernels)
    with pytest.raises(InputError, match="with 6 channels"):
        conv.sums(torch.zeros(1, 5, 9), 1.0)
    rows, result = torch.zeros(9, 6, dtype=torch.int8), torch.zeros(9, 3, dtype=torch.int32)
    conv.of_rows(rows, result, None, None)
    for wrong in ((rows[:, :5], result), (rows, result[:8]), (rows, result.float()), (rows.int(), result)):
        with pytest.raises(InputError, match="the kernels were given"):
            conv.of_rows(*wrong, None, None)
    with pytest.raises(InputError, match="contiguous"):
        conv.of_rows(rows.T.contiguous().T, result, None, None)
    with pytest.raises(InputError, match=r"give float32 \[C, T\] on a CPU"):
        kernels.quantize(torch.zeros(6, 9).double(), 1.0, 127)


def layer_settings() -> Any:
    from modicum.quant import ConvSettings

    return ConvSettings(1)


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_a_sequence_without_a_batch(scheme: Scheme) -> None:
    found, x = forms(scheme)
    for form in found:
        assert torch.equal(form(x[1]), form(x[1:])[0])
    assert torch.equal(found[0].float_output(x[1]), found[0].float_output(x[1:])[0])


def test_alpha_is_searched_without_a_batch() -> None:
    x = laplace(torch.Generator().manual_seed(1), 5, 17)
    alphas = []
    for batch in (x, x[None]):
        quant = quantize_model(layer())
        calibrate(quant, [batch])
        alphas.append(search_alphas(quant, [batch]))
    assert alphas[0] == alphas[1]


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("size", [1.0, 1e-2, 100.0])
def test_half_precision_is_computed_in_float32(scheme: Scheme, dtype: torch.dtype, size: float) -> None:
    """The same numbers as the float32 layer with the same weights, rounded once."""
    (quant, *integer), x = forms(scheme, dtype, size)
    exact = QuantConv1d.of(layer().to(dtype).float(), scheme, RangeSettings(input="max")).eval()
    calibrate(exact, [x.float()])
    expected = exact(x.float()).to(dtype)
    assert expected.isfinite().all()
    for form in (quant, *integer):
        assert form(x).dtype == dtype
        assert torch.equal(form(x), expected)
    # Casting a converted float32 layer does not round its scales.
    assert torch.equal(exact.convert().to(dtype)(x), expected)


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_autocast_leaves_sums_alone(scheme: Scheme) -> None:
    found, x = forms(scheme)
    for form in found:
        expected, sums = form(x), form.sums(x)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert torch.equal(form(x), expected)
            for one, other in zip(form.sums(x), sums, strict=True):
                assert torch.equal(one, other)


@pytest.mark.parametrize("method", ["ema", "lsq"])
def test_half_precision_is_trained(method: Any) -> None:
    conv = layer().half()
    quant = QuantConv1d.of(conv, RSQWinograd(), RangeSettings(method, method))
    x = laplace(torch.Generator().manual_seed(1), 2, 5, 17).half().requires_grad_()
    calibrate(quant, [x])
    quant.train()(x).float().square().mean().backward()
    assert quant.input_quant.step.dtype == torch.float32
    for tensor in (x, *quant.parameters()):
        assert tensor.grad is not None
        assert tensor.grad.isfinite().all()


def test_a_fake_quantiser_of_float16_keeps_its_step() -> None:
    quant = FakeQuant(FakeQuantSettings(127, "max")).half()
    x = torch.tensor([1e-4, -4e-5], dtype=torch.float16)
    quant.observe(x)
    expected = [127, round(127 * float(x[1]) / float(x[0]))]
    assert quant.half().quantize(x)[0].tolist() == expected
    assert quant(x).dtype == torch.float16


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_nan_is_refused_and_infinity_clipped_by_both_backends(scheme: Scheme) -> None:
    (_, *found), x = forms(scheme)
    x[0, 1, 3], x[1, 2, 3] = math.inf, -math.inf
    if isinstance(scheme, TapwiseWinograd):  # its transform of infinite inputs is nan
        with pytest.raises(InputError, match="layer 7 was given values that are not numbers"):
            found[0](x)
    else:
        assert torch.equal(found[0](x), found[1](x))
        assert torch.equal(found[0](x), found[0](x.clamp(-1e6, 1e6)))
    x[1, 4, 16] = math.nan
    for form in found:
        for call in (form, form.sums, form.quantize):
            with pytest.raises(InputError, match="layer 7 was given values that are not numbers"):
                call(x)


def test_gradients_do_not_stop_silently() -> None:
    (quant, *found), x = forms(RSQWinograd())
    x.requires_grad_()
    quant(x).sum().backward()
    for form in found:
        with pytest.raises(InputError, match=r"layer 7 .* has no gradients.* torch\.no_grad"):
            form(x)
        with torch.no_grad():
            form(x)
        form(x.detach())


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
@pytest.mark.parametrize("method", ["max", "ema", "mse", "lsq"])
def test_a_batch_of_none(scheme: Scheme, method: Any) -> None:
    (_, *integer), x = forms(scheme)
    quant = QuantConv1d.of(layer(), scheme, RangeSettings(input=method))
    calibrate(quant, [x, x[:0]])
    scale = quant.input_quant.scale.clone()
    for form in (quant.train(), *integer):
        assert form(x[:0]).shape == (0, 4, 17)
    assert torch.equal(quant.input_quant.scale, scale)


def test_layers_that_were_made_in_inference_mode() -> None:
    x = laplace(torch.Generator().manual_seed(1), 2, 5, 17)
    (quant, integer, _), _ = forms(RSQWinograd())
    conv = layer()
    with torch.inference_mode():
        converted, copied, inner = quant.convert(), copy.deepcopy(integer), quantize_model(conv)
        copied.backend = "auto"
        moved = copy.deepcopy(integer).half().float()
    for form in (converted, copied, moved):
        assert not any(buffer.is_inference() for buffer in form.buffers())
        assert torch.equal(form(x), integer(x))
        form.load_state_dict({**form.state_dict(), "weights": -integer.weights})
        negative = form.sums(x)
        assert torch.equal(negative, -integer.sums(x))
        with torch.inference_mode():
            form.load_state_dict({**form.state_dict(), "weights": integer.weights})
        assert torch.equal(form(x), integer(x))
    calibrate(inner, [x])
    inner.train()(x).sum().backward()
    assert isinstance(inner, QuantConv1d)
    assert isinstance(converted, IntegerConv1d)
