"""A model that the user has compiled gives with a budget cache what it gives uncompiled."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from modicum import BudgetCache
from modicum.compat import cache_kwargs
from tests import zoo
from tests.driver import all_kept, check_limits, pad_left

SMALL: dict[str, Any] = {"chunk": 16, "n_sink": 2, "recent": 4}
EXACT = {"rtol": 1e-4, "atol": 1e-4}
"""fp32 logits of size about 2 through two layers; a compiler adds in another order."""


def in_place(model: Any) -> Any:
    model.compile(backend="eager")
    return model


WAYS: dict[str, Callable[[Any], Any]] = {
    "torch.compile(model.forward)": lambda model: torch.compile(model.forward, backend="eager"),
    "torch.compile(model)": lambda model: torch.compile(model, backend="aot_eager"),
    "model.compile()": in_place,
}


@torch.no_grad()
def read(run: Any, model: Any, cache: BudgetCache, ids: Tensor, mask: Tensor | None, first: int) -> Tensor:
    """Logits of a prompt of `first` columns, three steps and a call of several columns."""
    out = []
    for a, b in ((0, first), *((i, i + 1) for i in range(first, first + 3)), (first + 3, first + 8)):
        more: dict[str, Any] = {}
        if mask is not None:
            more = {"attention_mask": mask[:, :b], "position_ids": (mask[:, :b].cumsum(1) - 1).clamp_min(0)}
            more["position_ids"] = more["position_ids"][:, a:]
        step = run(ids[:, a:b].clone(), **cache_kwargs(model, cache), use_cache=True, **more)
        out.append(step.logits[:, -1].clone())
        check_limits(cache)
    return torch.cat(out)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("static", [False, "auto"])
def test_tokens_are_those_of_the_model_uncompiled(way: str, static: Any) -> None:
    torch._dynamo.reset()
    plain, ids = zoo.build("llama"), zoo.tokens(2, 40)
    model = zoo.build("llama")
    run = WAYS[way](model)
    for first in (30, 17) if way == "torch.compile(model)" else (30,):
        cache, twin = (BudgetCache(m, "keydiff", 20, **SMALL, compile=static) for m in (model, plain))
        got = read(run, model, cache, ids, None, first)
        torch.testing.assert_close(got, read(plain, plain, twin, ids, None, first), **EXACT)
        assert all_kept(cache) == all_kept(twin)


@pytest.mark.parametrize(
    ("name", "policy", "static"),
    [("llama", "h2o", "auto"), ("gemma3", "snapkv(window=4)", False), ("llama", "adakv+tova", False)],
)
def test_padded_rows_are_those_of_the_model_uncompiled(name: str, policy: str, static: Any) -> None:
    torch._dynamo.reset()
    plain, model = zoo.build(name), zoo.build(name)
    ids, mask = pad_left([zoo.tokens(1, n, seed=n)[0] for n in (36, 24)])
    run = torch.compile(model, backend="eager")
    cache, twin = (BudgetCache(m, policy, 20, **SMALL, compile=static) for m in (model, plain))
    got = read(run, model, cache, ids, mask, 26)
    torch.testing.assert_close(got, read(plain, plain, twin, ids, mask, 26), **EXACT)
    assert all_kept(cache) == all_kept(twin)


def test_generate_of_a_compiled_model_gives_the_same_tokens() -> None:
    torch._dynamo.reset()
    plain, model, ids = zoo.build("llama"), in_place(zoo.build("llama")), zoo.tokens(1, 30)
    tokens = []
    for each in (plain, model):
        cache = BudgetCache(each, "keydiff", 20, **SMALL)
        how = {"max_new_tokens": 5, "do_sample": False}
        tokens.append(each.generate(ids, **cache_kwargs(each.generate, cache), **how).tolist())
    assert tokens[0] == tokens[1]
