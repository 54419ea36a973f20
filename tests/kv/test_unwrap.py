"""Models inside of PEFT, torch.compile and parallel wrappers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

import modicum
from modicum import BudgetCache, ModelError
from modicum.compat import cache_kwargs
from modicum.kv.heads import probe
from modicum.kv.unwrap import unwrap
from tests import zoo
from tests.bounds import assert_same_logits
from tests.driver import feed, full_cache
from tests.generation.test_models import Letters

peft = pytest.importorskip("peft")

SMALL: dict[str, Any] = {"budget": 24, "chunk": 16, "n_sink": 2, "recent": 4}


def lora(model: PreTrainedModel, seed: int = 0) -> Any:
    """The model with an adapter that changes what it says."""
    config = peft.LoraConfig(
        r=4, target_modules=["q_proj", "v_proj", "o_proj"], init_lora_weights=False, task_type="CAUSAL_LM"
    )
    torch.manual_seed(seed)
    return peft.get_peft_model(model, config).eval()


WRAPPERS: dict[str, Callable[[PreTrainedModel], Any]] = {
    "lora": lora,
    "compiled": lambda model: torch.compile(model, backend="eager"),
    "parallel": nn.DataParallel,
    "all": lambda model: nn.DataParallel(torch.compile(lora(model), backend="eager")),
}


@pytest.mark.parametrize("wrap", WRAPPERS.values(), ids=WRAPPERS)
def test_a_wrapped_model_gets_what_the_model_inside_gets(wrap: Callable[[PreTrainedModel], Any]) -> None:
    wrapped, letters = wrap(zoo.build("llama")), Letters()
    model, text, ids = unwrap(wrapped), "some words that go on for a while " * 3, zoo.tokens(1, 40)
    assert type(model).__name__ == "LlamaForCausalLM"
    settings: dict[str, Any] = {**SMALL, "max_new_tokens": 8}
    want = modicum.generate(model, letters, text, **settings)
    assert modicum.generate(wrapped, letters, text, **settings).tokens == want.tokens
    assert "".join(modicum.stream(wrapped, letters, text, **settings)) == want.text
    read = modicum.prefill(wrapped, letters, text, **SMALL)
    assert modicum.generate(wrapped, letters, cache=read, question="why", max_new_tokens=3).text
    assert probe(wrapped, tokens=8, copies=2, seeds=(0,)) == probe(model, tokens=8, copies=2, seeds=(0,))
    full = feed(model, full_cache(model), ids)
    with torch.no_grad():
        cache = BudgetCache(wrapped, "keydiff", 64)
        found = wrapped(ids, **cache_kwargs(wrapped, cache), use_cache=True).logits
    assert_same_logits(model, found, full)
    modicum.detach(wrapped)
    assert model.config._attn_implementation == "sdpa"


def test_adapters_act_and_can_be_merged_switched_off_and_exchanged() -> None:
    plain, ids = zoo.build("llama"), zoo.tokens(1, 40)
    bare = feed(plain, full_cache(plain), ids)
    wrapped = lora(zoo.build("llama"))
    wrapped.add_adapter("second", peft.LoraConfig(r=4, target_modules=["k_proj"], init_lora_weights=False))

    def both() -> Tensor:
        """Logits under a budget that holds all, which must be those of transformers' cache."""
        want = feed(unwrap(wrapped), full_cache(unwrap(wrapped)), ids, cuts=(30, 31))
        with torch.no_grad():
            cache = BudgetCache(wrapped, "keydiff", 64)
            found = wrapped(ids, **cache_kwargs(wrapped, cache), use_cache=True).logits
        assert_same_logits(unwrap(wrapped), found, want)
        return found

    adapted = both()
    assert not torch.allclose(adapted, bare, atol=1e-2)
    with wrapped.disable_adapter():
        assert_same_logits(plain, both(), bare)
    wrapped.merge_adapter()
    assert_same_logits(unwrap(wrapped), both(), adapted)
    wrapped.unmerge_adapter()
    wrapped.set_adapter("second")
    assert not torch.allclose(both(), adapted, atol=1e-2)


def test_generate_of_peft_itself_goes_through_the_cache() -> None:
    wrapped, ids = lora(zoo.build("llama")), zoo.tokens(1, 40)
    how: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    want = wrapped.generate(input_ids=ids, **how)
    cache = BudgetCache(wrapped, "keydiff", 64)
    assert torch.equal(wrapped.generate(input_ids=ids, **cache_kwargs(wrapped, cache), **how), want)
    assert cache.seen == 45


PROMPTS: dict[str, Any] = {
    "PREFIX_TUNING": lambda: peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
    "PROMPT_TUNING": lambda: peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
    "P_TUNING": lambda: peft.PromptEncoderConfig(
        task_type="CAUSAL_LM", num_virtual_tokens=3, encoder_hidden_size=8
    ),
}


@pytest.mark.parametrize("kind", PROMPTS)
def test_learned_prompts_are_refused_by_name(kind: str) -> None:
    wrapped = peft.get_peft_model(zoo.build("llama"), PROMPTS[kind]())
    for build in (
        lambda: BudgetCache(wrapped, **SMALL),
        lambda: modicum.generate(wrapped, Letters(), "text", **SMALL),
        lambda: modicum.prefill(wrapped, Letters(), "text", **SMALL),
        lambda: probe(wrapped),
    ):
        with pytest.raises(ModelError, match=rf"kind {kind}.*LoRA, are served"):
            build()


def test_an_activated_lora_is_refused() -> None:
    config = peft.LoraConfig(target_modules=["q_proj"], alora_invocation_tokens=[5, 6], task_type="CAUSAL_LM")
    with pytest.raises(ModelError, match="activated LoRA"):
        BudgetCache(peft.get_peft_model(zoo.build("llama"), config), **SMALL)


def test_a_batch_spread_over_devices_is_refused() -> None:
    wrapped = nn.DataParallel(zoo.build("llama"))
    wrapped.device_ids = [0, 1]  # as on a machine with two GPUs
    with pytest.raises(ModelError, match=r"over 2 devices.*give model\.module"):
        BudgetCache(wrapped, **SMALL)


def test_another_wrapper_is_told_what_to_give() -> None:
    outer = nn.ModuleDict({"pretrained_model": zoo.build("llama"), "value_head": nn.Linear(64, 1)})
    with pytest.raises(
        ModelError, match=r"not ModuleDict: give the model inside of it, at \.pretrained_model"
    ):
        BudgetCache(outer, **SMALL)


def test_what_holds_no_model_is_as_it_was() -> None:
    other = nn.Linear(2, 2)
    assert unwrap(other) is other
    with pytest.raises(ModelError, match=r"not Linear: use modicum\.load"):
        BudgetCache(torch.compile(other), **SMALL)
