"""The plug-in's own arithmetic, without vLLM: settings, counts, pages, rings and what a layer lets go."""

from __future__ import annotations

import itertools
import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from modicum.errors import BudgetError, InputError, PolicyError
from modicum.kv.bank import Candidates
from modicum.kv.choice import best
from modicum.kv.registry import parse_policy
from modicum.kv.scoring import level
from modicum.vllm.eviction import Attention, Eviction
from modicum.vllm.pages import Pages, Room, VecPages, place
from modicum.vllm.recent import Recent
from modicum.vllm.settings import Settings, refuse, why_not
from modicum.vllm.shown import Held
from modicum.vllm.step import Ledger, Step
from tests.bounds import assert_within, dot_bound, gamma
from tests.kv.cases import BASES, WRAPPED

GIVEN: dict[str, Any] = {"policy": "keydiff", "budget": 12, "n_sink": 2, "recent": 3}


@pytest.mark.parametrize("policy", ["keydiff", "manifoldkv", "knorm", "streamingllm", "random", "tova"])
@pytest.mark.parametrize("wrapper", ["", "caote+", "fastcaote+"])
def test_policies_that_run(policy: str, wrapper: str) -> None:
    if wrapper and policy in ("streamingllm", "random"):
        pytest.skip("nothing to wrap")
    assert Settings.of({**GIVEN, "policy": wrapper + policy}, 8).budget == 12


@pytest.mark.parametrize(
    ("policy", "why"),
    [
        ("full", "never evicts"),
        ("razor", "unequal numbers"),
        ("adakv+snapkv(window=2)", "compete"),
        ("pyramidkv+keydiff", "unequal budgets"),
        ("h2o", "adds up numbers"),
        ("compactor", "adds up numbers"),
        ("learned", "adds up numbers"),
        ("triattention", "before the rotary embedding"),
        ("criticalkv+keydiff", "output projection"),
    ],
)
def test_policies_that_do_not_are_refused_by_name(policy: str, why: str) -> None:
    with pytest.raises(PolicyError, match=f"cannot run inside vLLM: .*{why}"):
        Settings.of({**GIVEN, "budget": 64, "policy": policy}, 8)


def test_every_policy_is_either_run_or_refused() -> None:
    for policy in (*BASES, *WRAPPED):
        given = {**GIVEN, "budget": 64, "policy": policy}
        if why_not(parse_policy(policy)) is None:
            assert Settings.of(given, 8).policy.query_rows >= 0
        else:
            with pytest.raises(PolicyError, match="cannot run inside vLLM"):
                Settings.of(given, 8)


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        ("keydiff", InputError, "must be an object"),
        ({"polcy": "keydiff"}, InputError, "no setting 'polcy'"),
        ({"budget": "64MiB"}, InputError, "number of tokens"),
        ({"budget": True}, InputError, "number of tokens"),
        ({"budget": 20}, BudgetError, "too small"),
        ({"policy": "snapkv", "recent": 4, "budget": 30}, BudgetError, "too small"),
        ({"policy": "keydif"}, PolicyError, "did you mean keydiff"),
    ],
)
def test_bad_settings(given: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        Settings.of(given, 8)


def _config(**changes: Any) -> Any:
    parallel = SimpleNamespace(
        decode_context_parallel_size=changes.pop("dcp", 1),
        prefill_context_parallel_size=changes.pop("pcp", 1),
        enable_dbo=changes.pop("dbo", False),
    )
    cache = SimpleNamespace(
        enable_prefix_caching=changes.pop("prefix", False), cache_dtype=changes.pop("dtype", "auto")
    )
    names = {"speculative_config": None, "kv_transfer_config": None, **changes}
    return SimpleNamespace(parallel_config=parallel, cache_config=cache, **names)


@pytest.mark.parametrize(
    ("changes", "name"),
    [
        ({"prefix": True}, "--enable-prefix-caching"),
        ({"speculative_config": object()}, "--speculative-config"),
        ({"kv_transfer_config": object()}, "--kv-transfer-config"),
        ({"dcp": 2}, "--decode-context-parallel-size"),
        ({"pcp": 2}, "--prefill-context-parallel-size"),
        ({"dbo": True}, "--enable-dbo"),
        ({"dtype": "fp8"}, "--kv-cache-dtype"),
    ],
)
def test_settings_of_the_server_that_break_the_bound_are_refused(changes: Any, name: str) -> None:
    refuse(_config())
    with pytest.raises(InputError, match=name):
        refuse(_config(**changes))


@given(data=st.data())
def test_the_ledger_counts_as_a_cache_does(data: st.DataObject) -> None:
    """Against a loop over requests, as `Bank.attend` and `Bank._evict` have it."""
    every = data.draw(st.integers(1, 4))
    settings = Settings.of({**GIVEN, "evict_every": every}, 8)
    ledger = Ledger(settings, 3)
    requests = [{"first": 10 * i + 3, "seen": 0, "held": 0} for i in range(3)]
    for _ in range(data.draw(st.integers(1, 12))):
        chosen = data.draw(st.lists(st.sampled_from(requests), min_size=1, max_size=3, unique_by=id))
        new = [data.draw(st.integers(1, 8)) for _ in chosen]
        for request in chosen:
            if data.draw(st.integers(0, 9)) == 0:  # preempted: begins again
                request["seen"] = 0
        starts = torch.tensor([0, *torch.tensor(new).cumsum(0).tolist()])
        table = torch.tensor([[r["first"], 1, 2] for r in chosen])
        seen = torch.tensor([r["seen"] + n for r, n in zip(chosen, new, strict=True)])
        step = ledger.step(table, starts, seen)
        at = 0
        for i, (request, n) in enumerate(zip(chosen, new, strict=True)):
            held = request["held"] if request["seen"] else 0
            assert int(step.total[i]) == held + n
            assert step.slot[at : at + n].tolist() == list(range(held, held + n))
            assert step.position[at : at + n].tolist() == list(range(request["seen"], request["seen"] + n))
            total = held + n
            if total > 12:
                total = 12 - (every - 1) * (n == 1)
            request["held"], request["seen"] = total, request["seen"] + n
            assert int(step.after[i]) == total
            assert total <= 12
            at += n


def _pages(number: int, heads: int, block: int, dim: int) -> tuple[Tensor, VecPages]:
    torch.manual_seed(0)
    cache = torch.randn(number, heads, block, 2 * dim)
    return cache, VecPages(cache, Room())


def test_pages_are_read_and_moved_in_place() -> None:
    cache, pages = _pages(9, 2, 4, 3)
    table = torch.tensor([[5, 2, 7], [1, 8, 3]])
    held = Held([pages], pages.used(table, 10), 10)
    keys, values = held
    assert keys.shape == values.shape == (2, 2, 10, 3)
    raw = cache.view(9, 2, 2, 12)
    for r in range(2):
        for h in range(2):
            for s in range(10):
                page = int(table[r, s // 4])
                assert torch.equal(keys[r, h, s], raw[page, h, 0].view(3, 4)[:, s % 4])
                assert torch.equal(values[r, h, s], raw[page, h, 1].view(4, 3)[s % 4])
    vectors = torch.randn(2, 2, 3, 3)
    norms = vectors.norm(dim=-1)[..., None], keys.norm(dim=-1)[..., None, :]
    bound = 2 * dot_bound(3, torch.float32, *norms)
    assert_within(held.dot(vectors), vectors @ keys.transpose(-1, -2), bound)
    weights = torch.randn(2, 2, 3, 10)
    bound = 2 * gamma(10, torch.float32) * (weights.abs() @ keys.abs())
    assert_within(held.weigh(weights), weights @ keys, bound)
    row, head, source, target = (torch.tensor(x) for x in ([0, 0, 1], [0, 1, 1], [9, 8, 9], [1, 2, 0]))
    there, here = (place(table, row, slot, 4) for slot in (source, target))
    before = cache.clone()
    pages.put(pages.numbers(here[0], head, here[1]), pages.take(pages.numbers(there[0], head, there[1])))
    moved = Held([pages], pages.used(table, 10), 10)
    for was, now in zip((keys, values), moved, strict=True):
        for r, h, a, b in zip(row, head, source, target, strict=True):
            assert torch.equal(now[r, h, b], was[r, h, a])
    assert int((cache != before).sum()) == 3 * 6


def test_pages_in_any_order_in_memory() -> None:
    """As GPU backends have them: keys and values of a token side by side, heads before or after slots."""
    torch.manual_seed(0)
    for cache in (torch.randn(9, 2, 4, 10), torch.randn(9, 4, 2, 10).transpose(1, 2)):
        pages = Pages(*cache.chunk(2, dim=-1))
        page, head, slot = (torch.tensor(x) for x in ([1, 7], [0, 1], [3, 2]))
        expected = cache[page, head, slot]
        numbers = pages.numbers(page, head, slot)
        assert torch.equal(pages.take(numbers), expected)
        pages.put(pages.numbers(page + 1, head, slot), expected)
        assert torch.equal(cache[page + 1, head, slot], expected)
        table = torch.tensor([[5, 2], [1, 8]])
        vectors = torch.randn(2, 2, 1, 5)
        held = Held([pages], pages.used(table, 6), 6)
        keys = held[0]
        assert torch.equal(keys[1, 1, 5], cache[8, 1, 1, :5])
        norms = vectors.norm(dim=-1)[..., None], keys.norm(dim=-1)[..., None, :]
        bound = 2 * dot_bound(5, torch.float32, *norms)
        assert_within(held.dot(vectors), vectors @ keys.transpose(-1, -2), bound)
        weights = torch.randn(2, 2, 1, 6)
        bound = 2 * gamma(6, torch.float32) * (weights.abs() @ keys.abs())
        assert_within(held.weigh(weights), weights @ keys, bound)


@pytest.mark.parametrize("every", [1, 3])
@pytest.mark.parametrize(
    "policy",
    [
        "keydiff",
        "manifoldkv",
        "knorm",
        "streamingllm",
        "random",
        "tova",
        "caote+tova",
        "caote+keydiff",
        "snapkv(window=3)",
        "ahakv(window=3)",
        "obcache(window=3)",
    ],
)
def test_what_is_let_go_is_the_policys_choice(policy: str, every: int) -> None:
    """Requests of unlike length in one step, each against a view of its own; no other page is touched."""
    settings = Settings.of({**GIVEN, "policy": policy, "evict_every": every}, 8)
    layers, group, dim = 2, 2, 8
    caches = [torch.randn(16, 2, 4, 2 * dim) for _ in range(layers)]
    attention = Attention(layers, scaling=0.5, softcap=None, group=group)
    eviction = Eviction(settings, attention, lambda cache: VecPages(cache, Room()), 4)
    ledger = Ledger(settings, 4)
    table = torch.tensor([[5, 2, 7, 9, 0], [1, 8, 3, 11, 12]])
    # [layer][row] position -> key, value [H, D] and query [H, G, D]
    said: list[list[dict[int, tuple[Tensor, Tensor, Tensor]]]] = [[{}, {}] for _ in range(layers)]
    held: list[list[list[set[int]]]] = [[[set(), set()] for _ in range(2)] for _ in range(layers)]
    seen = torch.zeros(2, dtype=torch.int64)
    untouched = [cache[[4, 6, 10, 13]].clone() for cache in caches]
    torch.manual_seed(3)
    ones = [[1, 1]] * 4
    restarts = [5, 4], [4, 2]
    for new in ([8, 5], [7, 1], [1, 8], *ones, [6, 1], *ones, [1, 2], *restarts, *ones, *ones):
        if new == [5, 4]:  # both begin anew in the same pages, as after a preemption
            seen = torch.zeros(2, dtype=torch.int64)
            said = [[{}, {}] for _ in range(layers)]
            held = [[[set(), set()] for _ in range(2)] for _ in range(layers)]
        starts = torch.tensor([0, new[0], sum(new)])
        seen = seen + torch.tensor(new)
        step = ledger.step(table, starts, seen)
        for layer, cache in enumerate(caches):
            pages = VecPages(cache, Room())
            key, value, query = torch.randn(3, sum(new), 2, dim)
            query = torch.stack([query, torch.randn_like(query)], 2)  # [T, H, G, D]
            for t in range(sum(new)):
                row, slot = int(step.row[t]), int(step.slot[t])
                page = int(table[row, slot // 4])
                pages.keys[page, :, slot % 4], pages.values[page, :, slot % 4] = key[t], value[t]
                said[layer][row][int(step.position[t])] = key[t], value[t], query[t]
                for head in range(2):
                    held[layer][row][head].add(int(step.position[t]))
            eviction.after(step, layer, query.flatten(1, 2), key, value, cache)
        for layer, row, head in itertools.product(range(layers), range(2), range(2)):
            n = int(step.after[row])
            if n < len(held[layer][row][head]):
                facts = said[layer][row], held[layer][row], int(seen[row])
                held[layer][row] = _chosen(settings, *facts, n, int(step.new[row]), layer)
            used = table[row : row + 1, : -(-n // 4)]
            [positions] = eviction.notes.of(used, n, slice(layer, layer + 1))[0]
            assert set(positions[head].tolist()) == held[layer][row][head]
            keys, values = Held([eviction.pages[layer]], used, n)
            for slot, position in enumerate(positions[head].tolist()):
                assert torch.equal(keys[0, head, slot], said[layer][row][position][0][head])
                assert torch.equal(values[0, head, slot], said[layer][row][position][1][head])
            assert n <= 12
    for cache, before in zip(caches, untouched, strict=True):
        assert torch.equal(cache[[4, 6, 10, 13]], before)


def _chosen(
    settings: Settings,
    said: dict[int, tuple[Tensor, Tensor, Tensor]],
    held: list[set[int]],
    seen: int,
    after: int,
    new: int,
    layer: int,
) -> list[set[int]]:
    """[heads] the positions that stay of one request by itself, in a plain view without state or sums."""
    order = [sorted(positions) for positions in held]
    keys, values = (
        torch.stack([torch.stack([said[p][which][h] for p in order[h]]) for h in range(2)])[None]
        for which in (0, 1)
    )
    policy, positions = settings.policy, torch.tensor(order)[None]
    last = range(max(0, seen - policy.query_rows), seen)
    queries = (
        torch.stack([said[p][2] for p in last], 2)[None] if policy.query_rows else None
    )  # [1, H, G, R, D]
    view = Candidates(
        parts=((keys, values),),
        positions=positions,
        valid=None,
        protected=(positions < settings.n_sink) | (positions >= seen - settings.protected),
        seen=torch.tensor([seen]),
        capacity=settings.budget,
        layer=layer,
        layers=2,
        scaling=0.5,
        queries=queries,
        query_positions=torch.tensor([list(last)]) if policy.query_rows else None,
        state=policy.token_state(keys, values, 2, None) if policy.state_width(2) else None,
        newcomers=new,
    )
    score = level(view, policy.score(view), policy)
    keep = best(score.masked_fill(view.protected, math.inf), positions, torch.tensor([[after]]))
    return [set(positions[0, h][keep[0, h]].tolist()) for h in range(2)]


def test_rings_hold_each_requests_own_last_queries() -> None:
    ring = Recent(1, 2, 2, 1, 3, 4, torch.float32, torch.device("cpu"))
    ledger = Ledger(Settings.of(GIVEN, 8), 2)
    said: dict[int, list[Tensor]] = {4: [], 7: [], 9: []}

    def go(batch: dict[int, int], fresh: bool = False) -> Step:
        queries = []
        for first, n in batch.items():
            if fresh:
                said[first] = []
            new = [torch.randn(2, 4) for _ in range(n)]
            said[first] += new
            queries += new
        starts = torch.tensor([0, *torch.tensor(list(batch.values())).cumsum(0).tolist()])
        seen = torch.tensor([len(said[first]) for first in batch])
        step = ledger.step(torch.tensor([[first, 0] for first in batch]), starts, seen)
        ring.begin(step)
        ring.take_in(0, torch.stack(queries))
        queries_of, at = ring.of(slice(0, 1), step.ring)
        for i, first in enumerate(batch):
            last = {p: said[first][p] for p in range(max(0, len(said[first]) - 3), len(said[first]))}
            assert {p for p in at[i].tolist() if p >= 0} == set(last)
            for slot, p in enumerate(at[i].tolist()):
                if p >= 0:
                    assert torch.equal(queries_of[i, :, 0, slot], last[p])
        return step

    go({4: 5, 7: 2})
    go({7: 1, 4: 1})
    go({7: 4})
    go({9: 2})  # takes the ring of 4, which was not used for longest
    go({9: 1, 7: 1})
    go({7: 2}, fresh=True)  # the same first page, another request
