"""Under `torch.autocast` a cache holds the model's dtype, stays within its bytes, and scores in fp32."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AttentionInterface
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from modicum import BudgetCache
from modicum.compat import cache_kwargs
from modicum.kv.heads import probe
from tests import zoo
from tests.driver import all_kept, check_limits

SMALL: dict[str, Any] = {"chunk": 16, "n_sink": 2, "recent": 4}
POLICIES = [
    "keydiff",
    "manifoldkv",
    "snapkv(window=4)",
    "h2o",
    "obcache(window=4)",
    "compactor(window=4)",
    "triattention(window=4)",
    "tova",
    "caote+snapkv(window=4)",
    "criticalkv+snapkv(window=4)",
    "adakv+tova",
    "razor",
]
CALLS = ((0, 30), (30, 31), (31, 32), (32, 33), (33, 38), (38, 39), (39, 40))
Call = tuple[Any, Tensor, Tensor, Tensor, dict[str, Any]]
budgeted = pytest.mark.parametrize("name", [name for name in zoo.ALL if name != "mistral-window"])
dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)


@contextmanager
def recorded(model: Any, cache: BudgetCache) -> Iterator[list[Call]]:
    """Module, query, key, value and arguments of every call of a budgeted layer's attention."""
    calls: list[Call] = []
    name = model.config._attn_implementation[:]
    ours = ALL_ATTENTION_FUNCTIONS[name]

    def listen(module: Any, query: Tensor, key: Any, value: Any, mask: Any, **more: Any) -> Any:
        if not isinstance(key, Tensor):
            keys, values = key.layer.incoming
            calls.append((module, query.clone(), keys.clone(), values.clone(), {"mask": mask, **more}))
        return ours(module, query, key, value, mask, **more)

    AttentionInterface.register(name, listen)
    try:
        yield calls
    finally:
        AttentionInterface.register(name, ours)


@torch.no_grad()
def read(model: Any, cache: BudgetCache, ids: Tensor, low: torch.dtype | None) -> Tensor:
    """Logits of several calls, under autocast to `low`."""
    out = []
    for a, b in CALLS:
        with torch.autocast("cpu", low or torch.bfloat16, enabled=low is not None):
            out.append(model(ids[:, a:b], **cache_kwargs(model, cache), use_cache=True).logits)
        check_limits(cache)
    return torch.cat(out, 1).float()


@torch.no_grad()
def replay(model: Any, cache: BudgetCache, calls: list[Call]) -> None:
    """The same queries, keys and values into another cache, without autocast."""
    attention = ALL_ATTENTION_FUNCTIONS[model.config._attn_implementation]
    for module, query, key, value, more in calls:
        handles = cache.update(key, value, module.layer_idx)
        arguments = {name: x for name, x in more.items() if name != "mask"}
        attention(module, query.to(key.dtype), *handles, more["mask"], **arguments)


@dtypes
@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize(
    "more", [{}, {"compile": "auto"}, {"store": "int8"}, {"store": "int4"}, {"positions": "renumbered"}]
)
def test_what_is_kept_is_what_the_same_keys_give_without(
    policy: str, dtype: torch.dtype, more: dict[str, Any]
) -> None:
    if "triattention" in policy and more.get("store") == "int4":
        pytest.skip("refused: see test_rotation")
    model, ids = zoo.build("llama", dtype), zoo.tokens(2, 40)
    cache, twin = (BudgetCache(model, policy, 20, **SMALL, **more) for _ in range(2))
    with recorded(model, cache) as calls:
        read(model, cache, ids, torch.bfloat16)
    assert {x.dtype for _, _, key, value, _ in calls for x in (key, value)} == {dtype}
    assert len(calls) == len(CALLS) * 2
    replay(model, twin, calls)
    assert all_kept(cache) == all_kept(twin)
    assert cache.nbytes == twin.nbytes == cache.budget_nbytes


@budgeted
@pytest.mark.parametrize(
    ("dtype", "low"),
    [(torch.float32, torch.bfloat16), (torch.float32, torch.float16), (torch.bfloat16, torch.bfloat16)],
    ids=str,
)
def test_every_family_is_served_under_autocast(name: str, dtype: torch.dtype, low: torch.dtype) -> None:
    model, ids = zoo.build(name, dtype), zoo.tokens(1, 40)
    wide = BudgetCache(model, "keydiff", 64, **SMALL)
    full = read(model, wide, ids, low)
    with torch.no_grad(), torch.autocast("cpu", low):
        wanted = model(ids, use_cache=False).logits.float()
    # As transformers' attention in one call, to a few roundings of the 16-bit products.
    unit = torch.finfo(torch.bfloat16).eps * wanted.std()
    assert (full - wanted).square().mean().sqrt() < 6 * unit
    budget = BudgetCache(model, "keydiff", 20, **SMALL)
    read(model, budget, ids, low)
    held = [layer.keys if layer.is_sliding else layer.banks[0].arena.keys for layer in budget.layers]
    assert {keys.dtype for keys in held} == {dtype}


def test_autocast_may_come_and_go() -> None:
    model, ids = zoo.build("llama"), zoo.tokens(1, 40)
    cache = BudgetCache(model, "keydiff", 20, **SMALL)
    with torch.no_grad():
        for turn, (a, b) in enumerate(CALLS):
            with torch.autocast("cpu", torch.bfloat16, enabled=turn % 2 == 0):
                model(ids[:, a:b], **cache_kwargs(model, cache), use_cache=True)
            check_limits(cache)


@dtypes
def test_the_probe_finds_the_same_heads_under_autocast(dtype: torch.dtype) -> None:
    model = zoo.build("llama", dtype)
    wanted = probe(model)
    with torch.autocast("cpu", torch.bfloat16):
        assert probe(model) == wanted
        # So does the look at a model's rotary embedding.
        assert BudgetCache(model, "keydiff", 20, **SMALL, positions="renumbered").numbering == "renumbered"


@pytest.mark.parametrize("policy", ["keydiff", "snapkv(window=4)"])
def test_a_compiled_step_keeps_the_same_under_autocast(policy: str) -> None:
    model, ids = zoo.build("llama"), zoo.tokens(2, 34)
    torch._dynamo.reset()
    run = torch.compile(model.__call__, fullgraph=True, dynamic=False, backend="aot_eager")
    wanted = BudgetCache(model, policy, 20, **SMALL)
    got = BudgetCache(model, policy, 20, **SMALL, compile=True)
    logits: list[list[Tensor]] = [[], []]
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        for cache, out in zip((wanted, got), logits, strict=True):
            model(ids[:, :24], **cache_kwargs(model, cache), use_cache=True)
            for i in range(24, 34):
                step = run if cache is got and cache.prepare() else model
                at = torch.tensor([[i]])
                how = {**cache_kwargs(model, cache), "position_ids": at, "use_cache": True}
                out.append(step(ids[:, i : i + 1].clone(), **how).logits.float().clone())
    both = [torch.cat(out, 1) for out in logits]
    unit = torch.finfo(torch.bfloat16).eps * both[0].std()
    assert (both[0] - both[1]).square().mean().sqrt() < 6 * unit
    assert all_kept(got) == all_kept(wanted)
