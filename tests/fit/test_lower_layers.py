"""Lower layers are left out, and errors stay the same to the last bit."""

from __future__ import annotations

import copy
from collections import Counter
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

from benchmarks.tiny_configs import tiny_config
from modicum.fit.lower_layers import LowerLayers
from modicum.fit.probe import Probes
from modicum.weights.blocks import blocks_of

pytest.importorskip("scipy")

NUM_LAYERS = 4
PLAIN = ("llama", "gpt2", "gpt_neox", "mixtral")
KINDS = {"gemma3_text": [0, 1], "qwen3_next": [0, 1]}
"""With two kinds of layers, and the first layer of each kind."""


def build(name: str, **more: Any) -> tuple[Any, list[nn.Module]]:
    config: Any = tiny_config(name)
    config.num_hidden_layers = NUM_LAYERS
    for key, value in more.items():
        setattr(config, key, value)
    if hasattr(config, "initializer_range"):
        config.initializer_range = 0.15
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    layers = max(
        (x for x in model.modules() if isinstance(x, nn.ModuleList) and len(x) == NUM_LAYERS),
        key=lambda x: sum(p.numel() for p in x.parameters()),
    )
    return model, list(layers)


def probes_of(model: Any) -> Probes:
    ids = torch.randint(3, 90, (2, 40), generator=torch.Generator().manual_seed(1))
    return Probes(model, None, ids, "", None)


def layer_types(name: str) -> dict[str, Any]:
    if name not in KINDS:
        return {}
    odd = "sliding_attention" if name == "gemma3_text" else "linear_attention"
    return {"layer_types": [odd, "full_attention", odd, "full_attention"]}


@pytest.mark.parametrize("name", [*PLAIN, *KINDS])
def test_errors_are_the_same_and_lower_layers_do_not_run(name: str) -> None:
    model, layers = build(name, **layer_types(name))
    probes = probes_of(model)
    lower = LowerLayers(model, layers, probes)
    running = KINDS.get(name, [0])
    for number, layer in enumerate(layers):
        lower.keep(number)
        assert lower.number == number
        whole = copy.deepcopy(layer.state_dict())
        with torch.no_grad():
            for weight in layer.parameters():
                weight[::2].zero_()
        expected = probes.measure(model)
        assert expected.text > 1e-3
        counts: Counter[int] = Counter()
        own = [_counted(one, at, counts) for at, one in enumerate(layers)]
        with lower.skipped():
            assert probes.measure(model) == expected
        for one, forward in zip(layers, own, strict=True):
            one.forward = forward
        assert sorted(counts) == sorted({*running, *range(number, NUM_LAYERS)})
        layer.load_state_dict(whole)
        assert probes.is_reference(model)


def _counted(layer: nn.Module, at: int, counts: Counter[int]) -> Any:
    own = layer.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        counts[at] += 1
        return own(*args, **kwargs)

    layer.forward = forward  # type: ignore[method-assign]
    return own


def test_layers_that_share_keys_all_run() -> None:
    model, layers = build("gemma3n_text")
    lower = LowerLayers(model, layers, probes_of(model))
    lower.keep(2)
    assert lower.number == 0
    with lower.skipped():
        pass


def test_a_changed_reference_keeps_nothing() -> None:
    model, layers = build("llama")
    probes = probes_of(model)
    lower = LowerLayers(model, layers, probes)
    lower.keep(1)
    assert lower.number == 1
    with torch.no_grad():
        next(layers[3].parameters()).mul_(0.9)
    lower.keep(2)
    assert lower.number == 0


def test_an_error_leaves_the_layers_as_they_were() -> None:
    model, layers = build("llama")
    lower = LowerLayers(model, layers, probes_of(model))
    lower.keep(2)
    with pytest.raises(KeyboardInterrupt), lower.skipped():
        raise KeyboardInterrupt
    assert all("forward" not in layer.__dict__ and not layer._forward_pre_hooks for layer in layers)


def test_blocks_of_a_model_are_its_layers() -> None:
    model, layers = build("llama")
    assert [block.module for block in blocks_of(model)] == layers
