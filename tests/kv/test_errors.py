"""Bad input: each a ModicumError that names value, limit and remedy, and leaves things as they were."""

from __future__ import annotations

import copy
import errno
import json
import os
import pickle
import random
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor

import modicum
from modicum import (
    Budget,
    BudgetCache,
    BudgetError,
    CacheError,
    InputError,
    ModelError,
    ModicumError,
    PolicyError,
    SnapshotError,
)
from modicum.compat import cache_kwargs
from modicum.kv.heads import HeadScores
from modicum.kv.snapshot import _checksum
from tests import zoo
from tests.driver import all_kept, budget_layers, check_limits, feed

SMALL = {"n_sink": 2, "recent": 4}


def used(name: str = "llama", policy: str = "keydiff", **more: Any) -> tuple[Any, BudgetCache]:
    """A model and a cache that has seen 40 tokens and let half of them go."""
    model = zoo.build(name)
    cache = BudgetCache(model, policy, 20, chunk=16, **SMALL, **more)
    feed(model, cache, zoo.tokens(1, 40), cuts=(37, 38, 39))
    return model, cache


def state(cache: BudgetCache) -> list[Any]:
    """All that a cache holds, to compare."""
    found: list[Any] = [cache.seen, cache.row_seen, cache.nbytes, str(cache.policy), cache.budget, cache.plan]
    for _, layer in budget_layers(cache):
        for bank in layer.banks:
            bank.arena.settle()
            found.append([bank.arena.live, bank.arena.capacity])
            found += [t[:, :, : bank.arena.used] for t in bank.arena.tensors.values()]
            found += [] if bank.virtual is None else list(bank.virtual.tensors.values())
        if layer.ring is not None:
            found += [layer.ring.queries, layer.ring.positions, layer.ring.next]
    found += [t for layer in cache.layers if layer.is_sliding for t in (layer.keys, layer.values)]
    return [x.clone() if isinstance(x, Tensor) else copy.deepcopy(x) for x in found]


def same(a: list[Any], b: list[Any]) -> bool:
    return len(a) == len(b) and all(
        torch.equal(x, y) if isinstance(x, Tensor) else x == y for x, y in zip(a, b, strict=True)
    )


# -- the kinds ---------------------------------------------------------------------------------------


def test_every_kind_is_a_modicum_error_and_what_python_users_expect() -> None:
    for kind in (BudgetError, PolicyError, ModelError, InputError, SnapshotError):
        assert issubclass(kind, ModicumError)
        assert issubclass(kind, ValueError)
    assert issubclass(CacheError, ModicumError)
    assert issubclass(CacheError, RuntimeError)


# -- budgets -----------------------------------------------------------------------------------------

UNUSABLE: list[tuple[Any, str]] = [
    (0, r"budget is 0: .* at least 1"),
    (-3, r"budget is -3: .* at least 1"),
    ("0", r"budget is 0: .* at least 1"),
    ("-5", r"budget is -5: .* at least 1"),
    (True, r"budget is True: give tokens .*2048.*, a size .*64MiB.* or a share"),
    (2.5, r"budget is 2\.5: give tokens"),
    (float("nan"), r"budget is nan: give tokens"),
    ([64], r"budget is \[64\]: give tokens"),
    (b"64MiB", r"budget is b'64MiB': give tokens"),
    ("lots", r"cannot read the budget 'lots': write tokens .*2048.* or a size"),
    ("64 parsecs", r"cannot read the budget '64 parsecs'"),
    ("1.2.3MB", r"cannot read the budget '1\.2\.3MB'"),
    ("-64MiB", r"cannot read the budget '-64MiB'"),
    ("2.5", r"cannot read the budget '2\.5'"),
    ("", r"cannot read the budget ''"),
    ("64MiB!", r"cannot read the budget '64MiB!'"),
    ("0MB", r"'0MB' is no memory at all"),
    ("0.0001KB", r"'0\.0001KB' is no memory at all"),
    (10**30, r"positions are kept up to 2147483646"),
    ("1" * 30, r"positions are kept up to 2147483646"),
]


@pytest.mark.parametrize(("budget", "message"), UNUSABLE, ids=lambda x: repr(x)[:20])
def test_a_budget_that_is_none_is_refused(budget: Any, message: str) -> None:
    with pytest.raises(BudgetError, match=message):
        BudgetCache(zoo.shared("llama"), "keydiff", budget)


@pytest.mark.parametrize("key", ["chunk", "n_sink", "recent", "evict_every"])
@pytest.mark.parametrize("value", [-1, 1.5, "4", True, None])
def test_settings_of_a_budget_are_whole_numbers(key: str, value: Any) -> None:
    with pytest.raises(BudgetError, match=rf"{key} is .*: it must be a whole number of at least [01]"):
        BudgetCache(zoo.shared("llama"), "keydiff", 64, **{key: value})
    with pytest.raises(BudgetError, match=key):
        Budget(tokens=64, **{key: value})


def test_chunk_and_evict_every_are_at_least_one() -> None:
    for key in ("chunk", "evict_every"):
        with pytest.raises(BudgetError, match=rf"{key} is 0: .* at least 1"):
            BudgetCache(zoo.shared("llama"), "keydiff", 64, **{key: 0})


def test_a_budget_is_in_tokens_or_in_bytes() -> None:
    for both in ({}, {"tokens": 64, "nbytes": 1 << 20}):
        with pytest.raises(BudgetError, match="in tokens, in bytes or as a share"):
            Budget(**both)


@pytest.mark.parametrize(
    ("settings", "least"),
    [
        ({}, 4 + 32),
        ({"n_sink": 0, "recent": 9}, 9),
        ({"n_sink": 3, "recent": 0}, 3),
        ({"n_sink": 2, "recent": 4, "evict_every": 5}, 2 + 4 + 4),
        ({"n_sink": 0, "recent": 0, "evict_every": 5}, 1 + 4),
        ({"n_sink": 2, "recent": 4, "policy": "snapkv(window=11)"}, 2 + 11),
        ({"n_sink": 2, "recent": 4, "policy": "pyramidkv+snapkv(window=11)", "evict_every": 2}, 2 + 11 + 1),
        ({"n_sink": 2, "recent": 4, "policy": "razor"}, 2 + 4 + 1),
    ],
)
def test_a_budget_below_sinks_and_recent_names_the_least(settings: dict[str, Any], least: int) -> None:
    model, settings = zoo.shared("llama"), {"policy": "keydiff", **settings}
    with pytest.raises(BudgetError, match=rf"a budget of {least - 1} tokens .*give at least {least}\b"):
        BudgetCache(model, budget=least - 1, **settings)
    cache = BudgetCache(model, budget=least, chunk=8, **settings)
    feed(model, cache, zoo.tokens(1, 60), cuts=range(50, 60), after=lambda: check_limits(cache))


@pytest.mark.parametrize("name", zoo.ALL)
@pytest.mark.parametrize("policy", ["keydiff", "snapkv", "razor", "adakv+h2o"])
def test_a_budget_of_too_few_bytes_names_the_least_for_the_model(name: str, policy: str) -> None:
    model = zoo.shared(name)
    with pytest.raises(BudgetError, match=r"too small for this model .* at least \d+ bytes") as caught:
        BudgetCache(model, policy, "1KB")
    least = int(str(caught.value).split("at least ")[1].split(" bytes")[0])
    with pytest.raises(BudgetError, match=f"at least {least} bytes"):
        BudgetCache(model, policy, f"{least - 1}B")
    cache = BudgetCache(model, policy, f"{least}B")
    assert cache.budget_nbytes <= least
    feed(model, cache, zoo.tokens(1, 60), cuts=(58, 59), after=lambda: check_limits(cache))


def test_a_window_larger_than_the_budget_is_refused() -> None:
    for policy in ("snapkv(window=100)", "adakv+ahakv(window=100)", "caote(snapkv(window=100))"):
        with pytest.raises(
            BudgetError, match=r"window=100.*window of 100 tokens, the budget is 64: give a larger"
        ):
            BudgetCache(zoo.shared("llama"), policy, 64)


def test_more_memory_than_there_is_is_a_budget_error_and_leaves_nothing_behind() -> None:
    model = zoo.build("llama")
    cache = BudgetCache(model, "snapkv(window=4)", 64, **SMALL)
    with (
        patch("modicum.kv.layer.QueryRing", side_effect=RuntimeError("out of memory")),
        pytest.raises(BudgetError, match=r"no memory for the 128 slots of layer 0 .*give a smaller budget"),
    ):
        feed(model, cache, zoo.tokens(1, 5))
    assert (cache.nbytes, cache.seen, cache.batch_size) == (0, 0, 0)
    cache.check_integrity()
    feed(model, cache, zoo.tokens(2, 5))
    check_limits(cache)


# -- policies ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("policy", "message"),
    [
        ("keydif", "there is no policy 'keydif': did you mean keydiff"),
        ("qqqq", "there is no policy 'qqqq': there are: .*keydiff"),
        ("snapkv(windw=3)", "snapkv has no setting 'windw': did you mean window"),
        ("caote", "caote wraps another policy .*as in 'caote\\+snapkv'"),
        ("adakv", "adakv wraps another policy"),
        ("keydiff+snapkv", "keydiff is not a wrapper"),
        ("razor(full)", "never evicts"),
        ("snapkv(window=0)", "window is 0"),
        ("", "a policy is a name such as 'keydiff'"),
        (17, "a policy is a name such as 'keydiff'"),
    ],
)
def test_an_unknown_policy_or_setting_is_refused_with_near_ones(policy: Any, message: str) -> None:
    with pytest.raises(PolicyError, match=message):
        BudgetCache(zoo.shared("llama"), policy, 64)


def test_head_scores_of_another_model_or_no_file_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "scores.json"
    HeadScores(echo=((0.1,),) * 2, induction=((0.1,),) * 2, model="other").save(path)
    model = zoo.shared("llama")
    with pytest.raises(SnapshotError, match=r"head scores of other .*\[1, 1\].* \[2, 2\].*probe this model"):
        BudgetCache(model, f"razor(heads={str(path)!r})", 64)
    with pytest.raises(SnapshotError, match="cannot read head scores"):
        BudgetCache(model, f"razor(heads={str(tmp_path / 'none.json')!r})", 64)


# -- models ------------------------------------------------------------------------------------------

_TINY = {"vocab_size": 100, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
_WIDE = {**_TINY, "intermediate_size": 32}


def _make(family: str, kind: str = "ForCausalLM", **settings: Any) -> Any:
    config = getattr(transformers, f"{family}Config")(**settings)
    return getattr(transformers, family + kind)(config).eval()


_MLA = {
    "num_key_value_heads": 2,
    "kv_lora_rank": 8,
    "q_lora_rank": 8,
    "v_head_dim": 8,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "moe_intermediate_size": 16,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_group": 2,
    "topk_group": 1,
}

REFUSED: list[tuple[str, Callable[[], Any], str]] = [
    (
        "T5ForConditionalGeneration",
        lambda: _make(
            "T5",
            "ForConditionalGeneration",
            vocab_size=99,
            d_model=32,
            d_kv=16,
            d_ff=32,
            num_layers=2,
            num_heads=2,
        ),
        "it is an encoder-decoder",
    ),
    (
        "BloomForCausalLM",
        lambda: _make("Bloom", vocab_size=99, hidden_size=32, n_layer=2, n_head=2),
        "does not go through transformers' attention interface",
    ),
    (
        "MptForCausalLM",
        lambda: _make("Mpt", vocab_size=99, d_model=32, n_layers=2, n_heads=2),
        "does not go through transformers' attention interface",
    ),
    (
        "MambaForCausalLM",
        lambda: _make("Mamba", vocab_size=99, hidden_size=32, num_hidden_layers=2, state_size=4),
        "none of its layers has a cache of keys and values",
    ),
    (
        "DogeForCausalLM",
        lambda: _make("Doge", **_WIDE, num_key_value_heads=1, pad_token_id=0),
        "changes what the cache returns",
    ),
    (
        "DeepseekV32ForCausalLM",
        lambda: _make("DeepseekV32", **_WIDE, **_MLA, pad_token_id=0),
        "keeps a DynamicIndexedLayer",
    ),
    (
        "BertLMHeadModel",
        lambda: _make("Bert", "LMHeadModel", **_WIDE),
        "looks at later tokens too",
    ),
]


@pytest.mark.parametrize(("name", "build", "reason"), REFUSED, ids=[name for name, _, _ in REFUSED])
def test_a_model_whose_attention_cannot_be_taken_over_is_refused_by_name(
    name: str, build: Callable[[], Any], reason: str
) -> None:
    model = build()
    before = model.config._attn_implementation
    with pytest.raises(ModelError, match=rf"{name} \(\w+\) cannot be served: .*{reason}"):
        BudgetCache(model, "keydiff", 64)
    assert model.config._attn_implementation == before


@pytest.mark.parametrize("model", ["a/path", None, torch.nn.Linear(2, 2)], ids=lambda x: type(x).__name__)
def test_what_is_no_model_is_refused(model: Any) -> None:
    with pytest.raises(ModelError, match=f"not {type(model).__name__}: use modicum.load"):
        BudgetCache(model, "keydiff", 64)


def test_a_policy_that_needs_the_output_projection_says_so_where_there_is_none() -> None:
    model = zoo.build("llama")
    for layer in model.model.layers:
        layer.self_attn.result = layer.self_attn.o_proj
        del layer.self_attn.o_proj
        layer.self_attn.o_proj = torch.nn.Sequential(layer.self_attn.result)
    cache = BudgetCache(model, "criticalkv+keydiff", 64)
    with pytest.raises(ModelError, match="needs the output projection, and LlamaAttention has none"):
        feed(model, cache, zoo.tokens(1, 5))


# -- a cache used as it cannot be ----------------------------------------------------------------------


@pytest.mark.parametrize("attached", [False, True])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_a_cache_of_another_model_of_the_same_shape_is_refused(attached: bool, attention: str) -> None:
    model, cache = used()
    before = state(cache)
    other = zoo.build("llama", attention=attention, seed=1)
    if attached:
        BudgetCache(other, budget=64)
    with pytest.raises(CacheError, match=r"built for another model.*BudgetCache\(model, …\)"):
        feed(other, cache, zoo.tokens(1, 5))
    assert same(state(cache), before)
    feed(model, cache, zoo.tokens(1, 5))
    cache.check_integrity()


@pytest.mark.parametrize("name", ["llama-mqa", "llama-mha", "gemma3", "qwen2-window", "gpt-neox"])
def test_a_cache_of_another_model_of_another_shape_is_refused(name: str) -> None:
    _, cache = used()
    before = state(cache)
    other = zoo.build(name)
    BudgetCache(other, budget=64)
    with pytest.raises(CacheError, match="this cache was built for another model"):
        feed(other, cache, zoo.tokens(1, 5))
    assert same(state(cache), before)


def test_a_cache_of_another_model_is_refused_whatever_the_mask() -> None:
    _, cache = used()
    other = zoo.build("llama", seed=1)
    BudgetCache(other, budget=64)
    # Masks of four dimensions are not made by our mask function, which would notice first.
    with pytest.raises(CacheError, match="built for another model"):
        other(zoo.tokens(1, 5), **cache_kwargs(other, cache), attention_mask=torch.zeros(1, 1, 5, 45))


def test_a_cache_of_a_shallower_model_is_refused() -> None:
    model = zoo.build("llama")
    deep = zoo.build("gemma2")
    cache = BudgetCache(model, budget=64)
    with pytest.raises(CacheError):
        feed(deep, cache, zoo.tokens(1, 5))
    with pytest.raises(CacheError, match=r"layer 7 of a cache with 2: .*another model"):
        cache.update(torch.zeros(1, 2, 1, 16), torch.zeros(1, 2, 1, 16), 7)


@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_another_batch_size_is_refused(name: str) -> None:
    model, cache = used(name)
    before = state(cache)
    if name == "llama":
        with pytest.raises(CacheError, match=r"a batch of 3, the cache holds 1: .*cache.reset\(\)"):
            feed(model, cache, zoo.tokens(3, 5))
        assert same(state(cache), before)
    else:
        with pytest.raises((CacheError, RuntimeError)):
            feed(model, cache, zoo.tokens(3, 5))
    cache.reset()
    feed(model, cache, zoo.tokens(3, 50))
    check_limits(cache)


def test_another_dtype_is_refused_before_and_after_the_first_call() -> None:
    model, cache = used()
    before = state(cache)
    model.to(torch.bfloat16)
    with pytest.raises(CacheError, match=r"got torch.bfloat16 .*the cache holds torch.float32"):
        feed(model, cache, zoo.tokens(1, 5))
    assert same(state(cache), before)
    model = zoo.build("llama", torch.bfloat16)
    fresh = BudgetCache(model, budget=64)
    model.float()
    with pytest.raises(CacheError, match=r"keys in torch.float32, the cache was built for torch.bfloat16"):
        feed(model, fresh, zoo.tokens(1, 5))
    assert fresh.nbytes == 0


def test_training_with_gradients_is_refused_and_without_a_cache_goes_on() -> None:
    model, cache = used()
    model.train()
    with pytest.raises(CacheError, match=r"for inference: call model.eval\(\), or train without a cache"):
        model(zoo.tokens(1, 5), **cache_kwargs(model, cache))
    model(zoo.tokens(1, 5), labels=zoo.tokens(1, 5)).loss.backward()
    model.eval()
    feed(model, cache, zoo.tokens(1, 5))
    cache.check_integrity()


def test_masks_that_cannot_be_read_are_refused_and_change_nothing() -> None:
    model, cache = used()
    before, ids = state(cache), zoo.tokens(1, 5)
    full = torch.zeros(1, 1, 5, 45)
    for mask, message in (
        (full, "has 4 dimensions: with a budget cache give the two-dimensional padding mask"),
        (torch.ones(1, 3), r"has shape \(1, 3\): .*whose last 5 columns are this call's"),
        (torch.ones(2, 45), r"has shape \(2, 45\): .*\[1, columns\]"),
    ):
        with torch.no_grad(), pytest.raises(InputError, match=message):
            model(ids, **cache_kwargs(model, cache), attention_mask=mask)
        assert same(state(cache), before)
    feed(model, cache, ids)
    cache.check_integrity()


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("number", [0, 1])
def test_keys_that_are_not_finite_are_named_by_their_layer(bad: float, number: int) -> None:
    model = zoo.build("llama")
    model.model.layers[number].self_attn.k_proj.weight.data[0, 0] = bad
    cache = BudgetCache(model, "keydiff", 20, **SMALL)
    with pytest.raises(
        InputError, match=rf"layer {number}: \d+ of 640 key values are not finite .*check the weights"
    ):
        feed(model, cache, zoo.tokens(1, 20))
    if number:  # the layer below has taken its tokens: to go on would be wrong, and is refused
        with pytest.raises(
            CacheError, match=r"interrupted: layer 0 has seen 20 tokens, layer 1 0.*cache.reset\(\)"
        ):
            feed(model, cache, zoo.tokens(1, 5))
        with pytest.raises(CacheError, match="interrupted"):
            cache.save("never.safetensors")
    cache.reset()
    model.model.layers[number].self_attn.k_proj.weight.data.nan_to_num_(0.0, 0.0, 0.0)
    feed(model, cache, zoo.tokens(1, 20))
    check_limits(cache)


def test_keys_that_are_not_finite_in_decode_are_named_too() -> None:
    model, cache = used()
    hook = model.model.layers[1].self_attn.k_proj.register_forward_hook(lambda m, i, out: out * float("nan"))
    with pytest.raises(InputError, match="layer 1: 32 of 32 key values are not finite"):
        feed(model, cache, zoo.tokens(1, 1))
    hook.remove()


def test_large_keys_whose_sum_overflows_are_finite() -> None:
    cache = BudgetCache(zoo.shared("llama"), "streamingllm", 20, **SMALL)
    keys = torch.full((1, 2, 30, 16), 3e38)
    assert not keys.sum().isfinite()
    cache.update(keys, keys, 0)


FULL_ONES = ["full", "caote+full", "adakv+full", "pyramidkv+full", "criticalkv+full"]


@pytest.mark.parametrize("policy", FULL_ONES)
@pytest.mark.parametrize("name", ["llama", "gemma2", "gemma3", "qwen2-window"])
def test_full_over_its_budget_is_refused_and_nothing_changes(name: str, policy: str) -> None:
    model = zoo.build(name)
    cache = BudgetCache(model, policy, 300, chunk=16, **SMALL)
    room = cache.shared.room
    assert room >= 15
    with pytest.raises(
        BudgetError, match=rf"{room + 1} tokens do not fit a budget of {room}: give .* {room + 1} "
    ):
        feed(model, cache, zoo.tokens(1, room + 1))
    assert (cache.seen, cache.nbytes, cache.batch_size) == (0, 0, 0)
    feed(model, cache, zoo.tokens(2, room - 3))
    before = state(cache)
    for ids in (zoo.tokens(2, room + 1), zoo.tokens(2, room + 40)):
        with pytest.raises(BudgetError, match=f"do not fit a budget of {room}"):
            feed(model, cache, ids, start=room - 3)
        assert same(state(cache), before)
    feed(model, cache, zoo.tokens(2, room), cuts=(room - 2, room - 1), start=room - 3)
    check_limits(cache)
    assert all(len(head) == room for layer in all_kept(cache) for row in layer for head in row)
    with pytest.raises(BudgetError):
        feed(model, cache, zoo.tokens(2, room + 1), start=room)


def test_full_counts_no_pads() -> None:
    model = zoo.build("llama")
    cache = BudgetCache(model, "full", 20, **SMALL)
    ids, mask = zoo.tokens(2, 30), torch.ones(2, 30, dtype=torch.int64)
    mask[:, :10] = 0
    feed(model, cache, ids, mask)
    assert cache.row_seen == (20, 20)
    with pytest.raises(BudgetError, match="21 tokens do not fit"):
        feed(model, cache, zoo.tokens(2, 31), torch.cat([mask, torch.ones(2, 1)], 1).long(), start=30)


@pytest.mark.parametrize("name", ["llama", "gemma3", "mistral-window"])
def test_what_a_cache_cannot_do_it_says(name: str) -> None:
    _, cache = used(name)
    before = state(cache)
    for layer in cache.layers:
        with pytest.raises(CacheError, match="cannot take tokens back"):
            layer.crop(-3)
        with pytest.raises(CacheError, match="cannot take tokens back"):
            layer.activate_past_recording()
    if name == "llama":
        with pytest.raises(CacheError, match="not offloaded: give it a smaller budget"):
            cache.layers[0].offload()
    with pytest.raises(CacheError, match="cannot take tokens back"):
        cache.crop(-3)
    assert same(state(cache), before)


def test_attention_without_keys_is_refused() -> None:
    model, cache = used()
    layer, module = cache.layers[0], model.model.layers[0].self_attn
    with pytest.raises(CacheError, match=r"update\(\) comes first"):
        layer.attend(module, torch.zeros(1, 4, 1, 16), None, 0.25, None)


def test_integrity_names_the_layer_and_what_is_wrong() -> None:
    def spoil(change: Callable[[BudgetCache], None]) -> BudgetCache:
        _, cache = used()
        cache.check_integrity()
        change(cache)
        return cache

    def arena(cache: BudgetCache) -> Any:
        found = cache.layers[1].banks[0].arena
        found.settle()
        return found

    changes: list[tuple[Callable[[BudgetCache], Any], str]] = [
        (lambda c: arena(c).keys[0, 0].fill_(float("nan")), "layer 1: heads 0 to 1: row 0 .*not finite"),
        (
            lambda c: arena(c).positions[0, 1, :2].fill_(7),
            "layer 1: heads 0 to 1: row 0 .*same position twice",
        ),
        (
            lambda c: arena(c).positions[0, 1, 3].fill_(-1),
            "layer 1: .*row 0 has a slot in use without a position",
        ),
        (lambda c: setattr(arena(c), "live", [99]), "layer 1: .*row 0 holds 99 tokens, its capacity is 20"),
        (lambda c: setattr(c.layers[1], "row_seen", (3,)), "layer 1: row 0 holds 20 tokens and has seen 3"),
        (lambda c: setattr(c.layers[1], "seen", 3), "interrupted: layer 0 has seen 40 tokens, layer 1 3"),
        (
            lambda c: setattr(arena(c), "keys", torch.zeros(1, 2, 999, 16)),
            r"the cache holds \d+ bytes, its budget allows \d+",
        ),
        (lambda c: c.shared.change(-8), r"the cache holds \d+ bytes and has counted \d+"),
    ]
    for change, message in changes:
        with pytest.raises(CacheError, match=message):
            spoil(change).check_integrity()


# -- saved caches ------------------------------------------------------------------------------------

SAVED = [("llama", "snapkv(window=4)"), ("gemma3", "keydiff"), ("llama", "razor"), ("llama", "adakv+h2o")]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], tuple[Any, bytes, list[Any]]]:
    """For each kind: its model, the bytes of its file, and what a load of it holds."""
    folder, found = tmp_path_factory.mktemp("saved"), {}
    for name, policy in SAVED:
        model, cache = used(name, policy)
        path = folder / "cache.safetensors"
        cache.save(path)
        found[name, policy] = model, path.read_bytes(), state(BudgetCache.load(path, model))
    return found


@pytest.mark.parametrize("kind", SAVED, ids=str)
def test_a_flipped_bit_anywhere_is_noticed_or_means_nothing(kind: Any, saved: Any, tmp_path: Path) -> None:
    model, raw, expected = saved[kind]
    rng = random.Random(0)
    header = 8 + struct.unpack("<Q", raw[:8])[0]
    places = [*range(8), *rng.sample(range(8, header), 250), *rng.sample(range(header, len(raw)), 60)]
    path, refused = tmp_path / "flipped.safetensors", 0
    for place in places:
        spoiled = bytearray(raw)
        spoiled[place] ^= 1 << rng.randrange(8)
        path.write_bytes(spoiled)
        try:
            cache = BudgetCache.load(path, model)
        except SnapshotError:
            refused += 1
            continue
        assert same(state(cache), expected), f"byte {place} of {len(raw)}"
    assert refused > 0.9 * len(places)


@pytest.mark.parametrize("kind", SAVED, ids=str)
def test_a_truncated_or_lengthened_file_is_refused(kind: Any, saved: Any, tmp_path: Path) -> None:
    model, raw, _ = saved[kind]
    path = tmp_path / "short.safetensors"
    rng = random.Random(1)
    cut = [
        raw[:n] for n in (0, 1, 7, 8, 9, 100, len(raw) // 2, len(raw) - 1, *rng.sample(range(len(raw)), 25))
    ]
    for spoiled in (*cut, raw + b"\0", raw + raw, b"\0" * len(raw)):
        path.write_bytes(spoiled)
        with pytest.raises(SnapshotError, match=r"short\.safetensors"):
            BudgetCache.load(path, model)


def rewrite(raw: bytes, path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """The file with another header, made whole again, as a later version or a meddler might write it."""
    path.write_bytes(raw)
    tensors = load_file(path)
    length = struct.unpack("<Q", raw[:8])[0]
    header = json.loads(json.loads(raw[8 : 8 + length])["__metadata__"]["modicum"])
    change(header)
    save_file(tensors, path, metadata={"modicum": json.dumps(header)})


def test_a_newer_format_is_refused_by_its_number(saved: Any, tmp_path: Path) -> None:
    model, raw, _ = saved[SAVED[0]]
    path = tmp_path / "newer.safetensors"
    rewrite(raw, path, lambda header: header.update(format=9, added="later"))
    with pytest.raises(SnapshotError, match="has format 9, this version reads up to 3: upgrade modicum"):
        BudgetCache.load(path, model)
    for odd in ("1", None, [1]):
        rewrite(raw, path, lambda header, odd=odd: header.update(format=odd))
        with pytest.raises(SnapshotError, match="no format number"):
            BudgetCache.load(path, model)


def test_a_cache_of_the_first_format_is_read(saved: Any, tmp_path: Path) -> None:
    """Which knew no positions but the original ones."""
    model, raw, _ = saved[SAVED[0]]
    path = tmp_path / "first.safetensors"

    def older(header: dict[str, Any]) -> None:
        del header["positions"], header["checksum"]
        header["format"] = 1
        header["checksum"] = _checksum(header, load_file(path))

    rewrite(raw, path, older)
    assert BudgetCache.load(path, model).numbering == "original"


@pytest.mark.parametrize(
    "key", ["policy", "budget", "shape", "positions", "batch", "layers", "capacities", "checksum"]
)
def test_a_header_that_was_meddled_with_is_refused(key: str, saved: Any, tmp_path: Path) -> None:
    model, raw, _ = saved[SAVED[0]]
    path = tmp_path / "meddled.safetensors"
    for change in (
        lambda header: header.pop(key),
        lambda header: header.update({key: None}),
        lambda header: header.update({key: [3]}),
    ):
        rewrite(raw, path, change)
        with pytest.raises(SnapshotError):
            BudgetCache.load(path, model)


def test_what_is_no_saved_cache_is_refused(tmp_path: Path) -> None:
    model = zoo.shared("llama")
    pickled, text, tensors = tmp_path / "a.pkl", tmp_path / "b.txt", tmp_path / "c.safetensors"
    folder, nothing = tmp_path / "folder", tmp_path / "nothing"

    class Trap:
        def __reduce__(self) -> Any:
            return (Path.touch, (tmp_path / "sprung",))

    pickled.write_bytes(pickle.dumps(Trap()))
    torch.save({"cache": torch.zeros(3), "trap": Trap()}, tmp_path / "d.pt")
    text.write_text("not a cache\n" * 50)
    save_file({"x": torch.zeros(3)}, tensors)
    folder.mkdir()
    for path, message in (
        (pickled, "truncated or corrupted, or no saved cache at all"),
        (tmp_path / "d.pt", "truncated or corrupted, or no saved cache at all"),
        (text, "truncated or corrupted, or no saved cache at all"),
        (tensors, "holds tensors, but no cache saved by modicum"),
        (folder, "there is no saved cache at"),
        (nothing, "there is no saved cache at"),
    ):
        with pytest.raises(SnapshotError, match=message) as caught:
            BudgetCache.load(path, model)
        assert str(path) in str(caught.value)
    assert not (tmp_path / "sprung").exists()


@pytest.mark.parametrize(
    ("other", "what"),
    [
        (lambda: zoo.build("llama", seed=1), "embeddings"),
        (lambda: zoo.build("llama", torch.bfloat16), r"dtype differ \(float32, this one bfloat16\)"),
        (lambda: zoo.build("llama-mqa"), "attention layers"),
        (lambda: zoo.build("qwen3"), r"model type differ \(llama, this one qwen3\)"),
        (lambda: zoo.build("gpt-neox"), "model type"),
    ],
)
def test_a_cache_saved_with_another_model_is_refused(
    other: Callable[[], Any], what: str, tmp_path: Path
) -> None:
    _, cache = used()
    cache.save(tmp_path / "cache.safetensors")
    with pytest.raises(SnapshotError, match=f"saved with another model: its {what}"):
        BudgetCache.load(tmp_path / "cache.safetensors", other())


def test_a_policy_of_the_users_own_is_named_when_it_is_not_there(tmp_path: Path, saved: Any) -> None:
    model, raw, _ = saved[SAVED[0]]
    path = tmp_path / "own.safetensors"
    rewrite(raw, path, lambda header: header.update(policy="mine(a=3)"))
    with pytest.raises(SnapshotError, match=r"own\.safetensors"):
        BudgetCache.load(path, model)


def test_saving_where_one_cannot_is_an_error_and_leaves_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, cache = used()
    with pytest.raises(SnapshotError, match="cannot write"):
        cache.save(tmp_path / "missing" / "cache.safetensors")
    path = tmp_path / "cache.safetensors"
    cache.save(path)
    whole = path.read_bytes()

    def half(tensors: object, part: Path, metadata: object) -> None:
        part.write_bytes(whole[: len(whole) // 2])
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as full:
        full.setattr("modicum.kv.snapshot.save_file", half)
        with pytest.raises(SnapshotError, match=r"cannot write .*No space left"):
            cache.save(path)
    assert [file.name for file in tmp_path.iterdir()] == [path.name]
    assert path.read_bytes() == whole
    assert same(state(BudgetCache.load(path, model)), state(cache))


def test_an_unused_cache_is_saved_and_loaded(tmp_path: Path) -> None:
    for name in ("llama", "gemma3", "mistral-window"):
        model = zoo.build(name)
        cache = BudgetCache(model, "snapkv(window=4)", 20, chunk=16, **SMALL)
        cache.save(tmp_path / "cache.safetensors")
        twin = BudgetCache.load(tmp_path / "cache.safetensors", model)
        assert (twin.seen, twin.nbytes, twin.budget, twin.plan) == (0, 0, cache.budget, cache.plan)
        feed(model, twin, zoo.tokens(2, 30), after=lambda twin=twin: check_limits(twin))


def test_errors_are_exported() -> None:
    for name in ("ModicumError", "BudgetError", "PolicyError", "ModelError", "InputError", "CacheError"):
        assert name in modicum.__all__
