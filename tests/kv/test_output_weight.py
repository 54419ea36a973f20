"""Output weight: slices that add up to what the model's own projection does."""

from __future__ import annotations

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from modicum import ModelError
from modicum.kv.output_weight import output_weight
from modicum.kv.shape import Shape
from tests import zoo
from tests.bounds import assert_within, dot_bound


def gpt2() -> GPT2LMHeadModel:
    """Whose projections are Conv1D: inputs come first in the weight."""
    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(vocab_size=64, n_embd=24, n_layer=1, n_head=3, n_positions=64)).eval()


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_slices_add_up_to_the_projection(family: str) -> None:
    model = gpt2() if family == "gpt2" else zoo.build(family)
    module = model.transformer.h[0].attn if family == "gpt2" else model.model.layers[0].self_attn
    projection = module.c_proj if family == "gpt2" else module.o_proj
    shape = Shape.of(model).layers[0]
    weight = output_weight(module, shape, torch.device("cpu"), "a test")
    assert weight.shape[:3] == (shape.kv_heads, shape.group, shape.value_dim)
    x = torch.randn(weight.shape[:3], generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = projection(x.flatten()[None])[0]
        if projection.bias is not None:
            expected = expected - projection.bias
    found = torch.einsum("hgd,hgdo->o", x, weight)
    size = float(weight.flatten(0, 2).norm(dim=0).max())
    bound = 2 * dot_bound(x.numel() + 2, x.dtype, float(x.norm()), size)
    assert_within(found, expected, bound)


def test_a_layer_without_a_plain_matrix_is_refused() -> None:
    shape = Shape.of(zoo.build("llama")).layers[0]
    with pytest.raises(ModelError, match="a test needs the output projection, and Identity has none"):
        output_weight(torch.nn.Identity(), shape, torch.device("cpu"), "a test")
