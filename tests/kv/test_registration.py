"""Attach and detach: under which names, what is put back, and what other caches then compute."""

from __future__ import annotations

import copy
import pickle
import subprocess
import sys
import textwrap
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from transformers import (
    AttentionInterface,
    CLIPVisionConfig,
    DynamicCache,
    GenerationConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    PreTrainedModel,
)
from transformers.masking_utils import AttentionMaskInterface, flash_attention_mask

import modicum
from modicum import BudgetCache, CacheError, ModelError
from modicum.kv.registration import AttentionName, attention_name
from tests import zoo
from tests.bounds import assert_same_logits
from tests.driver import feed, full_cache, pad_left

VERSION = tuple(int(part) for part in transformers.__version__.split(".")[:2])
FLASH = ("flash_attention_2", "kernels-community/flash-attn2")


def flash_like(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """What transformers' flash attention does: causal by itself, a mask [B, n] names the keys that count.

    As the real one it reads from the module's configuration which library to call.
    """
    name = module.config._attn_implementation
    assert name in FLASH, name
    assert attention_mask is None or attention_mask.dim() == 2
    if attention_mask is not None:
        key, value = (x[:, :, : attention_mask.shape[1]] for x in (key, value))
    group, n, m = query.shape[1] // key.shape[1], key.shape[2], query.shape[2]
    key, value = (x.repeat_interleave(group, 1) for x in (key, value))
    z = query @ key.transpose(-1, -2) * (query.shape[-1] ** -0.5 if scaling is None else scaling)
    at, column = torch.arange(n - m, n)[:, None], torch.arange(n)
    seen = column <= at
    if sliding_window is not None:
        seen = seen & (column > at - sliding_window)
    if attention_mask is not None:
        seen = seen & attention_mask[:, None, None].bool()
    weights = z.masked_fill(~seen, torch.finfo(z.dtype).min).softmax(-1)
    return (weights @ value).transpose(1, 2).contiguous(), None


@pytest.fixture(params=FLASH)
def flash(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The name of an implementation that is loaded: it is registered, and nothing may load it again."""
    name: str = request.param

    def load(*_: Any, **__: Any) -> None:
        raise AssertionError("the implementation was loaded again")

    monkeypatch.setitem(AttentionInterface._global_mapping, name, flash_like)
    monkeypatch.setitem(AttentionMaskInterface._global_mapping, name, flash_attention_mask)
    monkeypatch.setattr(transformers.modeling_utils, "lazy_import_flash_attention", load)
    return name


def loaded_with(model: PreTrainedModel, name: str) -> PreTrainedModel:
    """A model as `from_pretrained(attn_implementation=name)` leaves it."""
    model.config._attn_implementation_internal = name
    return model


def generated(model: PreTrainedModel, ids: Tensor, **more: Any) -> Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return model.generate(ids, max_new_tokens=8, do_sample=False, **more)


@torch.no_grad()
def outputs(model: PreTrainedModel) -> list[Tensor]:
    """What a model says without a budget cache: bare, padded, with each of transformers' caches, in beams."""
    ids, mask = pad_left([zoo.tokens(1, 17)[0], zoo.tokens(1, 11, seed=1)[0]])
    return [
        model(ids, attention_mask=mask).logits,
        feed(model, full_cache(model), ids, mask, cuts=(9, 16)),
        feed(model, full_cache(model), zoo.tokens(1, 30), cuts=(20, 21, 22)),
        generated(model, ids, attention_mask=mask),
        generated(model, ids, attention_mask=mask, num_beams=2),
        generated(model, zoo.tokens(2, 15)),
        generated(model, zoo.tokens(2, 15), cache_implementation="static", disable_compile=True),
        generated(model, ids, attention_mask=mask, cache_implementation="static", disable_compile=True),
    ]


# -- names --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_a_model_with_flash_attention_gets_a_cache_and_is_put_back(name: str, flash: str) -> None:
    model, ids = loaded_with(zoo.build(name), flash), zoo.tokens(2, 40)
    before = outputs(model)
    full = feed(model, full_cache(model), ids, cuts=(30, 31))
    cache = BudgetCache(model, "keydiff", 64)
    assert model.config._attn_implementation.startswith("modicum_")
    assert torch.equal(full, feed(model, full_cache(model), ids, cuts=(30, 31)))
    assert all(torch.equal(a, b) for a, b in zip(before, outputs(model), strict=True))
    assert_same_logits(model, feed(model, cache, ids, cuts=(30, 31)), full)
    modicum.detach(model)
    assert model.config._attn_implementation == flash
    assert type(model.config._attn_implementation) is str
    assert all(torch.equal(a, b) for a, b in zip(before, outputs(model), strict=True))


@pytest.mark.parametrize(
    "original",
    ["sdpa", "flash_attention_2", "some/flash@v1:flash", "paged|eager", "a%61b"],
)
def test_a_name_has_nothing_that_transformers_acts_on_and_leads_back(original: str) -> None:
    name = attention_name(original)
    assert not any(part in name for part in ("flash", "/", "|", ":", "@"))
    assert name in AttentionInterface._global_mapping
    assert name in AttentionMaskInterface._global_mapping
    assert attention_name(original) is name
    for twin in (pickle.loads(pickle.dumps(name)), copy.deepcopy(name)):
        assert twin is name
    model = loaded_with(zoo.build("llama"), name[:])  # as a plain string, from an older pickle
    modicum.detach(model)
    assert model.config._attn_implementation == original


def test_names_of_different_implementations_differ() -> None:
    originals = ["flash", "fl%61sh", "fl%2561sh", "a/b", "a%2fb", "a|b"]
    assert len({AttentionName(name)[:] for name in originals}) == len(originals)


def test_an_implementation_without_a_mask_function_gets_none(monkeypatch: pytest.MonkeyPatch) -> None:
    masks: list[Any] = []

    def plain(*args: Any, **kwargs: Any) -> Any:
        masks.append(args[4] if len(args) > 4 else kwargs["attention_mask"])
        return AttentionInterface._global_mapping["sdpa"](*args, **kwargs)

    monkeypatch.setitem(AttentionInterface._global_mapping, "plain", plain)
    model = zoo.build("llama")
    model.set_attn_implementation("plain")
    BudgetCache(model, budget=64)
    model(zoo.tokens(1, 6))
    assert masks == [None, None]


def test_an_implementation_that_is_gone_is_told_in_words(monkeypatch: pytest.MonkeyPatch) -> None:
    model = zoo.build("llama")
    with monkeypatch.context() as patch:
        patch.setitem(AttentionInterface._global_mapping, "mine", AttentionInterface._global_mapping["sdpa"])
        model.set_attn_implementation("mine")
    cache = BudgetCache(model, budget=64)
    feed(model, cache, zoo.tokens(1, 6))  # which budget layers never call
    with pytest.raises(ModelError, match=r"'mine' is not registered.*modicum\.detach\(model\)"):
        model(zoo.tokens(1, 6))


def test_a_model_without_a_name_is_refused() -> None:
    model = loaded_with(zoo.build("llama"), None)  # type: ignore[arg-type]  # what is tested
    with pytest.raises(ModelError, match=r"names no attention implementation.*set_attn_implementation"):
        BudgetCache(model, budget=64)


# -- parts of a model ----------------------------------------------------------------------------------


def llava() -> LlavaForConditionalGeneration:
    text = LlamaConfig(
        vocab_size=zoo.VOCAB, hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2
    )
    vision = CLIPVisionConfig(
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=8,
        patch_size=4,
    )
    torch.manual_seed(0)
    config = LlavaConfig(text_config=text, vision_config=vision, image_token_index=zoo.VOCAB - 1)
    return LlavaForConditionalGeneration(config).eval()


def names(model: PreTrainedModel) -> dict[str, str]:
    parts = {"": model.config, "text": model.config.text_config, "vision": model.config.vision_config}
    return {key: config._attn_implementation for key, config in parts.items()}


@pytest.mark.parametrize(
    "given", ["sdpa", "eager", {"": "sdpa", "text_config": "sdpa", "vision_config": "eager"}]
)
def test_only_the_decoder_of_a_composite_model_is_switched(given: Any) -> None:
    model, ids = llava(), zoo.tokens(1, 20) % 100
    model.set_attn_implementation(given)
    before, full = names(model), feed(model, DynamicCache(), ids, cuts=(15, 16))
    cache = BudgetCache(model, budget=64)
    during = names(model)
    assert during == {
        "": f"modicum_{before['']}",
        "text": f"modicum_{before['text']}",
        "vision": before["vision"],
    }
    assert_same_logits(model, feed(model, cache, ids, cuts=(15, 16)), full)
    modicum.detach(model)
    assert names(model) == before


def test_parts_are_put_back_each_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(AttentionInterface._global_mapping, "flash_attention_2", flash_like)
    model = llava()
    wanted = {"": "sdpa", "text": "flash_attention_2", "vision": "eager"}
    for config, name in zip(
        (model.config, model.config.text_config, model.config.vision_config), wanted.values(), strict=True
    ):
        config._attn_implementation_internal = name
    BudgetCache(model, budget=64)
    assert names(model)["vision"] == "eager"
    modicum.detach(model)
    assert names(model) == wanted


# -- other processes -----------------------------------------------------------------------------------


def in_new_process(program: str, *paths: Path) -> None:
    """Run a program in a process that has not imported modicum; `paths` are its arguments."""
    run = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program), *map(str, paths)], capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr


@pytest.mark.parametrize("kind", ["named", "older"])
def test_a_model_pickled_after_a_cache_was_built_works_in_a_new_process(kind: str, tmp_path: Path) -> None:
    model, ids = zoo.build("llama"), zoo.tokens(1, 40)
    BudgetCache(model, budget=64)
    cache = BudgetCache(model, "keydiff", 24, n_sink=2, recent=4, chunk=16)
    want = {"plain": model(ids).logits, "budget": feed(model, cache, ids, cuts=(30, 31))}
    if kind == "older":  # as versions pickled it whose names were plain strings
        loaded_with(model, "modicum_sdpa")
    for value, name in ((model, "model"), (want, "want"), (ids, "ids")):
        torch.save(value, tmp_path / name)
    plain = "assert torch.equal(model(ids).logits, want['plain'])" if kind == "named" else ""
    in_new_process(
        f"""
        import sys, torch
        model = torch.load(sys.argv[1], weights_only=False)
        want, ids = torch.load(sys.argv[2]), torch.load(sys.argv[3])
        {plain}
        import modicum
        cache = modicum.BudgetCache(model, "keydiff", 24, n_sink=2, recent=4, chunk=16)
        from modicum.compat import cache_kwargs
        given = cache_kwargs(model, cache)
        logits = [model(ids[:, a:b], **given).logits for a, b in ((0, 30), (30, 31), (31, 40))]
        assert torch.equal(torch.cat(logits, 1), want["budget"])
        assert torch.equal(model(ids).logits, want["plain"])
        modicum.detach(model)
        assert model.config._attn_implementation == "sdpa"
        """,
        *(tmp_path / name for name in ("model", "want", "ids")),
    )


def test_a_copied_model_has_caches_of_its_own() -> None:
    model, ids = zoo.build("llama"), zoo.tokens(1, 20)
    cache = BudgetCache(model, budget=64)
    want = feed(model, cache, ids)
    twin = copy.deepcopy(model)
    modicum.detach(twin)
    assert twin.config._attn_implementation == "sdpa"
    assert torch.equal(feed(twin, BudgetCache(twin, budget=64), ids), want)
    with pytest.raises(CacheError, match="another model"):
        feed(twin, cache, ids)
    feed(model, cache, ids)


@pytest.mark.parametrize("dump", [pickle.dumps, copy.copy, lambda cache: torch.save(cache, "/dev/null")])
def test_a_cache_is_saved_not_pickled(dump: Any) -> None:
    cache = BudgetCache(zoo.shared("llama"), budget=64)
    with pytest.raises(CacheError, match=r"cache\.save\(path\).*BudgetCache\.load\(path, model\)"):
        dump(cache)


# -- continuous batching -------------------------------------------------------------------------------


def batched(model: PreTrainedModel, prompts: list[list[int]]) -> dict[str, list[int]]:
    config = GenerationConfig(max_new_tokens=4, do_sample=False, eos_token_id=None, pad_token_id=0)
    # Few blocks: by itself it takes nine tenths of the memory.
    small = transformers.ContinuousBatchingConfig(num_blocks=4, max_batch_tokens=64)
    found = model.generate_batch(prompts, config, small)
    return {key: value.generated_tokens for key, value in found.items()}


@pytest.mark.skipif(VERSION < (5, 24), reason="continuous batching on a CPU came later")
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_continuous_batching_says_detach_and_works_after(attention: str) -> None:
    model, prompts = zoo.build("llama", attention=attention), [[5, 6, 7], [8, 9, 10, 11, 12]]
    want = batched(model, prompts)
    BudgetCache(model, budget=64)
    with pytest.raises(ValueError, match=rf"modicum\.detach\(model\) puts '{attention}' back"):
        batched(model, prompts)
    modicum.detach(model)
    assert batched(model, prompts) == want
