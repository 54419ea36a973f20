"""Integer models: described as JSON, and made again from that and a state dict."""

from __future__ import annotations

import json

import pytest
import torch
from torch import nn

from modicum.errors import ModelError
from modicum.quant import (
    ConvSettings,
    ExactWinograd,
    IntegerConv1d,
    QuantSettings,
    calibrate,
    convert_model,
    quantize_model,
)
from modicum.quant.convolution import direct_conv1d
from modicum.quant.integer_model import describe_layers, integer_layers, restore_layers
from modicum.quant.schemes import SCHEMES


def built() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv1d(4, 6, 3, padding=1),
        nn.ReLU(),
        nn.Sequential(nn.Conv1d(6, 6, 3, padding=1, groups=2), nn.ReLU(), nn.Conv1d(6, 5, 3, bias=False)),
        nn.Conv1d(5, 3, 1),
    )


@pytest.mark.filterwarnings("ignore:direct int8 is used")
@pytest.mark.parametrize("scheme", sorted(SCHEMES))
def test_a_restored_model_is_the_converted_one_bit_for_bit(scheme: str) -> None:
    model, x = built(), torch.randn(2, 4, 13)
    options = {"alpha": 1.5} if scheme == "rsq" else {}
    quantize_model(model, QuantSettings(scheme, options=options))
    calibrate(model, [x])
    convert_model(model)
    described = json.loads(json.dumps(describe_layers(model)))
    assert list(described) == ["0", "2.0", "2.2", "3"]
    assert described["2.0"]["scheme"] == "direct"
    other = built()
    restore_layers(other, described)
    other.load_state_dict(model.state_dict())
    assert torch.equal(model(x), other(x))
    assert describe_layers(other) == described
    floats = dict(built().named_modules())
    for name, layer in integer_layers(model).items():
        assert layer.num_parameters == sum(p.numel() for p in floats[name].parameters())


@pytest.mark.parametrize(
    ("described", "message"),
    [
        ({"0": {"scheme": "fast"}}, "layer 0 has the scheme 'fast', which is not known"),
        ({"0": {}}, "layer 0 has the scheme None"),
        ({"9.1": {"scheme": "direct"}}, "layer 9.1 cannot be restored"),
        ({"1": {"scheme": "direct"}}, "layer 1 is a ReLU in the model, not a Conv1d"),
        ({"3": {"scheme": "rsq", "outputs": 2, "taps": 3}}, r"layer 3 cannot be restored \(.* 1 taps"),
        ({"0": {"scheme": "rsq", "wings": 2}}, "layer 0 cannot be restored"),
        ({"0": {"scheme": "rsq", "alpha": 0.5}}, r"layer 0 cannot be restored \(alpha is 0.5"),
    ],
)
def test_descriptions_of_another_model_are_refused(
    described: dict[str, dict[str, object]], message: str
) -> None:
    with pytest.raises(ModelError, match=message):
        restore_layers(built(), described)


def test_a_wide_exact_layer_sums_past_24_bits() -> None:
    """Sums past 2²⁴ are not exact in float32: the layer has to count all of its channels."""
    generator = torch.Generator().manual_seed(0)
    channels, conv = 512, ConvSettings(3, (1, 1))
    scheme = ExactWinograd(63)
    # Near their limits and of one sign, so that (d1 + d2) · (g0 + g1 + g2) sums up to some 21 million.
    weights = torch.randint(60, 64, (4, channels, 3), generator=generator, dtype=torch.int8)
    x = torch.randint(100, 128, (1, channels, 9), generator=generator).float()
    layer = IntegerConv1d(scheme, conv, weights, (torch.tensor(1.0), torch.ones(4, 1, 1)), None)
    assert layer.channels == channels
    expected = direct_conv1d(x.double(), weights.double(), conv).to(torch.int64)
    assert torch.equal(layer.sums(x).long(), expected)
