"""Calibration of whole models, and the search for α."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from modicum.errors import InputError
from modicum.quant import (
    QuantSettings,
    RSQWinograd,
    calibrate,
    counting,
    quantize_model,
    search_alphas,
    sqnr,
)
from modicum.quant.calibration import quantized_layers
from tests.quant.samples import laplace


def model(scheme: str = "rsq") -> nn.Module:
    torch.manual_seed(0)
    layers = nn.Sequential(
        nn.Conv1d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv1d(8, 8, 3, padding=1), nn.ReLU(), nn.Conv1d(8, 2, 3)
    )
    return quantize_model(layers, QuantSettings(scheme))


def batches(number: int = 3) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [laplace(generator, 2, 3, 40) for _ in range(number)]


def test_every_layer_gets_its_range() -> None:
    quant = model().train()
    layers = quantized_layers(quant)
    assert list(layers) == ["0", "2", "4"]
    assert not any(layer.input_quant.is_calibrated for layer in layers.values())
    calibrate(quant, batches())
    assert all(layer.input_quant.is_calibrated for layer in layers.values())
    assert quant.training
    first = layers["0"].input_quant
    expected = torch.tensor(0.0)
    for number, batch in enumerate(batches()):
        largest = batch.abs().max()
        expected = largest if number == 0 else expected + 0.1 * (largest - expected)
    torch.testing.assert_close(first.scale * first.limit, expected)
    quant[0].eval()  # type: ignore[index, operator]
    calibrate(quant, batches())
    assert [module.training for module in quant] == [False, True, True, True, True]  # type: ignore[union-attr]
    quant.train()
    # In evaluation it stays; in training it follows.
    scale = first.scale.clone()
    quant.eval()(100 * batches()[0])
    assert torch.equal(first.scale, scale)
    quant.train()(100 * batches()[0])
    assert float(first.scale) > float(scale)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_layer_that_is_given_nan_is_named(value: float) -> None:
    quant = model()
    broken = batches()[0]
    broken[0, 0, 5] = value
    with pytest.raises(InputError, match="the input of 0 was given values that are not finite"):
        calibrate(quant, [broken])
    calibrate(quant, batches())
    with pytest.raises(InputError, match="the input of 0 was given values that are not finite"):
        search_alphas(quant, [broken])
    with torch.no_grad():
        quant[2].weight[0, 0, 0] = value  # type: ignore[index, union-attr, operator]
    with pytest.raises(InputError, match="the weights of 2 was given values"):
        calibrate(quant, batches())
    assert not quantized_layers(quant)["0"].is_calibrating


def test_alpha_is_the_best_within_the_rate() -> None:
    """Against trying each α by itself, in a model of one layer."""
    quant = quantize_model(nn.Conv1d(3, 8, 3, padding=1), QuantSettings("rsq"))
    layer = quantized_layers(quant)[""]
    calibrate(quant, batches())
    scheme = layer.scheme
    assert isinstance(scheme, RSQWinograd)
    for max_rate in (0.0, 1e-3, 0.02, 0.5):
        rates, noises = {}, {}
        for limit in range(63, 128):
            layer.set_scheme(replace(scheme, alpha=limit / 63))
            with counting(quant), torch.no_grad():
                outputs = [quant.eval()(batch) for batch in batches()]
            rates[limit] = layer.saturation_rate
            exact = [layer.float_output(batch) for batch in batches()]
            noises[limit] = sqnr(torch.cat(outputs), torch.cat(exact))
        layer.set_scheme(replace(scheme, alpha=1.0))
        allowed = [limit for limit in rates if rates[limit] <= max_rate]
        assert search_alphas(quant, batches(), max_rate, refine=False) == {"": max(allowed) / 63}
        (best,) = search_alphas(quant, batches(), max_rate).values()
        assert abs(noises[round(best * 63)] - max(noises[limit] for limit in allowed)) < 1e-3
        assert isinstance(layer.scheme, RSQWinograd)
        assert layer.scheme.alpha == best
        assert layer.input_quant.limit == layer.scheme.input_limit
    assert rates[63] == 0
    assert rates[127] > 0.001


def test_alphas_of_a_model_lower_its_noise() -> None:
    quant = model()
    calibrate(quant, batches())
    torch.manual_seed(0)
    exact = nn.Sequential(
        nn.Conv1d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv1d(8, 8, 3, padding=1), nn.ReLU(), nn.Conv1d(8, 2, 3)
    )
    x = torch.cat(batches())
    with torch.no_grad():
        before = sqnr(quant.eval()(x), exact(x))
        alphas = search_alphas(quant, batches())
        after = sqnr(quant(x), exact(x))
    assert alphas.keys() == {"0", "2", "4"}
    assert all(1 <= alpha <= 127 / 63 for alpha in alphas.values())
    assert after > before


def test_what_calibration_refuses() -> None:
    with pytest.raises(InputError, match=r"no quantised layer: run modicum\.quant\.quantize_model"):
        calibrate(nn.Conv1d(1, 1, 3), batches())
    with pytest.raises(InputError, match="there is no batch to calibrate with"):
        calibrate(model(), [])
    with pytest.raises(InputError, match="has no range yet"):
        model().eval()(batches()[0])
    with pytest.raises(InputError, match="has no range yet"):
        search_alphas(model(), batches())
    quant = model("direct")
    calibrate(quant, batches())
    with pytest.raises(InputError, match="0 RSQ layers, 3 batches"):
        search_alphas(quant, batches())
    with pytest.raises(InputError, match="the largest saturation rate is -1"):
        search_alphas(model(), batches(), -1)
