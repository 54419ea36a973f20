"""The digest of a model: any weight changes it, and how the weights are held does not."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

import modicum
from modicum.distill.model_digest import model_digest
from modicum.weights import save
from tests.tiny_model import TINY_MODEL


@pytest.fixture(scope="module")
def deep() -> PreTrainedModel:
    """Of so many layers that not each is the first, the middle or the last."""
    torch.manual_seed(0)
    sizes = {"vocab_size": 24, "hidden_size": 8, "intermediate_size": 12, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(**sizes, num_hidden_layers=6))


def test_one_number_of_any_weight_changes_it(deep: PreTrainedModel) -> None:
    digests = {model_digest(deep)}
    names = [name for name, _ in deep.named_parameters()]
    for name in names:
        changed = copy.deepcopy(deep)
        with torch.no_grad():
            changed.get_parameter(name).view(-1)[-1] += 0.25
        digests.add(model_digest(changed))
    assert len(digests) == 1 + len(names)
    assert model_digest(copy.deepcopy(deep)) in digests
    assert all(len(one) == 16 for one in digests)


def test_settings_that_logits_depend_on_change_it(deep: PreTrainedModel) -> None:
    changed = copy.deepcopy(deep)
    changed.config.rope_parameters = {**deep.config.rope_parameters, "rope_theta": 123.0}
    other = copy.deepcopy(deep)
    other.config.rms_norm_eps *= 2
    assert len({model_digest(one) for one in (deep, changed, other)}) == 3
    idle = copy.deepcopy(deep)
    idle.config.use_cache = False
    idle.config.name_or_path = "elsewhere"
    idle.config.pad_token_id = 3
    assert model_digest(idle) == model_digest(deep)


def test_masks_are_part_of_it(deep: PreTrainedModel) -> None:
    mask = torch.ones(8, 8, dtype=torch.bool)
    other = mask.clone()
    other[-1, -1] = False
    digests = {model_digest(deep), *(model_digest(deep, {"a": one}) for one in (mask, other))}
    assert len(digests | {model_digest(deep, {"b": mask})}) == 4


def test_it_is_the_same_in_16_bits_and_for_packed_layers(tmp_path: Path) -> None:
    half, tokenizer = modicum.load(TINY_MODEL, dtype="bfloat16", device="cpu")
    assert model_digest(copy.deepcopy(half).float()) == model_digest(half)
    text = modicum.sample_text()[:4000]
    report = modicum.prune(half, text, tokenizer=tokenizer, sparsity=0.6, refine=None, sequences=4, length=24)
    save(report, half, tokenizer, tmp_path / "pruned", format="packed")
    dense, packed = (
        modicum.load(tmp_path / "pruned", device="cpu", weights=one)[0] for one in ("dense", "packed")
    )
    assert any(hasattr(one, "weight_rows") for one in packed.modules())
    assert model_digest(dense) == model_digest(packed) != ""


def test_weights_that_are_not_here_have_none(deep: PreTrainedModel) -> None:
    assert model_digest(copy.deepcopy(deep).to("meta")) == ""
