"""Steps of all layers together against steps layer by layer; running sums; one graph; what is refused."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

import modicum
from modicum import BudgetCache, PolicyError
from modicum.compat import cache_kwargs
from modicum.errors import InputError
from modicum.kernels import dispatch
from modicum.kv.filling import Filling
from modicum.kv.shared import Shared
from modicum.kv.span import Span
from tests import zoo
from tests.bounds import FUNCTION, assert_same_logits, assert_within, gamma
from tests.driver import budget_layers, check_limits
from tests.kv.profiles import give_profile

SMALL = {"chunk": 16, "n_sink": 2, "recent": 4}
POLICIES = [
    "keydiff",
    "manifoldkv",
    "knorm",
    "random",
    "streamingllm",
    "tova",
    "h2o",
    "snapkv(window=4)",
    "ahakv(window=4)",
    "obcache(window=4)",
    "compactor(window=4)",
    "triattention(window=4)",
    "learned",
    "calibrated+learned",
    "replay(window=4)",
    "caote+tova",
    "fastcaote+h2o",
    "razor",
    "pyramidkv+keydiff",
]


@torch.no_grad()
def decoded(cache: BudgetCache, model: Any, ids: Tensor, first: int, run: Any = None) -> Tensor:
    """Logits of a prompt of `first` tokens and of every token after it."""
    outs = [model(ids[:, :first], **cache_kwargs(model, cache), use_cache=True).logits[:, -1]]
    for i in range(first, ids.shape[1]):
        if run is not None:
            assert cache.prepare()
        at = torch.tensor([[i]])
        step = (run or model)(
            ids[:, i : i + 1].clone(), **cache_kwargs(model, cache), position_ids=at, use_cache=True
        )
        outs.append(step.logits[:, -1].clone())
    return torch.stack(outs)


def kept(cache: BudgetCache) -> list[Tensor]:
    return [cache.positions(i).sort(-1).values for i in range(len(cache.layers))]


@pytest.mark.parametrize("policy", POLICIES)
def test_together_is_what_apart_is(policy: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, ids = zoo.build("llama"), zoo.tokens(2, 44)
    if "learned" in policy:
        give_profile(model)
    together = BudgetCache(model, policy, 20, **SMALL)
    got = decoded(together, model, ids, 12)
    assert together.shared.steps is not None  # else nothing is compared
    static = BudgetCache(model, policy, 20, **SMALL, compile=True)
    same = decoded(static, model, ids, 12)
    assert static.shared.steps is not None
    assert static.shared.steps.static
    monkeypatch.setattr(Shared, "_decide", lambda self, mask: None)
    apart = BudgetCache(model, policy, 20, **SMALL)
    wanted = decoded(apart, model, ids, 12)
    for cache, logits in ((together, got), (static, same)):
        assert_same_logits(model, logits, wanted, 44)
        assert all(map(torch.equal, kept(cache), kept(apart)))
        assert cache.seen == apart.seen
        check_limits(cache)


@pytest.mark.parametrize("store", ["int8", "k8v4", "int4"])
@pytest.mark.parametrize("policy", ["learned", "calibrated+learned", "streamingllm"])
def test_coded_slots_go_together_where_scores_do_not_read_them(
    policy: str, store: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, ids = zoo.build("llama"), zoo.tokens(2, 44)
    if "learned" in policy:
        give_profile(model)
    reads: list[Span] = []
    decode = Span.decoded
    together = BudgetCache(model, policy, 20, **SMALL, store=store)
    with monkeypatch.context() as patch:
        patch.setattr(Span, "decoded", lambda span: (reads.append(span), decode(span))[1])
        got = decoded(together, model, ids, 12)
    steps = together.shared.steps
    assert steps is not None
    # Each layer decodes what it attends to, and nobody else does.
    places = sum(len(places) for places in steps.places)
    assert len(reads) > 0
    assert len(reads) % places == 0
    assert all(len(span.layers) == 1 for span in reads)
    monkeypatch.setattr(Shared, "_decide", lambda self, mask: None)
    apart = BudgetCache(model, policy, 20, **SMALL, store=store)
    wanted = decoded(apart, model, ids, 12)
    assert_same_logits(model, got, wanted, 44)
    assert all(map(torch.equal, kept(together), kept(apart)))
    check_limits(together)


def test_coded_slots_that_scores_read_are_decoded_once_layer_by_layer() -> None:
    model = zoo.build("llama")
    cache = BudgetCache(model, "keydiff", 20, **SMALL, store="int8")
    decoded(cache, model, zoo.tokens(1, 44), 12)
    assert cache.shared.steps is None


@pytest.mark.parametrize("store", ["model", "int8", "k8v4", "int4"])
def test_a_key_that_is_no_number_changes_nothing(store: str) -> None:
    model, ids = zoo.build("llama"), zoo.tokens(1, 40)
    cache = BudgetCache(model, "streamingllm", 20, **SMALL, store=store)
    decoded(cache, model, ids, 30)
    assert cache.shared.steps is not None
    before = kept(cache)
    last = model.model.layers[-1].self_attn.k_proj
    hook = last.register_forward_hook(lambda _, __, out: out * math.nan)
    with torch.no_grad(), pytest.raises(InputError, match="are not finite"):
        model(ids[:, :1], **cache_kwargs(model, cache), use_cache=True)
    hook.remove()
    assert all(map(torch.equal, kept(cache), before))
    assert cache.seen == 40
    cache.check_integrity()


@pytest.mark.parametrize("evict_every", [1, 5])
@pytest.mark.parametrize(
    "policy",
    ["full", "keydiff", "razor", "adakv+snapkv(window=4)", "criticalkv+snapkv(window=4)", "caote+tova"],
)
def test_filling_is_what_apart_is(policy: str, evict_every: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps while there is room: as a cache fills, and between two evictions of several tokens."""
    model, ids = zoo.build("llama"), zoo.tokens(2, 44)
    how: dict[str, Any] = {**SMALL, "evict_every": evict_every}
    steps: list[bool] = []
    decide = Shared._decide

    def watched(self: Shared, mask: Tensor | None) -> Any:
        found = decide(self, mask)
        steps.append(isinstance(found, Filling))
        return found

    monkeypatch.setattr(Shared, "_decide", watched)
    budget = 44 if policy == "full" else 20
    filling = BudgetCache(model, policy, budget, **how)
    got = decoded(filling, model, ids, 12)
    # RazorAttention's small heads are full before the first of these steps.
    assert sum(steps) >= (20 if evict_every > 1 else 0 if policy == "razor" else 8)
    monkeypatch.setattr(Shared, "_decide", lambda self, mask: None)
    apart = BudgetCache(model, policy, budget, **how)
    wanted = decoded(apart, model, ids, 12)
    assert_same_logits(model, got, wanted, 44)
    assert all(map(torch.equal, kept(filling), kept(apart)))
    assert filling.seen == apart.seen
    assert filling.peak_nbytes == apart.peak_nbytes
    check_limits(filling)


@pytest.mark.parametrize("policy", ["keydiff", "manifoldkv", "caote+tova"])
def test_a_padded_row_is_itself_where_counts_are_tensors(policy: str) -> None:
    model, ids = zoo.build("llama"), zoo.tokens(1, 40)
    alone = BudgetCache(model, policy, 20, **SMALL, compile=True)
    wanted = decoded(alone, model, ids, 25)
    both = BudgetCache(model, policy, 20, **SMALL, compile=True)
    rows, mask = ids.repeat(2, 1), torch.ones(2, 40, dtype=torch.long)
    rows = torch.cat([zoo.tokens(2, 7), rows], dim=1)
    mask = torch.cat([torch.tensor([[0] * 7, [1] * 7]), mask], dim=1)
    outs = []
    with torch.no_grad():
        for a, b in ((0, 32), *((i, i + 1) for i in range(32, 47))):
            at = (mask[:, :b].cumsum(1) - 1).clamp_min(0)[:, a:]
            out = model(
                rows[:, a:b],
                **cache_kwargs(model, both),
                attention_mask=mask[:, :b],
                position_ids=at,
                use_cache=True,
            )
            outs.append(out.logits[:1, -1])
    assert_same_logits(model, torch.stack(outs), wanted, 47)
    assert both.row_seen == (40, 47)
    for here, there in zip(kept(both), kept(alone), strict=True):
        assert torch.equal(here[:1], there)


@pytest.mark.parametrize("policy", ["keydiff", "manifoldkv"])
def test_running_sums_are_those_made_anew(policy: str) -> None:
    """After hundreds of steps, to the rounding of fp64 sums of fp32 terms."""
    model, ids = zoo.build("llama"), zoo.tokens(1, 400)
    cache = BudgetCache(model, policy, 20, **SMALL)
    decoded(cache, model, ids, 40)
    for _, layer in budget_layers(cache):
        for bank in layer.banks:
            running = bank.arena.sums.clone()
            bank.arena.settle()
            n, arena = bank.arena.used, bank.arena
            keys = arena.keys[:, :, :n].double()
            term = keys / keys.norm(dim=-1, keepdim=True) if policy == "keydiff" else keys
            # Each of 400 tokens added its term, and most took theirs away again: 800 sums in float64 of terms
            # in fp32. A key is exact; its direction was divided by a norm in fp32.
            most = term.abs().amax(2) * 20
            bound = gamma(800, torch.float64) * most
            if policy == "keydiff":
                bound += gamma(term.shape[-1] / 2 + FUNCTION, torch.float32) * term.abs().sum(2)
            assert_within(running, term.sum(2), bound, "running sums")


@pytest.mark.parametrize("store", ["model", "int4"])
def test_one_graph_serves_all_steps_and_other_caches(store: str) -> None:
    """Compiled once: while the cache fills, once it is full, and in a second cache of the same shape."""
    # In float64 no code falls to the other side of a half.
    model = zoo.build("llama", torch.float32 if store == "model" else torch.float64)
    ids, how = zoo.tokens(2, 44), {**SMALL, "store": store}
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    run = torch.compile(model.__call__, fullgraph=True, dynamic=False, backend=counter)
    wanted = decoded(BudgetCache(model, "keydiff", 20, **how), model, ids, 12)
    for copied in (False, True):
        cache = BudgetCache(model, "keydiff", 20, **how, compile=True)
        got = decoded(cache.copy() if copied else cache, model, ids, 12, run)
        assert_same_logits(model, got, wanted, 44)
    assert counter.frame_count == 1


@pytest.mark.inductor
def test_generate_compiles_and_says_the_same() -> None:
    model, tokenizer = modicum.load("reference")
    text = "The special number for red is 7. " * 40
    how: dict[str, Any] = {"policy": "keydiff", "budget": 64, "chunk": 64, "max_new_tokens": 12}
    wanted = modicum.generate(model, tokenizer, text, **how)
    got = modicum.generate(model, tokenizer, text, **how, compile=True)
    assert got.tokens == wanted.tokens
    assert got.cache is not None
    assert got.seen == wanted.seen


@pytest.mark.parametrize(
    ("policy", "more", "why"),
    [
        ("full", {}, "never evicts"),
        ("adakv+snapkv(window=4)", {}, "heads compete"),
        ("criticalkv+snapkv(window=4)", {}, "output projection"),
        ("keydiff(anchor_window=8)", {}, "what it finds"),
        ("caote(iterative=True)+tova", {}, "what it finds"),
        ("keydiff", {"evict_every": 4}, "evict_every"),
        ("keydiff", {"positions": "renumbered"}, "renumbered"),
    ],
)
def test_what_cannot_be_compiled_is_refused_by_name(policy: str, more: dict[str, Any], why: str) -> None:
    model = zoo.build("llama")
    with pytest.raises(PolicyError, match=f"cannot be compiled: .*{why}.*'auto'"):
        BudgetCache(model, policy, 60, **SMALL, **more, compile=True)
    assert not BudgetCache(model, policy, 60, **SMALL, **more, compile="auto").compiled


def test_compile_is_yes_no_or_auto() -> None:
    with pytest.raises(InputError, match="True, False or 'auto'"):
        BudgetCache(zoo.build("llama"), "keydiff", 60, **SMALL, compile="yes")  # type: ignore[arg-type]


@pytest.mark.parametrize("budget", [20, 60])
def test_a_step_cut_short_changes_nothing(budget: int) -> None:
    """In a full cache, and in one that is filling."""
    model, ids = zoo.build("llama"), zoo.tokens(1, 42)
    cache, twin = (BudgetCache(model, "keydiff", budget, **SMALL) for _ in range(2))
    decoded(cache, model, ids[:, :40], 36)
    wanted = decoded(twin, model, ids, 36)[-2:]

    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    last = model.model.layers[-1].register_forward_pre_hook(stop)
    with pytest.raises(KeyboardInterrupt), torch.no_grad():
        model(ids[:, 40:41], **cache_kwargs(model, cache), use_cache=True)
    last.remove()
    cache.check_integrity()
    with torch.no_grad():
        got = [
            model(ids[:, i : i + 1], **cache_kwargs(model, cache), use_cache=True).logits[:, -1]
            for i in (40, 41)
        ]
    assert_same_logits(model, torch.stack(got), wanted, 42)


KERNELS = [
    (p, s) for p in ("keydiff", "tova", "snapkv(window=4)", "razor") for s in ("model", "int8", "int4")
]


@pytest.mark.parametrize(("policy", "store"), [*KERNELS, ("learned", "model"), ("replay(window=4)", "int8")])
def test_a_cache_through_the_kernels_is_the_same(policy: str, store: str) -> None:
    """Prefill and decode by Triton (its interpreter, where there is no GPU) against plain torch."""
    pytest.importorskip("triton")
    model, ids = zoo.build("llama"), zoo.tokens(2, 33)
    if "learned" in policy:
        give_profile(model)
    plain = BudgetCache(model, policy, 20, **SMALL, store=store)
    wanted = decoded(plain, model, ids, 30)
    with dispatch.interpreted():
        by_kernel = BudgetCache(model, policy, 20, **SMALL, store=store)
        got = decoded(by_kernel, model, ids, 30)
        graph = BudgetCache(model, policy, 20, **SMALL, store=store, compile=True)
        same = decoded(graph, model, ids, 30)
    for cache, logits in ((by_kernel, got), (graph, same)):
        assert_same_logits(model, logits, wanted, 44)
        assert all(map(torch.equal, kept(cache), kept(plain)))
        check_limits(cache)
