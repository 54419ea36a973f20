"""Residual norms: those of the hidden states that the model itself shows, of all layers, from one thread."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch
from transformers import Gemma3ForCausalLM, Gemma3TextConfig

from modicum.kv.residual_norms import residual_norms
from tests import zoo


def build(name: str) -> Any:
    """A tiny model; the decoder layers of Gemma 3 have a layer_idx too."""
    if name != "gemma3":
        return zoo.build(name)
    torch.manual_seed(0)
    sizes = {"vocab_size": zoo.VOCAB, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16}
    return Gemma3ForCausalLM(Gemma3TextConfig(**sizes, **heads)).eval()


@pytest.mark.parametrize("name", [*zoo.FULL, "gemma3"])
def test_norms_are_of_each_layers_input(name: str) -> None:
    model, ids = build(name), zoo.tokens(2, 12)
    with residual_norms(model) as found, torch.no_grad():
        states = model(ids, output_hidden_states=True).hidden_states
        kept = dict(found)
        other = threading.Thread(target=lambda: model(zoo.tokens(1, 5)))
        other.start()
        other.join()
    assert sorted(found) == list(range(model.config.num_hidden_layers))
    for layer, norms in kept.items():
        assert torch.equal(norms, states[layer].norm(dim=-1))
        assert torch.equal(norms, found[layer])  # another thread's call is not seen
    with torch.no_grad():
        model(zoo.tokens(1, 7))
    assert all(norms.shape == (2, 12) for norms in found.values())
