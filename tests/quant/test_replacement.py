"""Whole models: which layers are replaced by what."""

from __future__ import annotations

import copy
import pickle
import warnings
from pathlib import Path

import pytest
import torch
from torch import nn

from modicum.errors import InputError
from modicum.quant import (
    DirectInt8,
    FakeQuant,
    FakeQuantSettings,
    IntegerConv1d,
    QuantConv1d,
    QuantSettings,
    RangeSettings,
    RSQWinograd,
    calibrate,
    convert_model,
    quantize_model,
    search_alphas,
    sqnr,
)
from modicum.quant.calibration import quantized_layers
from modicum.quant.schemes import SCHEMES
from tests.quant.samples import laplace


class Mixed(nn.Module):
    """Layers that Winograd can compute and layers that it cannot."""

    def __init__(self) -> None:
        super().__init__()
        self.strided = nn.Conv1d(4, 6, 3, stride=2, padding=1)
        self.blocks = nn.ModuleList(
            [nn.Conv1d(6, 6, 3, padding=1), nn.Conv1d(6, 6, 3, dilation=2, padding=2)]
        )
        self.depthwise = nn.Conv1d(6, 6, 3, groups=6, padding=1)
        self.wide = nn.Conv1d(6, 6, 5, padding=2)
        self.pointwise = nn.Conv1d(6, 3, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.strided(x)
        for block in self.blocks:
            x = block(x).relu()
        out: torch.Tensor = self.pointwise(self.wide(self.depthwise(x)))
        return out


def test_layers_that_tiles_cannot_compute_become_direct_and_that_is_said_once() -> None:
    with pytest.warns(UserWarning, match="direct int8 is used") as told:
        model = quantize_model(Mixed(), QuantSettings("rsq"))
    assert len(told) == 1
    assert str(told[0].message) == (
        "direct int8 is used for strided, blocks.1, depthwise, wide, pointwise: rsq takes stride, dilation "
        "and groups of 1 and 3 taps (give outputs to use it with other taps)"
    )
    assert quantized_layers(model)["wide"].scheme == DirectInt8()  # there is no kernel for 5 taps
    with pytest.warns(UserWarning, match="direct int8 is used") as told:
        model = quantize_model(Mixed(), QuantSettings("rsq", outputs=2))
    assert str(told[0].message) == (
        "direct int8 is used for strided, blocks.1, depthwise, pointwise: rsq with 2 outputs takes stride, "
        "dilation and groups of 1 and 3 or 5 taps"
    )
    found = {name: layer.scheme for name, layer in quantized_layers(model).items()}
    assert found == {
        "strided": DirectInt8(),
        "blocks.0": RSQWinograd(),
        "blocks.1": DirectInt8(),
        "depthwise": DirectInt8(),
        "wide": RSQWinograd(taps=5),
        "pointwise": DirectInt8(),
    }


@pytest.mark.filterwarnings("ignore:direct int8 is used")
@pytest.mark.parametrize("scheme", list(SCHEMES))
def test_a_model_is_quantised_and_converted(scheme: str) -> None:
    torch.manual_seed(0)
    model = Mixed()
    x = torch.randn(2, 4, 50)
    exact = model(x)
    options = {"weight_limit": 31} if scheme == "exact" else {}
    model = quantize_model(model, QuantSettings(scheme, options=options, ranges=RangeSettings(input="max")))
    assert isinstance(model, Mixed)
    calibrate(model, [x])
    with torch.no_grad():
        trained = model.eval()(x)
        converted = convert_model(model)(x)
    assert all(not isinstance(module, QuantConv1d) for module in model.modules())
    assert sum(isinstance(module, IntegerConv1d) for module in model.modules()) == 6
    assert sqnr(converted, trained) > 60  # sums beyond 2^24 could be rounded in training; there are none here
    assert sqnr(converted, exact) > 10


def test_weights_are_kept_and_a_layer_alone_is_replaced() -> None:
    conv = nn.Conv1d(2, 3, 3)
    quant = quantize_model(conv, QuantSettings("direct"))
    assert isinstance(quant, QuantConv1d)
    assert quant.weight is conv.weight
    doubled = {name: 2 * tensor for name, tensor in conv.state_dict().items()}
    missing, unexpected = quant.load_state_dict(doubled, strict=False)
    assert not unexpected
    assert not {"weight", "bias"} & set(missing)
    assert torch.equal(quant.weight, doubled["weight"])
    calibrate(quant, [torch.ones(1, 2, 5)])
    assert isinstance(convert_model(quant), IntegerConv1d)


def test_a_saved_layer_is_the_same_after_loading() -> None:
    x = torch.randn(1, 2, 9, generator=torch.Generator().manual_seed(0))
    first = quantize_model(nn.Conv1d(2, 3, 3), QuantSettings("tapwise"))
    calibrate(first, [x])
    second = quantize_model(nn.Conv1d(2, 3, 3), QuantSettings("tapwise"))
    second.load_state_dict(first.state_dict())
    assert torch.equal(first.eval()(x), second.eval()(x))


@pytest.mark.parametrize("is_converted", [False, True])
def test_a_searched_alpha_is_saved(is_converted: bool, tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    models = [quantize_model(nn.Sequential(nn.Conv1d(5, 4, 3), nn.ReLU(), nn.Conv1d(4, 2, 3))) for _ in "ab"]
    x = laplace(generator, 2, 5, 40)
    for model in models:
        calibrate(model, [torch.randn(2, 5, 40, generator=generator)])
    calibrate(models[0], [x])
    alphas = search_alphas(models[0], [x])
    assert max(alphas.values()) > 1
    if is_converted:
        for model in models:
            convert_model(model)
            model(x)  # packed for the kernels before it is loaded
    torch.save(models[0].state_dict(), tmp_path / "state.pt")
    models[1].load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    with torch.no_grad():
        assert torch.equal(models[0].eval()(x), models[1].eval()(x))
        if not is_converted:
            assert torch.equal(convert_model(models[0])(x), convert_model(models[1])(x))


@pytest.mark.parametrize("is_converted", [False, True])
def test_a_state_dict_of_another_scheme_is_refused_by_name(is_converted: bool) -> None:
    def state(settings: QuantSettings) -> nn.Module:
        model = quantize_model(nn.Sequential(nn.Conv1d(2, 3, 3)), settings)
        calibrate(model, [torch.ones(1, 2, 9)])
        return convert_model(model) if is_converted else model

    model = state(QuantSettings("rsq"))
    others = [QuantSettings("limited"), QuantSettings("rsq", options={"weight_limit": 31})]
    if not is_converted:  # else the weights' shapes differ, and torch refuses them
        others.append(QuantSettings("rsq", outputs=4))
    for other in others:
        with pytest.raises(
            InputError, match=r"0 has the scheme .*'rsq'.* quantise the model with the settings"
        ):
            model.load_state_dict(state(other).state_dict())
    saved = model.state_dict()
    with pytest.raises(InputError, match="0: the scheme in the state dict is damaged"):
        model.load_state_dict({**saved, "0._extra_state": torch.zeros(3)})
    del saved["0._extra_state"]
    with pytest.raises(RuntimeError, match=r"Missing key.*0\._extra_state"):
        model.load_state_dict(saved)


def test_a_fake_quantiser_saves_its_limit() -> None:
    first, second = FakeQuant(FakeQuantSettings(127, "max")), FakeQuant(FakeQuantSettings(127, "max"))
    x = torch.randn(20, generator=torch.Generator().manual_seed(0))
    first.observe(x)
    first.set_limit(31)
    second.load_state_dict(first.state_dict())
    assert torch.equal(first(x), second(x))
    with pytest.raises(InputError, match="the limit is 0"):
        second.load_state_dict({**first.state_dict(), "_extra_state": torch.tensor(0)})


class Shared(nn.Module):
    """One layer at two places, and another one with the same weights."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv1d(4, 4, 3, padding=1)
        self.again = self.first
        self.tied = nn.Conv1d(4, 4, 3, padding=1)
        self.tied.weight = self.first.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.tied(self.again(self.first(x)))
        return out


def test_what_is_shared_stays_shared() -> None:
    torch.manual_seed(0)
    exact = Shared()
    x = torch.randn(2, 4, 20)
    expected = exact(x)
    model = quantize_model(exact, QuantSettings("rsq", ranges=RangeSettings(weight="lsq")))
    assert isinstance(model, Shared)
    assert model.first is model.again
    assert isinstance(model.tied, QuantConv1d)
    assert model.tied.weight is model.first.weight
    calibrate(model, [x])
    model.train()(x).square().sum().backward()  # one layer twice in a graph
    assert model.first.weight.grad is not None
    with torch.no_grad():
        convert_model(model.eval())
        assert model.first is model.again
        assert sqnr(model(x), expected) > 15


def test_a_converted_model_can_be_copied_and_pickled() -> None:
    torch.manual_seed(0)
    model = quantize_model(nn.Sequential(nn.Conv1d(3, 4, 3), nn.Conv1d(4, 4, 3)))
    x = torch.randn(1, 3, 12)
    calibrate(model, [x])
    expected = convert_model(model)(x)
    assert torch.equal(copy.deepcopy(model)(x), expected)
    assert torch.equal(pickle.loads(pickle.dumps(model))(x), expected)
    first = model[0]
    assert isinstance(first, IntegerConv1d)
    first.weights = torch.zeros_like(first.weights)  # another tensor: not the packed one any more
    assert not first.sums(x).any()


def test_layers_with_other_padding_stay() -> None:
    model = nn.Sequential(nn.Conv1d(2, 2, 3, padding=1, padding_mode="circular"), nn.Conv1d(2, 2, 3))
    with pytest.warns(UserWarning, match="0 stay in floating point, as they do not pad with zeros"):
        quantize_model(model)
    assert isinstance(model[0], nn.Conv1d)
    assert isinstance(model[1], QuantConv1d)


class Doubled(nn.Conv1d):
    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return 2 * super().forward(input)


def special_layers() -> dict[str, nn.Conv1d]:
    """Layers that do more than torch's Conv1d."""
    hooked, pre_hooked, replaced = (nn.Conv1d(2, 2, 3) for _ in range(3))
    hooked.register_forward_hook(lambda module, arguments, output: 2 * output)
    pre_hooked.register_forward_pre_hook(lambda module, arguments: (2 * arguments[0],))
    replaced.forward = lambda input: 2 * input  # type: ignore[method-assign]
    normed = torch.nn.utils.parametrizations.weight_norm(nn.Conv1d(2, 2, 3))
    return {
        "sub": Doubled(2, 2, 3),
        "hooked": hooked,
        "pre_hooked": pre_hooked,
        "replaced": replaced,
        "normed": normed,
    }


def test_layers_that_do_more_stay() -> None:
    layers = special_layers()
    model = nn.ModuleDict({**layers, "plain": nn.Conv1d(2, 2, 3)})
    with pytest.warns(UserWarning, match="stay in floating point, as they are subclasses") as told:
        quantize_model(model)
    assert len(told) == 1
    assert str(told[0].message).startswith("sub, hooked, pre_hooked, replaced, normed stay")
    assert isinstance(model["plain"], QuantConv1d)
    assert all(model[name] is layer for name, layer in layers.items())


def test_a_model_is_replaced_whole_or_not_at_all() -> None:
    model = quantize_model(nn.Sequential(nn.Conv1d(2, 2, 3), nn.Conv1d(2, 2, 3)))
    first, second = model.children()
    assert isinstance(first, QuantConv1d)
    calibrate(first, [torch.ones(1, 2, 9)])
    with pytest.raises(InputError, match="the input of 1 has no range yet"):
        convert_model(model)
    assert list(model.children()) == [first, second]
    calibrate(model, [torch.ones(1, 2, 9)])
    handle = second.register_forward_hook(lambda module, arguments, output: 2 * output)
    with pytest.raises(InputError, match="1: hooks of these layers would be lost"):
        convert_model(model)
    assert list(model.children()) == [first, second]
    handle.remove()
    assert all(isinstance(layer, IntegerConv1d) for layer in convert_model(model).children())

    large = nn.Sequential(nn.Conv1d(2, 2, 3), nn.Conv1d(9000, 2, 3))
    with pytest.raises(InputError, match="past 16 or 32 bits"):
        quantize_model(large, QuantSettings("exact", outputs=4))
    assert all(type(layer) is nn.Conv1d for layer in large)


def test_nothing_is_said_where_all_layers_can_be_computed() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        quantize_model(nn.Sequential(nn.Conv1d(2, 2, 3), nn.Conv1d(2, 2, 3)), QuantSettings("rsq", outputs=4))


def test_bad_settings() -> None:
    for wrong, message in (
        ({"scheme": "fast"}, "choose one of direct, exact, tapwise, limited, rsq"),
        ({"scheme": "direct", "options": {"alpha": 2.0}}, "direct cannot be set up with {'alpha': 2.0}"),
        (
            {"scheme": "rsq", "options": {"alpah": 2.0}},
            "'alpah' is not one of its options weight_limit, alpha",
        ),
        ({"scheme": "direct", "options": {"weight_limit": 255}}, "the weights' limit is 255"),
        ({"outputs": 99}, "a tile has 99 outputs: choose one of 2, 4, 6"),
        ({"outputs": 0, "scheme": "direct"}, "a tile has 0 outputs"),
        ({"outputs": 3, "options": {"alpah": 2.0}}, "a tile has 3 outputs"),
        ({"scheme": "rsq", "options": {"alpha": 0.5}}, "alpha is 0.5"),
    ):
        with pytest.raises(InputError, match=message):
            QuantSettings(**wrong)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="the method is 'best'"):
        RangeSettings(weight="best")  # type: ignore[arg-type]
    with pytest.raises(InputError, match="the model has no Conv1d layer"):
        quantize_model(nn.Linear(2, 2))
    with pytest.raises(InputError, match="no quantised layer"):
        convert_model(nn.Conv1d(1, 1, 1))
