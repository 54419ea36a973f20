"""RazorAttention: budgets per head, the choice of retrieval heads, the virtual token, ALiBi's reach."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from modicum.errors import BudgetError, InputError, PolicyError
from modicum.kv.alibi import alibi_reach, alibi_reach_empirical
from modicum.kv.compensation import fold, merge, virtual_logit
from modicum.kv.heads import HeadScores
from modicum.kv.policies.h2o import H2O
from modicum.kv.policies.keydiff import KeyDiff
from modicum.kv.policies.razor import RazorAttention
from modicum.kv.policies.snapkv import SnapKV
from modicum.kv.policies.tova import TOVA
from modicum.kv.policy import Wrapper
from modicum.kv.registry import parse_policy, policies
from tests.bounds import (
    FUNCTION,
    LAMBDA,
    assert_within,
    attention_bound,
    exactly,
    gamma,
    logit_bound,
)

from .views import make_view

DOUBLE = torch.float64


def scores(echo: list[list[float]], induction: list[list[float]] | None = None, **more: Any) -> HeadScores:
    return HeadScores(echo=echo, induction=induction or [[0.0] * len(row) for row in echo], **more)  # type: ignore[arg-type]


def chosen(table: list[list[bool]]) -> set[tuple[int, int]]:
    return {(i, j) for i, row in enumerate(table) for j, kind in enumerate(row) if kind}


# ------------------------------------------------------------------ which heads retrieve


def test_retrieval_heads_are_the_union_of_both_tops() -> None:
    table = scores([[0.1, 0.9], [0.2, 0.3]], [[0.5, 0.1], [0.0, 0.8]])
    policy = RazorAttention(echo=0.25, induction=0.5)
    assert chosen(policy.retrieval(table)) == {(0, 1), (1, 1), (0, 0)}


def test_strong_heads_retrieve_however_many_they_are() -> None:
    table = scores(
        [[0.0, 0.9, 0.0], [0.9, 0.0, 0.0], [0.0] * 3], [[0.6, 0.0, 0.2], [0.5, 0.19, 0.3], [1.0, 0.0, 0.0]]
    )
    best = RazorAttention(echo=0.0, induction=0.1).retrieval(table)
    assert chosen(best) == {(2, 0)}
    more = RazorAttention(echo=0.0, induction=0.1, strong=0.2)
    assert chosen(more.retrieval(table)) == {(2, 0), (0, 0), (0, 2), (1, 0), (1, 2)}
    left_out = scores(table.echo, table.induction, skipped=(1,))  # type: ignore[arg-type]
    assert chosen(more.retrieval(left_out)) == {(2, 0), (0, 0), (0, 2)}


@pytest.mark.parametrize(
    ("layers", "heads", "share", "number"),
    [(10, 10, 0.14, 14), (4, 8, 0.14, 5), (4, 8, 0.01, 1), (7, 1, 1.0, 7), (3, 3, 0.0, 0), (1, 1, 1e-3, 1)],
)
def test_shares_are_rounded_up_over_the_whole_model(
    layers: int, heads: int, share: float, number: int
) -> None:
    table = scores(torch.rand(layers, heads, generator=torch.Generator().manual_seed(0)).tolist())
    got = RazorAttention(echo=share, induction=0.0).retrieval(table)
    assert [len(row) for row in got] == [heads] * layers
    best = sorted((-x, i, j) for i, row in enumerate(table.echo) for j, x in enumerate(row))[:number]
    assert chosen(got) == {(i, j) for _, i, j in best}


def test_equal_scores_prefer_the_lower_layer_then_the_lower_head() -> None:
    table = scores([[0.5] * 4 for _ in range(3)])
    assert chosen(RazorAttention(echo=0.5, induction=0.0).retrieval(table)) == {
        *((0, j) for j in range(4)),
        *((1, j) for j in range(2)),
    }


def test_skipped_layers_neither_retrieve_nor_count() -> None:
    table = scores([[0.0, 0.0], [0.4, 0.6], [0.0, 0.0], [0.1, 0.2]], skipped=(0, 2))
    policy = RazorAttention(echo=0.25, induction=0.0)
    assert chosen(policy.retrieval(table)) == {(1, 1)}
    assert policy.head_budgets(table, 100, 4, 5) == [[100, 100], [20, 340], [100, 100], [20, 20]]


# ------------------------------------------------------------------ budgets


def test_budgets_by_hand() -> None:
    table = scores([[0.9, 0.1], [0.8, 0.2], [0.1, 0.1]])
    policy = RazorAttention(echo=0.3, induction=0.0)  # 2 of 6 heads
    # 4 heads with 101/5 = 20; 606 - 80 = 526 for 2
    assert policy.head_budgets(table, 101, 4, 8) == [[263, 20], [263, 20], [20, 20]]
    # sinks, recent tokens and the virtual token need 37: (606 - 4·37) / 2
    assert policy.head_budgets(table, 101, 4, 32) == [[229, 37], [229, 37], [37, 37]]
    bare = policy.with_settings(compensate=False)
    assert bare.head_budgets(table, 101, 4, 32) == [[231, 36], [231, 36], [36, 36]]
    # 3 of 6 heads, a quarter for the others: (606 - 3·25) / 3, and (612 - 3·26) / 3
    third = RazorAttention(echo=0.5, induction=0.0, share=4)
    assert third.head_budgets(table, 101, 4, 8) == [[177, 25], [177, 177], [25, 25]]
    assert third.head_budgets(table, 102, 4, 8) == [[178, 26], [178, 178], [26, 26]]


def test_what_is_left_over_goes_to_earlier_heads() -> None:
    table = scores([[0.9, 0.1], [0.8, 0.7]])
    policy = RazorAttention(echo=0.75, induction=0.0)
    # 4·21 - 1·4 = 80 = 3·26 + 2
    assert policy.head_budgets(table, 21, 1, 1) == [[27, 4], [27, 26]]


@given(
    shape=st.tuples(st.integers(1, 8), st.integers(1, 4)),
    seed=st.integers(0, 10**6),
    budget=st.integers(1, 4000),
    sinks=st.integers(0, 8),
    recent=st.integers(0, 64),
    parts=st.tuples(st.floats(0, 1), st.floats(0, 1)),
    share=st.floats(1, 50),
    compensate=st.booleans(),
)
def test_budgets_spend_all_and_never_more(
    shape: tuple[int, int],
    seed: int,
    budget: int,
    sinks: int,
    recent: int,
    parts: tuple[float, float],
    share: float,
    compensate: bool,
) -> None:
    layers, heads = shape
    rng = torch.Generator().manual_seed(seed)
    table = scores(torch.rand(shape, generator=rng).tolist(), torch.rand(shape, generator=rng).tolist())
    policy = RazorAttention(echo=parts[0], induction=parts[1], share=share, compensate=compensate)
    least = sinks + recent + compensate
    if budget < least:
        with pytest.raises(BudgetError, match=str(least)):
            policy.head_budgets(table, budget, sinks, recent)
        return
    kinds, slots = policy.retrieval(table), policy.head_budgets(table, budget, sinks, recent)
    flat = [(kind, n) for a, b in zip(kinds, slots, strict=True) for kind, n in zip(a, b, strict=True)]
    assert sum(n for _, n in flat) == layers * heads * budget
    retrieving = [n for kind, n in flat if kind]
    if len(retrieving) in (0, len(flat)):
        assert {n for _, n in flat} == {budget}
        return
    assert {n for kind, n in flat if not kind} == {max(least, round(budget / share))}
    assert max(retrieving) - min(retrieving) <= 1
    assert retrieving == sorted(retrieving, reverse=True)
    assert min(retrieving) >= budget


@pytest.mark.parametrize("parts", [(0.0, 0.0), (1.0, 0.0), (0.0, 1.0)])
def test_without_two_kinds_of_heads_all_hold_the_budget(parts: tuple[float, float]) -> None:
    table = scores([[0.1, 0.2, 0.3]] * 2)
    policy = RazorAttention(echo=parts[0], induction=parts[1])
    assert policy.head_budgets(table, 64, 4, 8) == [[64] * 3] * 2


# ------------------------------------------------------------------ as a policy


def test_retrieval_heads_go_by_the_fallback() -> None:
    view = make_view(rows=1)
    assert RazorAttention().base == KeyDiff()
    assert torch.equal(RazorAttention().score(view), KeyDiff().score(view))
    around = RazorAttention(base=TOVA())
    assert around.base == TOVA(heads="each")
    assert torch.equal(around.score(view), TOVA(heads="each").score(view))
    assert torch.equal(around.ranking(view), TOVA(heads="each").ranking(view))
    assert torch.equal(around.head_scores(view), TOVA().head_scores(view))


def test_razor_passes_on_what_its_fallback_needs() -> None:
    policy = RazorAttention(base=SnapKV(window=16))
    assert (policy.query_rows, policy.window, policy.evicts, policy.accumulates) == (16, 16, True, False)
    summing = RazorAttention(base=H2O())
    assert summing.state_width(2) == H2O().state_width(2)
    assert summing.accumulates == H2O().accumulates
    view = make_view(rows=2, state=1)
    assert view.state is not None
    want = H2O().observe(make_view(rows=2, state=1))
    assert torch.equal(summing.observe(view), want)  # type: ignore[arg-type]
    fresh = summing.token_state(view.keys, view.values, 2, None)
    assert torch.equal(fresh, H2O().token_state(view.keys, view.values, 2, None))


def test_razor_is_registered_and_needs_no_base() -> None:
    info = next(p for p in policies() if p.name == "razor")
    assert not info.wrapper
    assert not issubclass(RazorAttention, Wrapper)
    assert parse_policy("razor") == parse_policy("RazorAttention") == RazorAttention()
    assert parse_policy("razor+snapkv") == RazorAttention(base=SnapKV())
    assert parse_policy("razor(share=4, heads='scores.json')") == RazorAttention(share=4, heads="scores.json")


@pytest.mark.parametrize(
    "bad",
    [
        {"echo": -0.1},
        {"induction": 1.5},
        {"strong": 1.1},
        {"share": 0.5},
        {"share": math.nan},
        {"base": "keydiff"},
        {"heads": 3},
        {"compensate": "no"},
        {"echo": "many"},
    ],
)
def test_razor_refuses_bad_settings(bad: dict[str, Any]) -> None:
    with pytest.raises(PolicyError, match=next(iter(bad))):
        RazorAttention(**bad)


def test_razor_refuses_a_fallback_that_never_lets_go() -> None:
    with pytest.raises(PolicyError, match="never evicts"):
        parse_policy("razor+full")


# ------------------------------------------------------------------ the virtual token, in float64

B, H, M, D, V = 2, 3, 4, 6, 5


def case(held: int = 7, gone: int = 9, seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Queries [B, H, M, D]; keys and values of those held; of those gone."""
    rng = torch.Generator().manual_seed(seed)

    def make(*shape: int) -> Tensor:
        return torch.randn(shape, dtype=torch.float64, generator=rng)

    return (
        make(B, H, M, D),
        make(B, H, held, D),
        make(B, H, held, V),
        make(B, H, gone, D),
        make(B, H, gone, V),
    )


def attend(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Attention of each query by the definition; bias [B, H, N] on the logits."""
    out, lse = torch.zeros(B, H, M, V, dtype=torch.float64), torch.zeros(B, H, M, dtype=torch.float64)
    for b in range(B):
        for h in range(H):
            for m in range(M):
                z = [float(q[b, h, m] @ k[b, h, j]) * D**-0.5 for j in range(k.shape[2])]
                if bias is not None:
                    z = [x + float(bias[b, h, j]) for j, x in enumerate(z)]
                top = max(z)
                total = sum(math.exp(x - top) for x in z)
                lse[b, h, m] = top + math.log(total)
                for j, x in enumerate(z):
                    out[b, h, m] += math.exp(x - top) / total * v[b, h, j]
    return out, lse


def empty() -> tuple[Tensor, Tensor, Tensor]:
    wide = torch.float64
    return (
        torch.zeros(B, H, D, dtype=wide),
        torch.zeros(B, H, V, dtype=wide),
        torch.zeros(B, H, dtype=torch.int64),
    )


def everything(n: int) -> Tensor:
    return torch.ones(B, H, n, dtype=torch.bool)


def compensated(q: Tensor, k: Tensor, v: Tensor, gone_k: Tensor, gone_v: Tensor) -> Tensor:
    mean_k, mean_v, count = fold(*empty(), gone_k, gone_v, everything(gone_k.shape[2]))
    out, lse = attend(q, k, v)
    return merge(out, lse, mean_v, virtual_logit(q, mean_k, count, D**-0.5))


def same_output(a: Tensor, b: Tensor, query: Tensor, keys: Tensor, values: Tensor) -> None:
    """Two routes, in float64, to attention of some queries over some keys and values or their means."""
    error = logit_bound(DOUBLE, query, keys, D**-0.5) + gamma(4 * FUNCTION, DOUBLE) * math.log(99)
    assert_within(a, b, 2 * attention_bound(keys.shape[2] + 4, DOUBLE, 2 * error, float(values.abs().max())))


def same_mean(a: Tensor, b: Tensor, values: Tensor, dtype: torch.dtype) -> None:
    """A running mean: with every value one difference, one quotient, one product, one sum."""
    number = values.shape[-2]
    bound = gamma(number * (3 + FUNCTION), dtype) * values.double().abs().amax(-2)
    assert_within(a, b, bound)


def test_a_virtual_token_equals_as_many_copies_of_the_means() -> None:
    q, k, v, gone_k, gone_v = case()
    copies_k, copies_v = (x.mean(2, keepdim=True).expand_as(x) for x in (gone_k, gone_v))
    want, _ = attend(q, torch.cat([k, copies_k], 2), torch.cat([v, copies_v], 2))
    every = torch.cat([k, gone_k], 2), torch.cat([v, gone_v], 2)
    same_output(compensated(q, k, v, gone_k, gone_v), want, q, *every)


def test_b_equals_full_attention_when_all_dropped_keys_are_equal() -> None:
    q, k, v, gone_k, gone_v = case(seed=1)
    gone_k = gone_k[:, :, :1].expand_as(gone_k)
    want, _ = attend(q, torch.cat([k, gone_k], 2), torch.cat([v, gone_v], 2))
    every = torch.cat([k, gone_k], 2), torch.cat([v, gone_v], 2)
    same_output(compensated(q, k, v, gone_k, gone_v), want, q, *every)


def test_c_merging_equals_the_slot_with_a_bias() -> None:
    q, k, v, gone_k, gone_v = case(seed=2)
    mean_k, mean_v = gone_k.mean(2, keepdim=True), gone_v.mean(2, keepdim=True)
    bias = torch.zeros(B, H, 8, dtype=torch.float64)
    bias[..., -1] = math.log(9)
    want, _ = attend(q, torch.cat([k, mean_k], 2), torch.cat([v, mean_v], 2), bias)
    every = torch.cat([k, gone_k], 2), torch.cat([v, gone_v], 2)
    same_output(compensated(q, k, v, gone_k, gone_v), want, q, *every)


@pytest.mark.parametrize("steps", [1, 3, 9])
def test_d_the_running_mean_is_the_mean(steps: int) -> None:
    *_, gone_k, gone_v = case(seed=3)
    mask = torch.rand(B, H, 9, generator=torch.Generator().manual_seed(3)) < 0.6
    state = empty()
    for part in torch.arange(9).chunk(steps):
        state = fold(*state, gone_k[:, :, part], gone_v[:, :, part], mask[:, :, part])
    for b in range(B):
        for h in range(H):
            folded = [j for j in range(9) if mask[b, h, j]]
            assert int(state[2][b, h]) == len(folded)
            if folded:
                for mean, gone in ((state[0], gone_k), (state[1], gone_v)):
                    same_mean(mean[b, h], gone[b, h, folded].mean(0), gone[b, h, folded], DOUBLE)
            else:
                assert state[0][b, h].count_nonzero() == 0


def test_f_nothing_dropped_changes_nothing() -> None:
    q, k, v, *_ = case()
    mean_k, mean_v, count = empty()
    logit = virtual_logit(q, mean_k, count, 1.0)
    assert logit.isneginf().all()
    out, lse = attend(q, k, v)
    assert torch.equal(merge(out, lse, mean_v, logit), out)
    half = out.to(torch.bfloat16)
    assert torch.equal(merge(half, lse.float(), mean_v.float(), logit.float()), half)


def test_heads_fold_each_for_itself() -> None:
    """One head has let go, another has not: the second is untouched, bit for bit."""
    q, k, v, gone_k, gone_v = case(seed=4)
    mask = everything(9)
    mask[0, 1] = False
    mean_k, mean_v, count = fold(*empty(), gone_k, gone_v, mask)
    out, lse = attend(q, k, v)
    got = merge(out, lse, mean_v, virtual_logit(q, mean_k, count, D**-0.5))
    assert torch.equal(got[0, 1], out[0, 1])
    assert float((got[0, 0] - out[0, 0]).abs().max()) > 1e-3  # a virtual token of nine has some weight


def test_with_no_other_token_the_virtual_one_is_the_output() -> None:
    q, _, _, gone_k, gone_v = case(seed=5)
    mean_k, mean_v, count = fold(*empty(), gone_k, gone_v, everything(9))
    out = torch.full((B, H, M, V), math.nan, dtype=torch.float64)
    lse = torch.full((B, H, M), -math.inf, dtype=torch.float64)
    got = merge(out, lse, mean_v, virtual_logit(q, mean_k, count, D**-0.5))
    assert torch.equal(got, mean_v.unsqueeze(2).expand_as(got))
    nothing = torch.full_like(lse, -math.inf)
    zeros = torch.zeros_like(out)
    assert torch.equal(merge(zeros, lse, mean_v, nothing), zeros)


@pytest.mark.parametrize("garbage", [1e30, math.inf, math.nan])
def test_only_what_the_mask_names_is_folded(garbage: float) -> None:
    *_, gone_k, gone_v = case(seed=6)
    mask = everything(9)
    mask[:, :, 4:] = False
    spoiled = [x.masked_fill(~mask[..., None], garbage) for x in (gone_k, gone_v)]
    for a, b in zip(fold(*empty(), *spoiled, mask), fold(*empty(), gone_k, gone_v, mask), strict=True):
        assert torch.equal(a, b)
    for a, b in zip(fold(*empty(), *spoiled, mask & False), empty(), strict=True):
        assert torch.equal(a, b)


def test_fold_changes_nothing_in_place_and_widens_half_precision() -> None:
    state = [x.float() for x in empty()]
    before = [x.clone() for x in state]
    keys, values = torch.randn(B, H, 3, D).bfloat16(), torch.randn(B, H, 3, V).bfloat16()
    mean_k, _, count = fold(state[0], state[1], state[2], keys, values, everything(3))
    assert mean_k.dtype == count.dtype == torch.float32
    assert all(torch.equal(a, b) for a, b in zip(state, before, strict=True))
    same_mean(mean_k, keys.float().mean(2), keys, torch.float32)


def test_a_long_running_mean_does_not_drift() -> None:
    """100,000 tokens, one by one, in fp32: the mean stays that of the tokens."""
    n = 100_000
    keys = torch.randn(n, 2, generator=torch.Generator().manual_seed(0)) + 3.0
    state = torch.zeros(1, 1, 2), torch.zeros(1, 1, 2), torch.zeros(1, 1)
    for part in keys.view(1, 1, n, 2).split(50, dim=2):
        state = fold(*state, part, part, torch.ones(1, 1, 50, dtype=torch.bool))
    assert int(state[2]) == n
    # Each of K = 2,000 parts adds some 4 roundings of the mean; what comes later shrinks the error of part k
    # by k/K: their squares sum to K/3. The factor is that of the probabilistic bound.
    bound = LAMBDA * (2000 / 3) ** 0.5 * gamma(4, torch.float32) * float(keys.abs().max())
    assert_within(state[0][0, 0], keys.double().mean(0), bound)


def test_the_logit_is_capped_before_the_count_is_added() -> None:
    q, *_, gone_k, gone_v = case(seed=7)
    mean_k, _, count = fold(*empty(), gone_k, gone_v, everything(9))
    got = virtual_logit(q, mean_k, count, 0.5, softcap=1.5)
    for b in range(B):
        for h in range(H):
            for m in range(M):
                z = 1.5 * math.tanh(0.5 * float(q[b, h, m] @ mean_k[b, h]) / 1.5) + math.log(9)
                assert float(got[b, h, m]) == exactly(z)


def test_the_virtual_token_does_not_overstate_what_was_let_go() -> None:
    q, *_, gone_k, gone_v = case(seed=8)
    mean_k, _, count = fold(*empty(), gone_k, gone_v, everything(9))
    _, lse = attend(q, gone_k, gone_v)
    error = 2 * logit_bound(DOUBLE, q, gone_k, D**-0.5) + gamma(9 + 4 * FUNCTION, DOUBLE) * (1 + lse.abs())
    assert (virtual_logit(q, mean_k, count, D**-0.5) <= lse + error).all()


# ------------------------------------------------------------------ ALiBi


def test_alibi_reach_is_its_formula() -> None:
    rng = torch.Generator().manual_seed(0)
    w_q, w_k = torch.randn(4, 12, generator=rng), torch.randn(4, 12, generator=rng)
    gamma, beta = torch.randn(12, generator=rng), torch.randn(12, generator=rng)
    # The spectral norm by power iteration on the whole 12 × 12 product.
    product = w_q.double().T @ w_k.double()
    x = torch.ones(12, dtype=torch.float64)
    for _ in range(2000):
        x = product.T @ (product @ x)
        x = x / x.norm()
    norm = float((product @ x).norm())
    power = sum(float(g) ** 2 for g in gamma) + sum(float(b) ** 2 for b in beta)
    want = (2 * norm * power - math.log(1e-3)) / 0.25
    # The power iteration has converged to the last digits; then products of 12 numbers and a few operations.
    assert alibi_reach(w_q, w_k, gamma, beta, 0.25) == exactly(want, 1000)
    without = (2 * norm * sum(float(g) ** 2 for g in gamma) - math.log(0.01)) / 0.25
    assert alibi_reach(w_q, w_k, gamma, None, 0.25, eps=0.01) == exactly(without, 1000)


def test_no_weight_beyond_the_empirical_reach_exceeds_eps() -> None:
    rng = torch.Generator().manual_seed(1)
    logits, slope, eps = torch.randn(200, 200, generator=rng, dtype=torch.float64), 0.2, 1e-2
    reach = alibi_reach_empirical(float(logits.abs().max()), slope, eps)
    assert 0 < reach < 199
    for m in range(200):
        z = torch.tensor([float(logits[m, n]) - slope * (m - n) for n in range(m + 1)])
        row = torch.softmax(z, 0)
        assert all(float(row[n]) <= eps for n in range(m + 1) if m - n >= reach)


def test_alibi_refuses_what_is_no_slope() -> None:
    w = torch.eye(3)
    for bad in ({"slope": 0.0}, {"slope": -1.0}, {"slope": 1.0, "eps": 0.0}, {"slope": 1.0, "eps": 1.0}):
        with pytest.raises(InputError):
            alibi_reach(w, w, torch.ones(3), None, **bad)
        with pytest.raises(InputError):
            alibi_reach_empirical(1.0, **bad)
    with pytest.raises(InputError, match="max_qk"):
        alibi_reach_empirical(-1.0, 0.5)
