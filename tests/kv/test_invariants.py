"""The seven invariants of the engine, over random tiny models, policies, budgets and conversations."""

from __future__ import annotations

import copy
import os
from dataclasses import replace
from itertools import pairwise
from typing import Any
from unittest.mock import patch

import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from modicum import BudgetCache
from modicum.compat import cache_kwargs
from modicum.kv.bank import Bank, Candidates, Setting
from modicum.kv.choice import best
from modicum.kv.store import STORES
from tests import zoo
from tests.bounds import FUNCTION, assert_within, gamma
from tests.driver import all_kept, budget_layers, check_limits, every, feed, full_cache
from tests.kv.cases import EVERY, EVICTING, STACKED, WRAPPED, Case, cases, margins, shared
from tests.kv.profiles import give_profile

MORE = int(os.environ.get("MODICUM_EXAMPLES", "1"))


def examples(number: int) -> settings:
    """So many examples, the same in every run; MODICUM_EXAMPLES=20 tries 20 times as many, not the same."""
    return settings(
        max_examples=number * MORE,
        derandomize=MORE == 1,
        database=None,
        deadline=None,
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much, HealthCheck.data_too_large],
    )


policies = pytest.mark.parametrize("policy", EVERY)
evicting = pytest.mark.parametrize("policy", EVICTING)
HALF = (torch.float32, torch.bfloat16, torch.float16)


# -- 1. strict ---------------------------------------------------------------------------------------


@policies
@given(data=st.data())
@examples(6)
def test_no_call_leaves_more_than_the_budget_and_what_is_protected_stays(
    policy: str, data: st.DataObject
) -> None:
    case = data.draw(cases(policy, dtypes=HALF, stores=STORES))
    cache = case.cache()

    def check() -> None:
        check_limits(cache)
        check_protected(case, cache)

    logits = case.run(cache, after=check)
    assert bool(torch.isfinite(logits).all())
    assert cache.seen == case.batch[0].shape[1]
    layers = budget_layers(cache)
    if layers:
        assert list(cache.row_seen) == case.lengths
    assert cache.peak_nbytes <= cache.budget_nbytes + in_hand(case, cache)


def check_protected(case: Case, cache: BudgetCache) -> None:
    """Sinks and recent tokens are held by every head, and nothing twice or from the future."""
    for _, layer in budget_layers(cache):
        table = cache.positions(layer.setting.layer)
        for row, seen in enumerate(layer.row_seen):
            wanted = {*range(min(case.n_sink, seen)), *range(max(0, seen - case.protected), seen)}
            for head in table[row].tolist():
                held = [p for p in head if p >= 0]
                assert len(held) == len(set(held))
                assert wanted <= set(held)
                assert held or not seen
                assert max(held, default=-1) < seen


def in_hand(case: Case, cache: BudgetCache) -> int:
    """The most that a call may hold beside the budget: a chunk of one layer, and an arena being resized."""
    most = 0
    for i, shape in enumerate(cache.shape.layers):
        width = (shape.key_dim + shape.value_dim) * case.dtype.itemsize
        slot = cache.store.keys.nbytes(shape.key_dim, case.dtype.itemsize)
        slot += cache.store.values.nbytes(shape.value_dim, case.dtype.itemsize)
        # A window layer takes a call as it comes; only budgeted layers cut it.
        longest = max(max(turn) for turn in case.turns)
        length = longest if shape.window else min(case.chunk, longest)
        both = width + slot * (cache.store.is_coded and shape.window is None)  # as it came and as it will lie
        extra = case.rows * length * shape.kv_heads * both
        if shape.window is None and cache.policy.head_shares() is not None:
            slots = cache.plan.capacities[cache.shape.full.index(i)][0] * shape.kv_heads + 1
            extra += slots * (slot + 4 + 4 * cache.policy.state_width(shape.group))
        most = max(most, extra)
    return most


@evicting
@given(data=st.data())
@examples(3)
def test_every_slot_holds_the_keys_values_and_state_of_its_position(policy: str, data: st.DataObject) -> None:
    case = data.draw(cases(policy, models=zoo.FULL, dtypes=HALF))
    cache = case.cache(positions="original")
    _, mask, _ = case.batch
    came: dict[int, list[tuple[Tensor, Tensor]]] = {i: [] for i, _ in budget_layers(cache)}
    for i, layer in budget_layers(cache):

        def update(
            key: Tensor, value: Tensor, *args: Any, i: int = i, true: Any = layer.update, **more: Any
        ) -> Any:
            came[i].append((key.clone(), value.clone()))
            return true(key, value, *args, **more)

        layer.update = update
    case.run(cache)
    for i, layer in budget_layers(cache):
        keys, values = (torch.cat(x, 2) for x in zip(*came[i], strict=True))
        for bank in layer.banks:
            bank.arena.settle()
            for row in range(bank.rows.start, bank.rows.stop):
                line = torch.arange(keys.shape[2]) if mask is None else mask[row].nonzero().flatten()
                local = row - bank.rows.start
                n = bank.arena.live[local]
                for j, head in enumerate(range(bank.heads.start, bank.heads.stop)):
                    columns = line[bank.arena.positions[local, j, :n].long()]
                    assert torch.equal(bank.arena.keys[local, j, :n], keys[row, head, columns])
                    assert torch.equal(bank.arena.values[local, j, :n], values[row, head, columns])
                    if bank.virtual is None:
                        continue
                    gone = line[[p for p in range(len(line)) if p not in bank.arena.positions[local, j, :n]]]
                    assert int(bank.virtual.count[local, j]) == len(gone)
                    if len(gone):  # the virtual token is the mean of all that was let go
                        means = bank.virtual.key[local, j], bank.virtual.value[local, j]
                        for mean, x in zip(means, (keys, values), strict=True):
                            wanted = x[row, head, gone].float().mean(0)
                            # A running mean in fp32: each token joins with a few roundings.
                            size = x[row, head, gone].float().abs().amax(0)
                            bound = gamma(4 * len(gone) + FUNCTION, torch.float32) * size
                            assert_within(mean, wanted, 2 * bound, "the virtual token")
    if policy == "keydiff":
        arena = cache.layers[0].banks[0].arena
        n = min(arena.live)
        norms = arena.keys[:, :, :n].float().norm(dim=-1)
        share = 2 * gamma(keys.shape[-1] + 2 * FUNCTION, torch.float32)
        assert_within(arena.state[:, :, :n, 0], 1 / norms, share / norms, "inverse norms")


@pytest.mark.parametrize(
    "policy", ["keydiff", "snapkv(window=4)", "h2o", "razor", "adakv+tova", "pyramidkv+knorm"]
)
@given(data=st.data())
@examples(8)
def test_a_budget_in_bytes_is_spent_to_the_last_token_that_fits(policy: str, data: st.DataObject) -> None:
    case = data.draw(cases(policy, models=(*zoo.FULL, *zoo.HYBRID), dtypes=HALF, stores=STORES))
    floor = case.cache().plan
    size = data.draw(st.integers(floor.nbytes, 4 * floor.nbytes))
    cache = case.cache(budget=f"{size}B")
    assert cache.budget_nbytes <= size
    tokens = cache.plan.tokens
    assert case.cache(budget=tokens).plan == cache.plan
    assert case.cache(budget=tokens + 1).plan.nbytes > size
    case.run(cache, after=lambda: check_limits(cache))


def test_an_evaluation_with_gradients_enabled_holds_no_graph() -> None:
    model, ids = zoo.shared("llama"), zoo.tokens(1, 50)
    for policy in ("keydiff", "h2o", "snapkv(window=4)", "razor", "adakv+tova"):
        cache = BudgetCache(model, policy, 24, chunk=16, n_sink=2, recent=4)
        with torch.enable_grad():
            model(ids, **cache_kwargs(model, cache))
            for i in range(3):
                model(ids[:, i : i + 1], **cache_kwargs(model, cache))
        for _, layer in budget_layers(cache):
            stored = [t for bank in layer.banks for t in bank.arena.tensors.values()]
            stored += [] if layer.ring is None else [layer.ring.queries]
            assert not any(t.requires_grad for t in stored)
        check_limits(cache)


@policies
def test_a_cache_filled_in_inference_mode_goes_on_outside_and_back(policy: str) -> None:
    model, ids = shared("gemma2", policy), zoo.tokens(2, 70)
    cache, plain = (BudgetCache(model, policy, 90, chunk=16, n_sink=2, recent=4) for _ in range(2))
    cuts = (50, 51, 52, 60, 61)
    if cache.policy.evicts:
        cache, plain = (BudgetCache(model, policy, 24, chunk=16, n_sink=2, recent=4) for _ in range(2))
    expected, found = [], []
    for i, (a, b) in enumerate(pairwise((0, *cuts, 70))):
        expected.append(feed(model, plain, ids[:, :b], start=a))
        with torch.inference_mode(i % 3 == 0):
            found.append(feed(model, cache, ids[:, :b], start=a))
            if i == 3:
                cache = cache.copy()
                cache.reorder_cache(torch.tensor([0, 1]))
    assert torch.equal(torch.cat(found, 1), torch.cat(expected, 1))  # the same operations
    assert all_kept(cache) == all_kept(plain)
    check_limits(cache)


# -- 2. exact when it fits, 4. whatever the chunks --------------------------------------------------------


@policies
@given(data=st.data())
@examples(4)
def test_when_all_fits_logits_are_the_full_caches_in_any_chunks(policy: str, data: st.DataObject) -> None:
    case = data.draw(cases(policy, fits=True))
    ids, mask, cuts = case.batch
    cache = case.cache()
    logits = case.run(cache)
    expected = feed(case.net, full_cache(case.net), ids, mask, cuts)
    there = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask.bool()
    case.assert_same(logits[there], expected[there])
    for layer in all_kept(cache):
        for row, length in zip(layer, case.lengths, strict=True):
            assert all(head == set(range(length)) for head in row)


@pytest.mark.parametrize("policy", ["streamingllm", "random", "random(seed=9)", "pyramidkv+random"])
@given(data=st.data())
@examples(8)
def test_a_policy_of_positions_keeps_the_same_tokens_in_any_chunks(policy: str, data: st.DataObject) -> None:
    case = data.draw(cases(policy, models=("llama", "llama-mqa", "gpt-neox"), evict_every=1))
    cache = case.cache()
    case.run(cache)
    other = case.cache(chunk=data.draw(st.integers(1, 60)))
    ids, mask, _ = case.batch
    feed(case.net, other, ids, mask, data.draw(st.lists(st.integers(1, ids.shape[1]), max_size=9)))
    assert all_kept(other) == all_kept(cache)
    if policy == "streamingllm":
        for row, length in zip(all_kept(cache)[0], case.lengths, strict=True):
            newest = range(max(0, length - case.budget + min(case.n_sink, length)), length)
            assert all(head == {*range(min(case.n_sink, length)), *newest} for head in row)


@policies
@given(data=st.data())
@examples(3)
def test_a_bare_long_call_is_its_chunks_call_by_call(policy: str, data: st.DataObject) -> None:
    case = data.draw(cases(policy))
    ids, mask, _ = case.batch
    bare, cut = case.cache(), case.cache()
    with margins(policy) as margin:
        at_once = feed(case.net, bare, ids, mask)
        piecewise = feed(case.net, cut, ids, mask, every(ids.shape[1], case.chunk))
    assume(margin.least > case.clear)
    there = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask.bool()
    case.assert_same(at_once[there], piecewise[there])
    assert all_kept(bare) == all_kept(cut)


# -- 3. a row is itself ------------------------------------------------------------------------------


@policies
@given(data=st.data())
@examples(6)
def test_a_row_says_and_keeps_what_it_does_alone(policy: str, data: st.DataObject) -> None:
    case = data.draw(cases(policy))
    ids, mask, _ = case.batch
    cache = case.cache()
    with margins(policy) as margin:
        together = case.run(cache)
        for row in range(case.rows):
            line, cuts = case.alone(row)
            if not line.shape[1]:
                continue
            alone = case.cache()
            logits = feed(case.net, alone, line, None, cuts)
            assume(margin.least > case.clear)
            there = torch.ones(ids.shape[1], dtype=torch.bool) if mask is None else mask[row].bool()
            case.assert_same(together[row][there], logits[0])
            assert [layer[row] for layer in all_kept(cache)] == [layer[0] for layer in all_kept(alone)]
            for i, _ in budget_layers(cache):
                assert cache.held[i][row].tolist() == alone.held[i][0].tolist()


# -- 5. turns ----------------------------------------------------------------------------------------


@policies
@given(data=st.data())
@examples(2)
def test_positions_go_on_from_the_tokens_seen(policy: str, data: st.DataObject) -> None:
    case = data.draw(cases(policy, rows=1))
    ids, _, cuts = case.batch
    said, bare = case.cache(), case.cache()
    with torch.no_grad():
        for a, b in zip([0, *cuts], [*cuts, ids.shape[1]], strict=True):
            want = case.net(
                ids[:, a:b], **cache_kwargs(case.net, said), position_ids=torch.arange(a, b)[None]
            ).logits
            assert torch.equal(case.net(ids[:, a:b], **cache_kwargs(case.net, bare)).logits, want)
            assert bare.seen == bare.get_seq_length() == b


# -- 6. no O(n²) memory --------------------------------------------------------------------------------


class Largest(TorchDispatchMode):
    """Remembers the elements of the largest storage that any operation gave."""

    def __init__(self) -> None:
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor):
                self.numel = max(self.numel, leaf.untyped_storage().nbytes() // leaf.element_size())
        return out


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@evicting
def test_a_long_prompt_makes_nothing_of_its_length_squared(policy: str, attention: str) -> None:
    model = shared("llama", policy, attention=attention)
    n = 1500
    ids, cache = zoo.tokens(1, n), BudgetCache(model, policy, 40, chunk=32, n_sink=2, recent=4)
    with torch.no_grad(), Largest() as largest:
        model.base_model(ids, **cache_kwargs(model.base_model, cache))
    # The model's own activations are n × 96 at most; attention's and the policy's go with chunk and budget.
    assert n * 64 <= largest.numel <= n * 96
    assert cache.seen == n


def test_the_watch_for_large_tensors_sees_a_full_map() -> None:
    model, n = zoo.build("llama", attention="eager"), 300
    with torch.no_grad(), Largest() as largest:
        model.base_model(zoo.tokens(1, n))
    assert largest.numel >= n * n


# -- 7. save, load, go on ----------------------------------------------------------------------------


@policies
@given(data=st.data())
@examples(4)
def test_a_saved_cache_goes_on_as_if_never_stopped(
    policy: str, data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    # A loaded cache is not compiled, and a compiled step adds up in another order.
    case = replace(data.draw(cases(policy, dtypes=HALF, stores=STORES)), compile=False)
    ids, mask, cuts = case.batch
    edges = [*cuts, ids.shape[1]]
    stop = data.draw(st.sampled_from(edges))
    path = tmp_path_factory.mktemp("saved") / "cache.safetensors"
    cache, model = case.cache(), zoo.build(case.model, case.dtype)
    if "learned" in policy:
        give_profile(model, case.seed)
    heard = None if mask is None else mask[:, :stop]
    feed(case.net, cache, ids[:, :stop], heard, [c for c in cuts if c < stop])
    before = all_kept(cache), cache.nbytes
    cache.save(path)
    twin = BudgetCache.load(path, model)
    assert (all_kept(twin), twin.nbytes) == before
    assert (twin.seen, twin.row_seen, twin.budget_nbytes) == (cache.seen, cache.row_seen, cache.budget_nbytes)
    check_limits(twin)
    ids, mask = more_of(case, ids[:, :stop], heard, 9)
    steps = [stop + 5, stop + 6, stop + 7, stop + 8]
    own = feed(case.net, cache, ids, mask, steps, start=stop)
    assert torch.equal(feed(model, twin, ids, mask, steps, start=stop), own)
    assert all_kept(twin) == all_kept(cache)


def more_of(case: Case, ids: Tensor, mask: Tensor | None, number: int) -> tuple[Tensor, Tensor | None]:
    """The conversation and so many further tokens in every row."""
    more = zoo.tokens(len(ids), number, seed=77 + case.seed)
    return torch.cat([ids, more], 1), None if mask is None else torch.cat([mask, torch.ones_like(more)], 1)


# -- what else a cache can do ----------------------------------------------------------------------


@policies
@given(data=st.data())
@examples(3)
def test_a_copy_and_its_original_know_nothing_of_each_other(policy: str, data: st.DataObject) -> None:
    case = data.draw(cases(policy, stores=STORES))
    ids, mask, _ = case.batch
    cache = case.cache()
    case.run(cache)
    twin = data.draw(st.sampled_from([cache.copy, lambda: copy.deepcopy(cache)]))()
    state = all_kept(cache), cache.nbytes, cache.seen, cache.peak_nbytes
    check_limits(twin)
    longer, there = more_of(case, ids, mask, 7)
    end = ids.shape[1]
    first = feed(case.net, cache, longer, there, [end + 4, end + 5], start=end)
    assert (all_kept(twin), twin.nbytes, twin.seen, twin.peak_nbytes) == state
    again = feed(case.net, twin, longer, there, [end + 4, end + 5], start=end)
    assert torch.equal(again, first)
    assert all_kept(twin) == all_kept(cache)


@pytest.mark.parametrize("policy", [p for p in EVICTING if "pyramid" not in p])
@pytest.mark.parametrize("number", [1, 2, 5])
def test_in_decode_the_cache_moves_between_the_budget_and_its_slack(policy: str, number: int) -> None:
    model, ids = shared("llama", policy), zoo.tokens(2, 90)
    cache = BudgetCache(model, policy, 24, chunk=16, n_sink=2, recent=4, evict_every=number)
    held: list[list[Tensor]] = []
    feed(model, cache, ids, cuts=range(60, 90), after=lambda: held.append([h.clone() for h in cache.held]))
    for i, layer in budget_layers(cache):
        line = torch.stack([step[i] for step in held])  # [calls, B, H]
        most = line[0]  # what the heads hold after the prompt: their budgets, whatever the policy gave each
        if layer.setting.policy.head_shares() is None:
            assert most.tolist() == [cache.plan.capacities[i]] * 2
        # One over the budget makes it fall to b - m + 1, from where it climbs back to b.
        expected = torch.stack([most - (number - 1) + j % number for j in range(len(line) - 1)])
        assert torch.equal(line[1:], expected)


@evicting
@given(data=st.data())
@examples(3)
def test_one_token_let_go_is_the_lowest_by_the_plain_rule(policy: str, data: st.DataObject) -> None:
    case = data.draw(cases(policy, evict_every=1, steps=12))

    def plain(bank: Bank, setting: Setting, view: Candidates) -> None:
        live = [min(n, bank.arena.capacity) for n in bank.arena.live]
        keep = best(bank.score(setting, view), view.positions, torch.tensor(live)[:, None])
        bank._fold(~keep if view.valid is None else ~keep & view.valid)
        bank.arena.absorb(keep, live)

    quick, slow = case.cache(), case.cache()
    with margins(policy) as margin:
        logits = case.run(quick)
        with patch.object(Bank, "_evict", plain):
            expected = case.run(slow)
    assume(margin.least > case.clear)
    assert all_kept(quick) == all_kept(slow)
    case.assert_same(logits, expected)


@policies
@given(data=st.data())
@examples(3)
def test_after_reset_the_cache_is_new_and_takes_another_batch(policy: str, data: st.DataObject) -> None:
    case = data.draw(cases(policy, stores=STORES))
    cache = case.cache()
    case.run(cache)
    cache.reset()
    cache.reset()
    assert (cache.seen, cache.nbytes, cache.peak_nbytes, cache.batch_size, cache.row_seen) == (0, 0, 0, 0, ())
    assert all(not held.numel() for held in cache.held)
    cache.check_integrity()
    ids = zoo.tokens(case.rows + 1, min(45, max(case.lengths)), seed=5)
    cuts = [ids.shape[1] - 2, ids.shape[1] - 1]
    fresh = case.cache()
    assert torch.equal(feed(case.net, cache, ids, cuts=cuts), feed(case.net, fresh, ids, cuts=cuts))
    check_limits(cache)
    assert all_kept(cache) == all_kept(fresh)
    assert cache.peak_nbytes == fresh.peak_nbytes


@policies
@given(data=st.data())
@examples(3)
def test_rows_may_be_chosen_dropped_and_repeated(policy: str, data: st.DataObject) -> None:
    case = data.draw(cases(policy))
    ids, mask, _ = case.batch
    cache = case.cache()
    case.run(cache)
    way = data.draw(st.sampled_from(["select", "mask", "repeat", "reorder"]))
    number = case.rows
    if way == "select":
        rows = data.draw(st.lists(st.integers(0, number - 1), min_size=1, max_size=4))
        cache.batch_select_indices(torch.tensor(rows))
    elif way == "mask":
        chosen = data.draw(st.lists(st.booleans(), min_size=number, max_size=number).filter(any))
        rows = [i for i, yes in enumerate(chosen) if yes]
        cache.batch_select_indices(torch.tensor(chosen))
    elif way == "repeat":
        rows = [i for i in range(number) for _ in range(2)]
        cache.batch_repeat_interleave(2)
    else:
        rows = data.draw(st.permutations(range(number)))
        cache.reorder_cache(torch.tensor(rows))
    check_limits(cache)
    assert cache.batch_size == len(rows)
    twin = case.cache()
    case.run(twin)
    assert all_kept(cache) == [[layer[i] for i in rows] for layer in all_kept(twin)]
    end = ids.shape[1]
    longer, there = more_of(case, ids, mask, 6)
    with margins(policy) as margin:
        expected = feed(case.net, twin, longer, there, [end + 3, end + 4, end + 5], start=end)
        taken = None if there is None else there[rows]
        logits = feed(case.net, cache, longer[rows], taken, [end + 3, end + 4, end + 5], start=end)
    assume(margin.least > case.clear)
    case.assert_same(logits, expected[rows])
    assert all_kept(cache) == [[layer[i] for i in rows] for layer in all_kept(twin)]
    check_limits(cache)


# -- policies that must agree --------------------------------------------------------------------------

TWINS = [
    ("adakv(safeguard=1)+snapkv(window=4)", "snapkv(window=4)"),
    ("adakv(safeguard=1)+h2o", "h2o"),
    ("adakv(safeguard=1)+keydiff", "keydiff"),
    ("adakv(safeguard=1)+tova", "tova(heads='each')"),
    ("pyramidkv(beta=1)+ahakv(window=4)", "ahakv(window=4)"),
    ("criticalkv(share=1)+h2o", "h2o"),
    ("criticalkv(share=1)+keydiff", "keydiff"),
    ("razor(snapkv(window=4), echo=1)", "snapkv(window=4)"),
    ("razor(h2o, echo=0, induction=0)", "h2o"),
]


@pytest.mark.parametrize(("wrapped", "plain"), TWINS)
@given(data=st.data())
@examples(6)
def test_a_wrapper_that_changes_nothing_keeps_what_its_base_keeps(
    wrapped: str, plain: str, data: st.DataObject
) -> None:
    case = data.draw(cases(wrapped))
    one, other = case.cache(), case.cache(policy=plain)
    with margins(wrapped) as margin:
        logits, expected = case.run(one), case.run(other)
    assume(margin.least > case.clear)
    _, mask, _ = case.batch
    there = slice(None) if mask is None else mask.bool()
    case.assert_same(logits[there], expected[there])
    assert all_kept(one) == all_kept(other)


def test_the_cases_reach_what_they_are_for() -> None:
    """Evictions, pads, ragged heads and every family, so that the tests above can fail."""
    found: set[str] = set()

    @given(case=cases("adakv+snapkv(window=4)", dtypes=HALF, stores=STORES))
    @examples(60)
    def look(case: Case) -> None:
        cache = case.cache()
        case.run(cache)
        found.add(case.model)
        found.add(str(case.dtype))
        if case.batch[1] is not None:
            found.add("pads")
        if any(0 in turn for turn in case.turns):
            found.add("a row without a token in a call")
        if any(length > case.budget for length in case.lengths):
            found.add("evictions")
        if any(len(set(held[0].tolist())) > 1 for held in cache.held):
            found.add("ragged heads")
        if case.evict_every > 1:
            found.add("slack")
        found.update((case.positions, case.store))

    look()
    wanted = {
        "renumbered",
        "original",
        "pads",
        "a row without a token in a call",
        "evictions",
        "ragged heads",
        "slack",
    }
    assert wanted <= found
    assert {*map(str, HALF), *STORES} <= found
    assert len(found & set(zoo.ALL)) >= 8
    assert set(WRAPPED) | set(STACKED) <= set(EVERY)
