"""The plug-in's own arithmetic, without vLLM: settings, counts, pages, rings and what a layer lets go."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from modicum.errors import BudgetError, InputError, PolicyError
from modicum.kv.choice import best
from modicum.kv.registry import parse_policy
from modicum.vllm.eviction import Eviction
from modicum.vllm.pages import Pages, place
from modicum.vllm.recent import Recent
from modicum.vllm.settings import Settings, refuse, why_not
from modicum.vllm.step import Ledger, Step
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
    parallel = SimpleNamespace(decode_context_parallel_size=changes.pop("dcp", 1))
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
    ledger = Ledger(settings)
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
            assert int(step.live[i]) == held
            assert step.slot[at : at + n].tolist() == list(range(held, held + n))
            assert step.position[at : at + n].tolist() == list(range(request["seen"], request["seen"] + n))
            total = held + n
            if total > 12:
                total = 12 - (every - 1) * (n == 1)
            request["held"], request["seen"] = total, request["seen"] + n
            assert int(step.after[i]) == total
            assert total <= 12
            at += n


def _pages(number: int, heads: int, block: int, dim: int) -> tuple[Tensor, Pages]:
    torch.manual_seed(0)
    cache = torch.randn(number, heads, block, 2 * dim)
    return cache, Pages(cache)


def test_pages_are_read_and_moved_in_place() -> None:
    cache, pages = _pages(9, 2, 4, 3)
    table = torch.tensor([[5, 2, 7], [1, 8, 3]])
    keys, values = pages.read(table, 10)
    assert keys.shape == values.shape == (2, 2, 10, 3)
    raw = cache.view(9, 2, 2, 12)
    for r in range(2):
        for h in range(2):
            for s in range(10):
                page = int(table[r, s // 4])
                assert torch.equal(keys[r, h, s], raw[page, h, 0].view(3, 4)[:, s % 4])
                assert torch.equal(values[r, h, s], raw[page, h, 1].view(4, 3)[s % 4])
    row, head, source, target = (torch.tensor(x) for x in ([0, 0, 1], [0, 1, 1], [9, 8, 9], [1, 2, 0]))
    pages.move(head, place(table, row, source, 4), place(table, row, target, 4))
    moved, _ = pages.read(table, 10)
    for r, h, a, b in zip(row, head, source, target, strict=True):
        assert torch.equal(moved[r, h, b], keys[r, h, a])


@pytest.mark.parametrize(
    "policy", ["keydiff", "knorm", "streamingllm", "tova", "caote+tova", "snapkv(window=3)"]
)
def test_what_a_layer_lets_go_is_the_policys_choice(policy: str) -> None:
    """Requests of unlike length in one step, each against its own view; no other page is touched."""
    settings = Settings.of({**GIVEN, "policy": policy}, 8)
    cache, pages = _pages(16, 2, 4, 8)
    window = settings.policy.query_rows
    recent = Recent(4, 16, 2, 2, window, 8, torch.float32) if window else None
    layer = Eviction(settings, pages, 0, 2, 0.5, None, 2, recent)
    ledger = Ledger(settings)
    table = torch.tensor([[5, 2, 7, 9, 0], [1, 8, 3, 11, 12]])
    keys: list[dict[int, Tensor]] = [{}, {}]
    seen = torch.zeros(2, dtype=torch.int64)
    untouched = cache[[4, 6, 10, 13]].clone()
    for new in ([8, 5], [7, 1], [1, 8], [1, 1], [6, 1], [1, 1]):
        starts = torch.tensor([0, new[0], sum(new)])
        seen = seen + torch.tensor(new)
        step = ledger.step(table, starts, seen)
        for t in range(sum(new)):
            row, slot = int(step.row[t]), int(step.slot[t])
            page = int(table[row, slot // 4])
            key, value = torch.randn(2, 8), torch.randn(2, 8)
            pages.keys[page, :, :, slot % 4], pages.values[page, :, slot % 4] = key, value
            keys[row][int(step.position[t])] = key
        layer.take_in(step, torch.randn(sum(new), 4, 8))
        wanted = [_wanted(layer, step, row) for row in range(2)]
        layer.let_go(step)
        for row in range(2):
            n = int(step.after[row])
            held, _ = pages.read(table[row : row + 1], n)
            used = table[row, : -(-n // 4)]
            positions = layer.positions[used].transpose(0, 1).flatten(1)[:, :n]
            for head in range(2):
                found = positions[head].tolist()
                assert len(set(found)) == n <= 12
                if wanted[row] is not None:
                    assert set(found) == wanted[row][head]
                for slot, position in enumerate(found):
                    assert torch.equal(held[0, head, slot], keys[row][position][head])
    assert torch.equal(cache[[4, 6, 10, 13]], untouched)


def _wanted(layer: Eviction, step: Step, row: int) -> list[set[int]] | None:
    """[heads] the positions that should stay, one request by itself; None if all do."""
    total, after = int(step.total[row]), int(step.after[row])
    if total == after:
        return None
    view = layer._view(step, torch.tensor([row]), step.table[row : row + 1], total)
    score = view.guard(layer.settings.policy.score(view))
    keep = best(score, view.positions, torch.tensor([[after]]))
    return [set(view.positions[0, h][keep[0, h]].tolist()) for h in range(2)]


def test_rings_hold_each_requests_own_last_queries() -> None:
    ring = Recent(2, 10, 1, 2, 3, 4, torch.float32)
    ledger = Ledger(Settings.of(GIVEN, 8))
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
        ring.take_in(step, torch.stack(queries))
        queries_of, at = ring.of(step, torch.arange(len(batch)))
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
