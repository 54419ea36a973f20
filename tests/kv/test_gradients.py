"""Gradients do not pass a budget cache: a backward pass raises, calls without one are served."""

from __future__ import annotations

import weakref
from typing import Any

import pytest
import torch
from torch import Tensor

from modicum import BudgetCache, CacheError
from modicum.compat import cache_kwargs
from tests import zoo
from tests.bounds import LAMBDA, assert_within, network_error
from tests.driver import all_kept, feed, full_cache

SMALL = {"chunk": 16, "n_sink": 2, "recent": 4}
POLICIES = ["keydiff", "h2o", "snapkv(window=4)", "adakv+tova", "razor"]
budgeted = pytest.mark.parametrize("name", [name for name in zoo.ALL if name != "mistral-window"])


def call(model: Any, cache: BudgetCache, ids: Tensor, first: int = 0) -> Tensor:
    """Logits of a call outside `torch.no_grad`."""
    logits: Tensor = model(ids[:, first:], **cache_kwargs(model, cache), use_cache=True).logits
    assert logits.requires_grad
    return logits


@budgeted
@pytest.mark.parametrize("new", [1, 12])
def test_a_backward_pass_is_refused(name: str, new: int) -> None:
    model = zoo.build(name)
    cache = BudgetCache(model, "keydiff", 20, **SMALL)
    feed(model, cache, zoo.tokens(1, 30))
    with pytest.raises(CacheError, match=r"passes no gradients on.*torch\.no_grad\(\)"):
        call(model, cache, zoo.tokens(1, 30 + new), 30).sum().backward()
    assert all(p.grad is None for name, p in model.named_parameters() if "q_proj" in name)
    cache.check_integrity()


@pytest.mark.parametrize("policy", POLICIES)
def test_gradients_of_embeddings_are_refused(policy: str) -> None:
    """Of 30 tokens all but the last would get none, as their keys are held without a graph."""
    model = zoo.build("llama")
    embeddings = model.get_input_embeddings()(zoo.tokens(1, 30)).detach().requires_grad_()
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    cache = BudgetCache(model, policy, 20, **SMALL)
    loss = model(inputs_embeds=embeddings, **cache_kwargs(model, cache), use_cache=True).logits[:, -1].sum()
    with pytest.raises(CacheError, match="passes no gradients on"):
        torch.autograd.grad(loss, embeddings)


@pytest.mark.parametrize("trained", ["q_proj", "k_proj", "v_proj"])
def test_gradients_of_one_projection_are_refused(trained: str) -> None:
    model = zoo.build("llama")
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(f"layers.1.self_attn.{trained}" in name)
    cache = BudgetCache(model, "keydiff", 20, **SMALL)
    with pytest.raises(CacheError, match="passes no gradients on"):
        call(model, cache, zoo.tokens(1, 30)).sum().backward()


def test_gradients_that_pass_no_attention_are_right() -> None:
    model, ids = zoo.build("llama"), zoo.tokens(1, 15)
    cache = BudgetCache(model, "keydiff", 20, **SMALL)
    got = torch.autograd.grad(call(model, cache, ids).square().sum(), model.lm_head.weight)
    whole = model(ids, use_cache=False, output_hidden_states=True)
    wanted = torch.autograd.grad(whole.logits.square().sum(), model.lm_head.weight)
    # 2 Σ logit · hidden over 15 tokens; either factor is off by its share, on both routes.
    share = 2 * LAMBDA * network_error(model, 15)
    logits, hidden = whole.logits.detach().abs().amax(), whole.hidden_states[-1].detach().abs().amax()
    assert_within(got[0], wanted[0], float(2 * 15 * 2 * share * logits * hidden))


def test_earlier_tokens_of_a_window_are_refused() -> None:
    model, ids = zoo.build("mistral-window"), zoo.tokens(1, 12)
    cache = BudgetCache(model, "keydiff", 20, **SMALL)
    call(model, cache, ids[:, :8]).sum().backward()  # whole within the call
    with pytest.raises(CacheError, match="passes no gradients on"):
        call(model, cache, ids, 8).sum().backward()


@budgeted
@pytest.mark.parametrize("policy", POLICIES)
def test_calls_outside_no_grad_are_those_within(name: str, policy: str) -> None:
    model, ids = zoo.shared(name), zoo.tokens(2, 34)
    within = BudgetCache(model, policy, 20, **SMALL)
    wanted = feed(model, within, ids, cuts=(30, 31, 32, 33))
    cache = BudgetCache(model, policy, 20, **SMALL)
    got = [call(model, cache, ids[:, :b], a) for a, b in ((0, 30), (30, 31), (31, 32), (32, 33), (33, 34))]
    assert torch.equal(torch.cat(got, 1), wanted)
    assert all_kept(cache) == all_kept(within)
    twin = cache.copy()
    assert all_kept(twin) == all_kept(cache)


class Mark:
    """Something that lives as long as the node of a graph that it is attached to."""


def graph_survives(model: Any, cache: Any, ids: Tensor) -> bool:
    """Whether a call's graph is alive once its results are gone."""
    marks: list[weakref.ref[Mark]] = []

    def attach(module: Any, args: Any, output: Tensor) -> None:
        mark = Mark()
        output.grad_fn.metadata["mark"] = mark
        marks.append(weakref.ref(mark))

    names = ("q_proj", "k_proj", "v_proj")
    found = [module for name, module in model.named_modules() if name.endswith(names)]
    hooks = [module.register_forward_hook(attach) for module in found]
    model(ids, **cache_kwargs(model, cache), use_cache=True)
    for hook in hooks:
        hook.remove()
    assert len(marks) == len(found) > 0
    return any(mark() is not None for mark in marks)


@pytest.mark.parametrize("name", ["llama", "gemma3", "mistral-window"])
@pytest.mark.parametrize("static", [False, "auto"])
@pytest.mark.parametrize("policy", ["h2o", "snapkv(window=4)"])
def test_no_graph_outlives_its_call(name: str, static: Any, policy: str) -> None:
    model, ids = zoo.build(name), zoo.tokens(1, 40)
    cache = BudgetCache(model, policy, 20, **SMALL, compile=static)
    for a, b in ((0, 30), (30, 31), (31, 32), (32, 40)):
        assert not graph_survives(model, cache, ids[:, a:b])
    assert graph_survives(model, full_cache(model), ids)  # else the test sees nothing
