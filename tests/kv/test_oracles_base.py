"""What the papers' formulas imply: identities, limits and degenerate cases of the base policies."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from modicum.kv.policies.ahakv import AhaKV
from modicum.kv.policies.h2o import H2O
from modicum.kv.policies.keydiff import KeyDiff
from modicum.kv.policies.knorm import Knorm
from modicum.kv.policies.random import Random
from modicum.kv.policies.snapkv import SnapKV
from modicum.kv.policies.streaming import StreamingLLM
from modicum.kv.policies.tova import TOVA
from modicum.kv.view import View
from tests.bounds import FUNCTION, assert_within, gamma
from tests.kv.views import make_view, score_bound, with_parts

SINGLE = torch.float32


def with_keys(view: View, keys: Tensor) -> View:
    return with_parts(view, ((keys, view.values),))


def with_values(view: View, values: Tensor) -> View:
    return with_parts(view, ((view.keys, values),))


def in_order(n: int, rows: int, capacity: int, keys: Tensor, values: Tensor, queries: Tensor) -> View:
    """A view of one head that holds all of n tokens in order of positions."""
    positions = torch.arange(n)[None, None]
    return View(
        parts=((keys[None, None], values[None, None]),),
        positions=positions,
        valid=None,
        protected=torch.zeros_like(positions, dtype=torch.bool),
        seen=torch.tensor([n]),
        capacity=capacity,
        layer=0,
        layers=1,
        scaling=keys.shape[-1] ** -0.5,
        queries=queries[None, None, None],
        query_positions=torch.arange(n - rows, n)[None].clamp_min(-1),
        state=torch.zeros(1, 1, n, 1),
        newcomers=n,
    )


def assert_same_order(a: Tensor, b: Tensor, bound: float) -> None:
    """Scores [..., N] rank alike, but for neighbours that are nearer than the bound."""
    order = a.argsort(-1)
    assert bool((b.gather(-1, order).diff(dim=-1) >= -2 * bound).all())


# KeyDiff ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(3))
def test_keydiff_anchor_score_is_the_row_sum_of_pairwise_cosines(seed: int) -> None:
    view = make_view(seed=seed, parts=2)
    unit = torch.nn.functional.normalize(view.keys.double(), dim=-1)
    row_sums = (unit @ unit.transpose(-1, -2)).sum(-1)
    length = unit.sum(-2).norm(dim=-1, keepdim=True)  # n ‖μ‖
    assert_within(KeyDiff().score(view).double() * length, -row_sums, score_bound(view).absolute * length)


@pytest.mark.parametrize("window", [None, 5])
def test_keydiff_ignores_the_length_of_keys_and_the_choice_of_axes(window: int | None) -> None:
    policy, view = KeyDiff(anchor_window=window), make_view(seed=1)
    score = policy.score(view)
    scales = torch.rand(2, 2, 17, 1) * 10 + 0.1
    # Scaling and turning the keys round them once more, a product of 8 by 8 numbers.
    bound = 2 * score_bound(view).absolute + gamma(9, SINGLE)
    assert_within(policy.score(with_keys(view, view.keys * scales)), score, bound)
    axes, _ = torch.linalg.qr(torch.randn(8, 8, dtype=torch.float64))
    turned = (view.keys.double() @ axes).float()
    assert_within(policy.score(with_keys(view, turned)), score, bound)


def test_keydiff_keeps_the_one_key_that_is_opposite() -> None:
    view = make_view(n=9, seed=2)
    keys = torch.randn(2, 2, 1, 8).expand(2, 2, 9, 8).clone()
    keys[:, :, 4] *= -1
    for policy in (KeyDiff(), KeyDiff(metric="l2")):
        score = policy.score(with_keys(view, keys))
        assert (score.argmax(-1) == 4).all()
        others = score[..., [0, 1, 2, 3, 5, 6, 7, 8]]
        assert (score[..., 4] - others.amax(-1) > 0.5).all()


def test_keydiff_and_manifoldkv_rank_unit_keys_alike() -> None:
    view = make_view(n=40, seed=3)
    unit = torch.nn.functional.normalize(view.keys, dim=-1)
    cosine, l2 = (KeyDiff(metric=m).score(with_keys(view, unit)) for m in ("cosine", "l2"))
    assert_same_order(cosine, l2, 2 * score_bound(with_keys(view, unit)).absolute)


def test_keydiff_of_equal_keys_ties() -> None:
    view = make_view(n=16, seed=4)
    keys = torch.ones(2, 2, 16, 8)
    for policy in (KeyDiff(), KeyDiff(metric="l2"), KeyDiff(anchor_window=4)):
        score = policy.score(with_keys(view, keys))
        assert (score == score[..., :1]).all()


def test_keydiff_without_a_direction_scores_zero() -> None:
    view = make_view(n=2, newcomers=1, seed=5)
    keys = torch.randn(2, 2, 1, 8)
    assert (KeyDiff().score(with_keys(view, torch.cat([keys, -keys], dim=2))) == 0).all()


def test_manifoldkv_sees_small_distances_between_large_keys() -> None:
    view = make_view(n=32, seed=6)
    keys = view.keys + 1000.0
    score = KeyDiff(metric="l2").score(with_keys(view, keys)).double()
    exact = (keys.double() - keys.double().mean(2, keepdim=True)).norm(dim=-1)
    # A key of size 1000 and the mean are off by a few units of theirs, in each of 8 dimensions.
    assert_within(score, exact, gamma(4, SINGLE) * keys.double().norm(dim=-1) + gamma(8, SINGLE) * exact)


def test_one_window_over_everything_is_no_window() -> None:
    view = make_view(seed=7, invalid=4)
    for metric in ("cosine", "l2"):
        plain, windowed = KeyDiff(metric=metric), KeyDiff(metric=metric, anchor_window=10**6)
        bound = 2 * score_bound(view).absolute
        assert_within(windowed.score(view)[view.valid], plain.score(view)[view.valid], bound)
        other = KeyDiff(metric=metric, anchor_window=8).score(view)
        assert float((other - plain.score(view))[view.valid].abs().max()) > 100 * bound


# AhaKV ------------------------------------------------------------------------------------------------------


def test_ahakv_gain_on_z_is_the_paper_s_lambda_on_raw_products() -> None:
    d, k = 8, 9
    policy, view = AhaKV(window=4), make_view(d=d, rows=4, n=17, capacity=k, seed=1)
    queries, at = view.asked
    rows = view.rows(policy.gain(view))
    for row in range(2):
        for r in range(4):
            i = int(at[row, r]) + 1
            lam = math.sqrt(2 * math.log(i / k) / d)
            x = torch.einsum("hgd,hnd->hgn", queries[row, :, :, r].double(), view.keys[row].double())
            x = (lam * x).masked_fill(view.positions[row][:, None] > at[row, r], -math.inf)
            expected = x.softmax(-1)
            assert_within(rows[row, :, :, r], expected, score_bound(view).relative * expected)


@pytest.mark.parametrize(("i", "k"), [(1000, 720), (4000, 720), (4000, 1000), (16000, 720), (16000, 1000)])
def test_ahakv_gain_holds_the_entropy_at_the_log_of_the_budget(i: int, k: int) -> None:
    rng, d, rows = torch.Generator().manual_seed(i + k), 128, 256
    keys, queries = torch.randn(i, d, generator=rng), torch.randn(rows, d, generator=rng)
    view = in_order(i, rows, k, keys, keys[:, :1], queries)
    view = replace(view, query_positions=torch.full((1, rows), i - 1))
    entropies = []
    for a in view.row_tiles(AhaKV(window=rows).gain(view)):
        entropies.append(-(a * a.clamp_min(1e-30).log()).sum(-1).flatten())
    # Single rows scatter; only their mean is near ln k. The plain rows are far from it.
    assert torch.cat(entropies).mean().item() == pytest.approx(math.log(k), abs=0.15)


def test_ahakv_gain_values() -> None:
    policy, view = AhaKV(window=1), make_view(b=1, rows=1)
    for ratio, gain in [(1.05, 0.31), (1.2, 0.60), (2, 1.18), (4, 1.67), (8, 2.04), (16, 2.35), (32, 2.63)]:
        at = replace(view, query_positions=torch.tensor([[int(ratio * 10**6) - 1]]), capacity=10**6)
        assert policy.gain(at).item() == pytest.approx(gain, abs=0.006)
    short = replace(view, query_positions=torch.tensor([[99]]), capacity=100)
    assert policy.gain(short).item() == 0.0
    assert AhaKV(window=1, min_gain=1.0).gain(short).item() == 1.0


def test_ahakv_row_is_the_ordinary_one_at_root_e_times_the_budget() -> None:
    k = 10**6
    view = make_view(b=1, rows=1, capacity=k, seed=2)
    view = replace(view, query_positions=torch.tensor([[round(math.sqrt(math.e) * k) - 1]]))
    # The nearest whole number of tokens is at most half a token from √e·k: a gain of 1 but for 1/(4k).
    size = float(view.queries.norm(dim=-1).max() * view.keys.norm(dim=-1).max()) * view.scaling
    share = 2 * score_bound(view).relative + math.expm1(2 * size / (4 * k))
    assert_within(view.rows(AhaKV(window=1).gain(view)), view.rows(), share * view.rows())


def test_h2o_falls_with_position_where_recent_accumulation_is_level() -> None:
    n, r, d = 24, 6, 4
    zero = torch.zeros(n, d)  # equal logits: a_ij = 1/i
    all_rows = in_order(n, n, 8, zero, torch.ones(n, d), torch.zeros(n, d))
    h2o = H2O()
    s = h2o.score(replace(all_rows, state=h2o.observe(all_rows)))[0, 0]
    assert (s.diff() < 0).all()
    sums = [sum(1 / i for i in range(j, n + 1)) for j in range(1, n + 1)]
    assert s.tolist() == pytest.approx(sums, rel=score_bound(all_rows).relative)

    last_rows = in_order(n, r, 8, zero, torch.ones(n, d), torch.zeros(r, d))
    recent = AhaKV(window=r, kernel=1).score(last_rows)[0, 0]
    level = recent[0].expand(n - r + 1)
    assert_within(recent[: n - r + 1], level, 2 * score_bound(last_rows).relative * level)
    assert (recent[n - r :].diff() < 0).all()


def test_ahakv_ranks_by_recent_attention_where_values_say_nothing() -> None:
    policy = AhaKV(window=4, kernel=1)
    view = make_view(rows=4, capacity=8, seed=3)
    attention = view.rows(policy.gain(view)).sum(3).mean(2)
    level = torch.nn.functional.normalize(view.values, dim=-1) * 3
    share = 2 * score_bound(view).relative
    assert_within(policy.score(with_values(view, level)), attention, share * attention)
    for policy in (AhaKV(window=4), AhaKV(window=4, group="max")):
        score = policy.score(view)
        assert_within(policy.score(with_values(view, view.values * 7)), score, share * score)


def test_ahakv_prior_of_level_norms_is_one_up_to_the_edges() -> None:
    view = make_view(rows=1, invalid=5, seed=4)
    level = torch.nn.functional.normalize(view.values, dim=-1) * 0.3
    for kernel in (1, 5, 9):
        prior = AhaKV(window=1, kernel=kernel).prior(with_values(view, level))[view.positions >= 0]
        assert_within(prior, torch.ones_like(prior), score_bound(view).relative)
    assert (AhaKV(window=1).prior(with_values(view, view.values * 0)) == 1).all()


def test_ahakv_pools_squared_norms_of_neighbours() -> None:
    n = 7
    values = torch.tensor([0.0, 0.0, 3.0, 0.0, 0.0, 0.0, 0.0])[:, None]
    view = in_order(n, 1, 4, torch.zeros(n, 1), values, torch.zeros(1, 1))
    prior = AhaKV(window=1, kernel=3).prior(view)[0, 0]
    assert prior.tolist() == pytest.approx([0, 1, 1, 1, 0, 0, 0], rel=gamma(2 * FUNCTION, SINGLE))
    prior = AhaKV(window=1, kernel=5).prior(view)[0, 0]  # 9/3, 9/4, 9/5, 9/5, 9/5, and none
    assert prior.tolist() == pytest.approx([1, 0.75, 0.6, 0.6, 0.6, 0, 0], rel=gamma(2 * FUNCTION, SINGLE))


def test_ahakv_uses_the_rows_there_are() -> None:
    n = 3
    rng = torch.Generator().manual_seed(5)
    keys, queries = torch.randn(n, 4, generator=rng), torch.randn(8, 4, generator=rng)
    wide = in_order(n, 8, 1, keys, keys, queries)  # five of eight queries are not there
    narrow = in_order(n, n, 1, keys, keys, queries[5:])
    expected = AhaKV(window=3).score(narrow)
    assert_within(AhaKV(window=8).score(wide), expected, 2 * score_bound(narrow).relative * expected)


def test_ahakv_counts_what_is_held_or_what_was_seen() -> None:
    view = make_view(n=17, rows=2, capacity=4, newcomers=2, invalid=6, seed=6)
    _, at = view.asked
    seen = AhaKV(window=2).gain(view)
    wanted = (2 * ((at + 1) / 4).double().log()).sqrt()
    assert_within(seen, wanted, gamma(3 * FUNCTION, SINGLE) * wanted)
    held = AhaKV(window=2, count="held").gain(view)
    assert held.shape == (2, 2, 2)
    assert view.valid is not None
    number = view.valid.sum(-1)  # the last query sees all that is held
    wanted = (2 * (number / 4).double().log()).sqrt()
    assert_within(held[..., -1], wanted, gamma(3 * FUNCTION, SINGLE) * wanted)
    assert (held[..., -1] < seen[:, None, -1]).all()


# the others -------------------------------------------------------------------------------------------------


def test_tova_is_one_decision_for_the_layer() -> None:
    view = make_view(rows=1, n=12, seed=1)
    view = replace(view, positions=view.positions[:, :1].expand_as(view.positions))  # the slots agree
    layer, each = TOVA().score(view), TOVA(heads="each").score(view)
    share, expected = 2 * score_bound(view).relative, each.mean(1, keepdim=True).expand_as(each)
    assert_within(layer, expected, share * expected)
    # A row's weights are all divided by one sum: what is inexact in its logits does not count.
    assert_within(each.sum(-1), torch.ones(2, 2), gamma(2 * 12 + 2 * FUNCTION, SINGLE))


def test_tova_takes_the_same_tokens_from_heads_whose_slots_differ() -> None:
    view = make_view(rows=1, n=12, same_heads=True, seed=2)
    assert not torch.equal(view.positions[:, 0], view.positions[:, 1])
    oldest_first = TOVA().score(view).gather(-1, view.positions.argsort(-1))
    assert_within(oldest_first[:, 0], oldest_first[:, 1], 2 * score_bound(view).relative * oldest_first[:, 0])


def test_snapkv_drops_the_window_before_pooling() -> None:
    n, w = 8, 2
    rng = torch.Generator().manual_seed(1)
    keys, queries = torch.randn(n, 4, generator=rng), torch.randn(w, 4, generator=rng)
    view = in_order(n, w, 4, keys, keys, queries)
    votes = view.rows().sum(3)[0, 0, 0].tolist()
    score = SnapKV(window=w, kernel=3).score(view)[0, 0].tolist()
    share = gamma(4 + FUNCTION, SINGLE)  # of the mean of three votes
    assert score[5] == pytest.approx((votes[4] + votes[5]) / 2, rel=share), "6 and 7 are the window"
    assert score[1] == pytest.approx(sum(votes[:3]) / 3, rel=share)


def test_snapkv_floor_lifts_the_least_to_the_mean_of_what_may_go() -> None:
    policy = SnapKV(window=2, over="max", group="max")
    view = make_view(rows=2, sinks=3, recent=2, seed=9)
    plain, floored = policy.score(view), policy.with_settings(floor=True).score(view)
    for row in range(2):
        for head in range(2):
            may_go = ~view.protected[row, head]
            least = plain[row, head][may_go].mean()
            wanted = plain[row, head][may_go].clamp_min(least)
            assert_within(floored[row, head][may_go], wanted, 2 * score_bound(view).relative * wanted)


def test_snapkv_when_all_is_protected() -> None:
    view = replace(make_view(rows=4, seed=3), protected=torch.ones(2, 2, 17, dtype=torch.bool))
    assert SnapKV(window=4, floor=True).score(view).isfinite().all()


def test_h2o_accumulates_over_calls() -> None:
    n, d = 10, 4
    rng = torch.Generator().manual_seed(2)
    keys, queries = torch.randn(n, d, generator=rng), torch.randn(n, d, generator=rng)
    at_once = H2O().observe(in_order(n, n, 4, keys, keys, queries))
    step_by_step = torch.zeros(1, 1, 0, 1)
    for m in range(1, n + 1):
        view = in_order(m, 1, 4, keys[:m], keys[:m], queries[m - 1 : m])
        newcomer = torch.zeros(1, 1, 1, 1)
        step_by_step = H2O().observe(replace(view, state=torch.cat([step_by_step, newcomer], dim=2)))
    view = in_order(n, n, 4, keys, keys, queries)
    assert_within(step_by_step, at_once, 2 * score_bound(view).relative * at_once)
    assert at_once.sum().item() == pytest.approx(n, rel=gamma(n * n + FUNCTION, SINGLE)), "rows sum to one"


def test_rows_in_tiles_are_the_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    view = make_view(rows=7, invalid=3, seed=4)
    gain = torch.rand(2, 7) + 0.5
    whole = view.rows(gain)
    scores = [
        policy.score(view) for policy in (SnapKV(window=7), SnapKV(window=7, over="max"), AhaKV(window=7))
    ]
    monkeypatch.setattr("modicum.kv.view._ROW_BYTES", 4 * 2 * 2 * 2 * 17 * 3)  # three queries at a time
    tiles = list(view.row_tiles(gain))
    assert [tile.shape[3] for tile in tiles] == [3, 3, 1]
    share = 2 * score_bound(view).relative
    assert_within(torch.cat(tiles, dim=3), whole, share * whole)
    again = [
        policy.score(view) for policy in (SnapKV(window=7), SnapKV(window=7, over="max"), AhaKV(window=7))
    ]
    for found, expected in zip(again, scores, strict=True):
        assert_within(found, expected, share * expected.abs())


def test_keys_in_tiles_score_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    view = make_view(rows=4, parts=2, invalid=3, capacity=8, seed=5)
    policies = [KeyDiff(), KeyDiff(metric="l2", anchor_window=9), Knorm(), SnapKV(window=4), AhaKV(window=4)]
    scores = [policy.score(view) for policy in policies]
    monkeypatch.setattr("modicum.kv.view._TILE", 5)
    torch.testing.assert_close([p.score(view) for p in policies], scores, **score_bound(view).both)


def test_streamingllm_keeps_the_newest() -> None:
    view = make_view(n=20, seed=6)
    kept = view.positions.gather(-1, StreamingLLM().score(view).topk(5).indices)
    assert torch.equal(kept.amin(-1), view.positions.sort(-1).values[..., -5])


def test_random_lots_depend_on_seed_layer_head_and_position_alone() -> None:
    view = make_view(seed=7)
    again = replace(make_view(seed=8), positions=view.positions, seen=view.seen + 5, capacity=3)
    assert torch.equal(Random().score(view), Random().score(again))
    one_place = replace(view, positions=torch.arange(17).expand(2, 2, 17))
    lots = Random().score(one_place)
    assert torch.equal(lots[0], lots[1]), "rows of a batch draw alike"
    for other in (
        lots[:, 1],
        Random(seed=1).score(one_place)[:, 0],
        Random().score(replace(one_place, layer=2))[:, 0],
    ):
        assert (other != lots[:, 0]).float().mean() > 0.9


def test_random_lots_are_even() -> None:
    positions = torch.arange(4000).expand(1, 8, 4000)
    lots = Random(seed=3).score(replace(make_view(), positions=positions))[0]
    assert lots.min() >= 0
    assert lots.max() < 1
    assert (lots.histc(10, 0, 1) - 3200).abs().max() < 5 * math.sqrt(3200)
    neighbours = torch.corrcoef(torch.stack([lots[:, 1:].flatten(), lots[:, :-1].flatten()]))[0, 1]
    heads = torch.corrcoef(lots).fill_diagonal_(0)
    assert abs(neighbours) < 0.03
    assert heads.abs().max() < 0.08
