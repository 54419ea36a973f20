"""Replay: chunks read twice. One shot against KVzip's definition, the bound, whole prompts, refusals."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

import modicum
from modicum import BudgetCache, CacheError, ModelError
from modicum.compat import cache_kwargs
from modicum.kernels import dispatch
from modicum.kv.call import cuts
from modicum.kv.policies.replay import Replay
from modicum.kv.view import Replay as SecondReading
from modicum.kv.view import View
from tests import zoo
from tests.bounds import FUNCTION, assert_same_logits, gamma, logit_bound, softmax_bound
from tests.driver import all_kept, budget_layers, check_limits, feed
from tests.kv import test_families
from tests.kv.references import reference
from tests.kv.views import make_view


def with_reading(view: View, columns: int, pads: bool) -> View:
    """The view with a random second reading; `pads`: some columns of each row hold no token."""
    rng = torch.Generator().manual_seed(columns)
    b, h, _ = view.positions.shape
    queries = torch.randn(b, h, view.group, columns, view.keys.shape[-1], generator=rng)
    keys = torch.randn(b, h, columns, view.keys.shape[-1], generator=rng)
    valid = torch.rand(b, columns, generator=rng) > 0.3 if pads else None
    norms = torch.rand(b, columns, generator=rng) + 0.5
    return replace(view, replay=SecondReading(queries, keys, valid, norms))


@pytest.mark.parametrize("pads", [False, True])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"parts": 2, "invalid": 5},
        {"invalid": 3, "empty": True},
        {"softcap": 0.5, "g": 3},
        {"n": 1, "newcomers": 1},
    ],
    ids=str,
)
@pytest.mark.parametrize("sinks", [False, True])
@pytest.mark.parametrize("plus", [False, True])
def test_scores_are_those_of_plain_loops(
    options: dict[str, Any], pads: bool, sinks: bool, plus: bool
) -> None:
    newcomers, policy = options.get("newcomers", 3), Replay(plus=plus)
    view = make_view(rows=newcomers, state=policy.state_width(options.get("g", 2)), seed=7, **options)
    assert view.state is not None
    view = replace(view, tally=torch.ones(*view.positions.shape[:2], 2 * plus).double())
    view = with_reading(replace(view, state=view.state.abs()), 6, pads)
    if sinks:
        view = replace(view, sink_logits=torch.randn(view.positions.shape[1], view.group))
    assert view.state is not None
    assert view.replay is not None
    wanted = [
        [reference(policy, view, row, head) for head in range(view.positions.shape[1])]
        for row in range(view.positions.shape[0])
    ]
    found = policy.observe(replace(view, state=view.state.clone()))[..., 0]
    keys = torch.cat([view.keys.flatten(0, 2), view.replay.keys.flatten(0, 2)])
    error = logit_bound(torch.float32, view.replay.queries, keys, view.scaling, view.softcap)
    count = view.positions.shape[2] + 6
    # A contribution is two more operations than a weight.
    bound = softmax_bound(count, torch.float32, error) + gamma(FUNCTION + 2, torch.float32)
    for row, heads in enumerate(wanted):
        for head, scores in enumerate(heads):
            for j, x in scores.items():
                assert abs(float(found[row, head, j]) - x) <= bound * x, (row, head, j)


@torch.no_grad()
def read_twice(model: Any, cache: BudgetCache, ids: Tensor, mask: Tensor | None = None) -> Tensor:
    """Logits [B, 2m, V] of ids [B, m] and of the same once more, for an empty cache."""
    both, m, more = torch.cat([ids, ids], 1), ids.shape[1], {}
    if mask is not None:
        there = torch.cat([mask, mask], 1)
        more = {"attention_mask": there, "position_ids": (there.cumsum(1) - 1).clamp_min(0)}
    with cache.replaying(m):
        logits: Tensor = model(both, **cache_kwargs(model, cache), use_cache=True, **more).logits
    return logits


@pytest.mark.parametrize("name", ["llama", "llama-mqa", "qwen3", "gemma2", "gpt-neox"])
def test_in_one_shot_it_is_kvzip(name: str) -> None:
    """KVzip: the text, then the text again; the largest weight over the second's queries and the group."""
    model, ids = zoo.build(name), zoo.tokens(1, 24)
    cache = BudgetCache(model, "replay", 64, chunk=48)
    read_twice(model, cache, ids)
    eager = zoo.build(name, torch.float64, attention="eager")
    with torch.no_grad():
        maps = eager(torch.cat([ids, ids], 1), output_attentions=True).attentions
    for i, layer in budget_layers(cache):
        weights, arena = maps[i][0], layer.banks[0].arena  # [Hq, 48, 48]
        group = weights.shape[0] // layer.shape.kv_heads
        for head in range(layer.shape.kv_heads):
            at = arena.positions[0, head].tolist()
            for j in range(24):
                best = max(
                    float(weights[head * group + g, i, j]) for g in range(group) for i in range(24, 48)
                )
                assert float(arena.state[0, head, at.index(j), 0]) == pytest.approx(best, rel=1e-3, abs=1e-6)


@pytest.mark.parametrize("name", ["llama", "llama-mqa", "qwen3"])
def test_in_one_shot_with_plus_it_is_kvzip_plus(name: str) -> None:
    """Contributions a_ij · ‖W_O v_j‖ / ‖h_i‖, with padding in one row, and the tally of what was read."""
    model, ids = zoo.build(name), zoo.tokens(2, 20)
    mask = torch.ones_like(ids)
    mask[1, :5] = 0
    cache = BudgetCache(model, "replay(plus=True)", 64, chunk=48)
    read_twice(model, cache, ids, mask)
    eager = zoo.build(name, torch.float64, attention="eager")
    for row, first in enumerate((0, 5)):
        own = ids[row, first:].repeat(2)[None]
        with torch.no_grad():
            told = eager(own, output_attentions=True, output_hidden_states=True, use_cache=False)
        for i, layer in budget_layers(cache):
            wanted = best_contributions(
                told.attentions[i][0],
                told.hidden_states[i][0].norm(dim=-1),
                layer.banks[0].arena.values[row].double(),
                layer.banks[0].arena.positions[row].tolist(),
                layer._output_weight(attention_of(model, i)).double(),
            )
            tally = layer.banks[0].arena.tally[row]
            assert tally[:, 0].tolist() == [20.0 - first] * len(tally)
            norm = told.hidden_states[i][0, 20 - first :].norm(dim=-1).sum()
            assert torch.allclose(tally[:, 1], norm.expand(len(tally)), rtol=1e-5)
            for (head, slot), best in wanted.items():
                found = float(layer.banks[0].arena.state[row, head, slot, 0])
                assert found == pytest.approx(best, rel=1e-3, abs=1e-9)


def best_contributions(
    weights: Tensor, norms: Tensor, values: Tensor, positions: list[list[int]], output: Tensor
) -> dict[tuple[int, int], float]:
    """(KV head, slot) -> the largest a · ‖v W‖ / ‖h‖ that a query of the second half makes of its token.

    weights [Hq, 2n, 2n], norms [2n], values [H, slots, Dv], positions by head and slot,
    output [H, G, Dv, hidden].
    """
    n, group, found = len(norms) // 2, output.shape[1], {}
    for head, places in enumerate(positions):
        for slot, position in enumerate(places):
            if not 0 <= position < n:
                continue
            found[head, slot] = max(
                float(weights[head * group + g, i, position] / norms[i])
                * float((values[head, slot] @ output[head, g]).norm())
                for g in range(group)
                for i in range(n, 2 * n)
            )
    return found


def attention_of(model: Any, layer: int) -> Any:
    """The module of a layer's attention."""
    return next(m for m in model.modules() if getattr(m, "layer_idx", None) == layer and layer_has(m))


def layer_has(module: Any) -> bool:
    """Whether it has an output projection."""
    return any(hasattr(module, name) for name in ("o_proj", "c_proj"))


def test_with_plus_steps_count_by_the_mean_norm_of_second_readings() -> None:
    """A step's own weights, times norms, over the mean norm; 1 where nothing was read twice."""
    model, ids = zoo.build("llama"), zoo.tokens(1, 12)
    caches = [BudgetCache(model, "replay(plus=True,window=2)", 64, chunk=48) for _ in range(2)]
    read_twice(model, caches[0], ids[:, :11])
    feed(model, caches[1], ids[:, :11])
    before = [c.layers[0].banks[0].arena.state[0, :, :11].clone() for c in caches]
    for cache in caches:
        feed(model, cache, ids, start=11)
    for cache, old, was_read in zip(caches, before, (True, False), strict=True):
        arena = cache.layers[0].banks[0].arena
        count, total = arena.tally[0, 0].tolist()
        assert count == 11 * was_read
        mean = total / count if was_read else 1.0
        eager = zoo.build("llama", torch.float64, attention="eager")
        with torch.no_grad():
            weights = eager(ids, output_attentions=True).attentions[0][0, :, 11]  # [Hq, 12]
        group = len(weights) // old.shape[0]
        for head in range(old.shape[0]):
            for j, position in enumerate(arena.positions[0, head, :11].tolist()):
                now = max(
                    float(weights[head * group + g, position] * old[head, j, 1 + g]) / mean
                    for g in range(group)
                )
                wanted = max(float(old[head, j, 0]), now)
                assert float(arena.state[0, head, j, 0]) == pytest.approx(wanted, rel=1e-3, abs=1e-9)


@pytest.mark.parametrize("name", ["llama", "gemma2", "mistral-window", "qwen2-window"])
def test_nothing_of_the_second_reading_is_held(name: str) -> None:
    """The first reading's logits, and all that comes later, are as if there had been no second one."""
    model, ids = zoo.build(name), zoo.tokens(2, 30)
    mask = torch.ones_like(ids)
    mask[1, :5] = 0
    cache, plain = (BudgetCache(model, "replay", 64, chunk=64, recent=8) for _ in range(2))
    got = read_twice(model, cache, ids[:, :20], mask[:, :20])
    wanted = feed(model, plain, ids[:, :20], mask[:, :20])
    there = mask[:, :20].bool()
    assert_same_logits(model, got[:, :20][there], wanted[there], 40)
    assert (cache.seen, cache.row_seen) == (plain.seen, plain.row_seen)
    assert all_kept(cache) == all_kept(plain)
    check_limits(cache)
    later = [feed(model, c, ids, mask, (21, 22, 25), start=20) for c in (cache, plain)]
    assert_same_logits(model, later[0], later[1], 40)
    assert all_kept(cache) == all_kept(plain)


def test_a_second_reading_through_the_kernels_is_the_same() -> None:
    """By Triton (its interpreter, where there is no GPU) against plain torch, with pads and survivors."""
    pytest.importorskip("triton")
    model, ids = zoo.build("llama"), zoo.tokens(2, 24)
    mask = torch.ones_like(ids[:, :12])
    mask[1, :5] = 0
    caches, logits = [], []
    for how in (nullcontext, dispatch.interpreted):
        cache = BudgetCache(model, "replay(window=4)", 16, chunk=24, n_sink=2, recent=4)
        with how():
            read_twice(model, cache, ids[:, :12], mask)
            at = (mask.sum(1, keepdim=True) + torch.arange(24)).clamp_min(0)
            more = {"attention_mask": torch.cat([mask, torch.ones(2, 24, dtype=torch.int64)], 1)}
            with cache.replaying(12), torch.no_grad():
                again = torch.cat([ids[:, 12:], ids[:, 12:]], 1)
                made = model(again, **cache_kwargs(model, cache), use_cache=True, position_ids=at, **more)
        caches.append(cache)
        logits.append(made.logits)
    assert_same_logits(model, logits[1], logits[0], 48)
    assert all_kept(caches[1]) == all_kept(caches[0])


def test_learned_sinks_take_their_share_in_the_second_reading_too() -> None:
    """gpt-oss: layers with windows, and a logit that stands for no token."""
    model, ids = test_families.build("gpt_oss"), test_families.ids(1, 20)
    cache, plain = (BudgetCache(model, "replay", 64, chunk=64, recent=8) for _ in range(2))
    got, wanted = read_twice(model, cache, ids), feed(model, plain, ids)
    assert float((got[:, :20] - wanted).abs().max()) <= test_families.bound(wanted)
    check_limits(cache)
    with torch.no_grad():
        maps = test_families.build("gpt_oss")(
            torch.cat([ids, ids], 1), output_attentions=True, use_cache=False
        ).attentions
    for i, layer in budget_layers(cache):
        arena, group = layer.banks[0].arena, maps[i].shape[1] // layer.shape.kv_heads
        best = maps[i][0, :, 20:, :20].amax(1).unflatten(0, (-1, group)).amax(1)  # [H, 20]
        order = arena.positions[0, 0].argsort()[-20:]
        assert torch.allclose(arena.state[0, :, order, 0], best, rtol=1e-3, atol=1e-6)


def room(cache: BudgetCache) -> int:
    """Bytes of a chunk of one layer."""
    shape = cache.shape.layers[0]
    return (
        cache.budget.chunk * shape.kv_heads * (shape.key_dim + shape.value_dim) * cache.shape.dtype.itemsize
    )


@pytest.mark.parametrize(
    "policy",
    ["replay(window=4)", "calibrated+replay(window=4)", "calibrated+replay(window=4,plus=True)"],
)
def test_a_prompt_is_read_under_the_bound_and_scored_by_second_readings(policy: str) -> None:
    model, tokenizer = modicum.load("reference")
    text = "The king of the north had seven ships, and one of them was green. " * 12
    cache = modicum.prefill(model, tokenizer, text, policy=policy, budget=48, chunk=32, recent=4)
    check_limits(cache)
    assert cache.seen > 4 * 48
    assert cache.budget_nbytes < cache.peak_nbytes <= cache.budget_nbytes + room(cache)
    length = len(tokenizer(text, add_special_tokens=False)["input_ids"])
    own = BudgetCache(model, policy, 48, chunk=32, recent=4, length=length)
    ids = torch.tensor([tokenizer(text)["input_ids"]])
    assert ids.shape[1] == cache.seen
    for start, stop in cuts(ids.shape[1], 16):
        call(model, own, ids[:, start:stop], start)
    assert all_kept(own) == all_kept(cache)
    once = BudgetCache(model, policy, 48, chunk=32, recent=4, length=cache.seen)
    feed(model, once, ids)
    assert all_kept(once) != all_kept(cache)  # else the second reading would change nothing


@torch.no_grad()
def call(model: Any, cache: BudgetCache, ids: Tensor, start: int) -> None:
    at = torch.arange(start, start + 2 * ids.shape[1])[None]
    with cache.replaying(ids.shape[1]):
        model(torch.cat([ids, ids], 1), **cache_kwargs(model, cache), use_cache=True, position_ids=at)


def test_answers_are_the_full_caches_where_all_fits() -> None:
    """So the logits after a prompt are those of its last token, and not of its second reading."""
    model, tokenizer = modicum.load("reference")
    texts = ["Once upon a time there was a queen who counted her ships.", "The dog had a red boat. It"]
    how: dict[str, Any] = {"budget": 200, "max_new_tokens": 6, "chunk": 16, "recent": 8}
    for prompt in (texts[0], texts):
        found = modicum.generate(model, tokenizer, prompt, policy="replay", **how)
        wanted = modicum.generate(model, tokenizer, prompt, policy="full", **how)
        pairs = zip(*([x] if isinstance(prompt, str) else x for x in (found, wanted)), strict=True)
        assert all(a.text == b.text for a, b in pairs)


# -- what is refused -----------------------------------------------------------------------------------


def test_what_cannot_be_read_again_is_refused_by_name() -> None:
    model = zoo.shared("llama")
    plain = BudgetCache(model, "keydiff", 64)
    with pytest.raises(CacheError, match="keydiff does not ask for a second reading"), plain.replaying(4):
        pass
    cache = BudgetCache(model, "replay", 64, chunk=10)
    for columns in (0, 6):
        with pytest.raises(CacheError, match="do not fit into a chunk of 10"), cache.replaying(columns):
            pass
    tiny, tokenizer = modicum.load("reference")
    with pytest.raises(CacheError, match="give a chunk of at least 2"):
        modicum.generate(tiny, tokenizer, "Once upon a time", policy="replay", budget=64, chunk=1)
    with cache.replaying(3), pytest.raises(CacheError, match=r"7 columns .* 3 of them"):
        model(zoo.tokens(1, 7), **cache_kwargs(model, cache))
    assert cache.seen == 0


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("qwen3_next", "layer 0 keeps recurrent states"),
        ("falcon_h1", "layer 0 keeps recurrent states"),
        ("deepseek_v3", "layer 0 keeps latents"),
        ("gemma3n_text", "read by other layers"),
    ],
)
def test_models_that_cannot_be_read_again_are_refused(name: str, why: str) -> None:
    with pytest.raises(ModelError, match=f"replay cannot read the chunks of .* again: .*{why}"):
        BudgetCache(test_families.build(name), "replay", 64)
