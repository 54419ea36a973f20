"""Wrappers against float64 loops, the oracles of CAOTE, and the cases where formulas give out."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from itertools import pairwise, product
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import modicum.kv.policies
from modicum.errors import BudgetError, PolicyError
from modicum.kv.policies import criticalkv as criticalkv_module
from modicum.kv.policies.adakv import AdaKV
from modicum.kv.policies.caote import CAOTE, FastCAOTE
from modicum.kv.policies.criticalkv import CriticalKV
from modicum.kv.policies.h2o import H2O
from modicum.kv.policies.keydiff import KeyDiff
from modicum.kv.policies.pyramidkv import PyramidKV
from modicum.kv.policies.snapkv import SnapKV
from modicum.kv.policies.tova import TOVA
from modicum.kv.policy import Policy, Wrapper
from modicum.kv.registry import parse_policy, policies
from modicum.kv.view import View
from modicum.kv.weighting import lifted, normalised
from tests.bounds import FUNCTION, LAMBDA, Clear, assert_within, gamma

from .views import make_view, score_bound, shuffle_slots, spoil_holes, with_parts

SINGLE = torch.float32
INFINITE = torch.finfo(torch.float32).max  # what stands for +inf below the protected tokens' infinity


@dataclass(frozen=True)
class Given(Policy):
    """A base whose scores per query head are given; `query_rows` as told."""

    scores: Tensor = None  # type: ignore[assignment]  # [B, H, G, N]
    reads: int = 0

    @property
    def query_rows(self) -> int:
        return self.reads

    def head_scores(self, view: View) -> Tensor:
        return self.scores

    def score(self, view: View) -> Tensor:
        return self.scores.mean(2)


def there(view: View) -> Tensor:
    return torch.ones_like(view.protected) if view.valid is None else view.valid


def loops(view: View) -> list[tuple[int, int, list[int], list[int]]]:
    """(row, head, slots with a token, those of them that may go)."""
    found = []
    for b, h in product(*map(range, view.positions.shape[:2])):
        slots = [j for j in range(view.positions.shape[2]) if there(view)[b, h, j]]
        found.append((b, h, slots, [j for j in slots if not view.protected[b, h, j]]))
    return found


def weights(scores: list[float], slots: list[int]) -> dict[int, float]:
    """Normalised scores over the slots; raised first if one is negative, equal if all are 0."""
    low = min([0.0, *(scores[j] for j in slots)])
    total = sum(scores[j] - low for j in slots)
    return {j: (scores[j] - low) / total if total > 0 else 1 / len(slots) for j in slots}


def value(view: View, b: int, h: int, j: int) -> Tensor:
    return view.values[b, h, j].double()


def mix(view: View, b: int, h: int, alpha: dict[int, float]) -> Tensor:
    return torch.stack([a * value(view, b, h, j) for j, a in alpha.items()]).sum(0)


def caote_error(view: View, b: int, h: int, alpha: dict[int, float], x: Tensor, j: int) -> float:
    a = alpha.get(j, 0.0)
    return a / (1 - a) * float((x - value(view, b, h, j)).norm())


def join(errors: list[float], how: str) -> float:
    if how == "mean":
        return sum(errors) / len(errors)
    return max(errors) if how == "max" else math.sqrt(sum(e * e for e in errors))


def attention(view: View, b: int, h: int, g: int, r: int, slots: list[int]) -> dict[int, float]:
    """The weights of one query over the slots that it can see, by the softmax's definition."""
    assert view.queries is not None
    assert view.query_positions is not None
    at = int(view.query_positions[b, r])
    seen = [j for j in slots if view.positions[b, h, j] <= at]
    q = view.queries[b, h, g, r].double()
    z = {j: float(view.keys[b, h, j].double() @ q) * view.scaling for j in seen}
    total = sum(math.exp(x) for x in z.values())
    return {j: math.exp(x) / total for j, x in z.items()}


def spread(view: View) -> float:
    """S: twice the largest distance of a value from its head's newest one, CAOTE's origin."""
    newest = view.positions.argmax(-1)[..., None, None]
    values = view.values.double()
    apart = (values - values.gather(2, newest.expand(-1, -1, 1, values.shape[-1]))).norm(dim=-1)
    return 2 * float(apart[there(view)].max())


def caote_slack(view: View, alpha: dict[int, float], x: Tensor, j: int, b: int, h: int) -> float:
    """Error of `caote_error` in fp32: α/(1 - α)·d.

    α is off as any score is, and 1 - α with it. The distance d is made of squares, ‖X‖² - 2 X·v + ‖v‖², each
    off by γ_k·S², k for the sum over tokens and that over dimensions. The root of a square that is off by ε
    is off by ε/d, or by √ε where d is smaller than that.
    """
    single, a = torch.float32, alpha.get(j, 0.0)
    distance = float((x - value(view, b, h, j)).norm())
    square = gamma(LAMBDA + math.sqrt(len(alpha)) + view.values.shape[-1], single) * spread(view) ** 2
    off = min(square / max(distance, 1e-30), math.sqrt(square)) + gamma(FUNCTION, single) * distance
    relative = score_bound(view).relative / (1 - a) + gamma(2 * FUNCTION, single)
    return a / (1 - a) * (off + relative * distance)


def agree(
    got: Tensor, want: dict[tuple[int, int, int], float], slack: dict[tuple[int, int, int], float] | float
) -> None:
    """slack: each one's error bound, or all bounds as a share."""
    assert want
    for (b, h, j), x in want.items():
        bound = slack * abs(x) if isinstance(slack, float) else slack[b, h, j]
        assert abs(float(got[b, h, j]) - x) <= bound, (b, h, j)


def even_slack(view: View, expected: Tensor) -> Tensor:
    """Error bound of CAOTE scores [..., N] where no token has more than half of the weight.

    By `caote_slack` with the largest α for every token, 1/2: of distances, the square-root bound.
    """
    single, n = torch.float32, view.positions.shape[2]
    square = gamma(LAMBDA + math.sqrt(n) + view.values.shape[-1], single) * spread(view) ** 2
    relative = 2 * score_bound(view).relative + gamma(4 * FUNCTION, single)
    # α/(1 - α)·ε/d with α/(1 - α) ≤ c/d, c the score: c·ε/d², for distances that are at least a tenth of S.
    far = square / (0.1 * spread(view)) ** 2
    return (relative + far) * expected.double().abs()


def slack(policy: Policy, view: View, expected: Tensor) -> Tensor:
    """Error bound of any wrapper's score: CAOTE's differences; else products of a base's scores."""
    if "caote" in str(policy):
        return even_slack(view, expected)
    chain = gamma(LAMBDA * 3 + 6 + 4 * FUNCTION, torch.float32)
    # A base's negative scores are raised: the error counts by the largest of them.
    relative, absolute = score_bound(view).relative + chain, score_bound(view).absolute
    return relative * expected.double().abs() + absolute * (
        1 + expected.double().abs().amax(-1, keepdim=True)
    )


# ------------------------------------------------------------------ scores as weights


def test_weights_are_normalised_scores() -> None:
    x = torch.tensor([1.0, 3.0, 0.0, 9.0])
    counted = torch.tensor([True, True, True, False])
    assert lifted(x, counted).tolist() == x.tolist()
    assert normalised(x, counted).tolist() == [0.25, 0.75, 0.0, 0.0]


def test_negative_scores_are_raised_to_zero_and_keep_their_differences() -> None:
    x, counted = torch.tensor([-3.0, -1.0, 1.0, -50.0]), torch.tensor([True, True, True, False])
    assert lifted(x, counted)[:3].tolist() == [0.0, 2.0, 4.0]
    assert normalised(x, counted).tolist() == pytest.approx([0.0, 1 / 3, 2 / 3, 0.0], rel=gamma(4, SINGLE))


@pytest.mark.parametrize("odd", [math.inf, -math.inf, math.nan, 1e38])
def test_weights_look_at_counted_scores_only(odd: float) -> None:
    x, counted = torch.tensor([2.0, 2.0, odd]), torch.tensor([True, True, False])
    assert normalised(x, counted).tolist() == [0.5, 0.5, 0.0]


def test_weights_of_nothing_are_zero_and_of_zeros_equal() -> None:
    assert normalised(torch.ones(3), torch.zeros(3, dtype=torch.bool)).tolist() == [0.0, 0.0, 0.0]
    assert normalised(torch.zeros(4), torch.ones(4, dtype=torch.bool)).tolist() == [0.25] * 4


def test_an_infinite_score_takes_all_the_weight_and_makes_no_nan() -> None:
    weighed = normalised(torch.tensor([1.0, math.inf]), torch.ones(2, dtype=torch.bool))
    assert weighed.tolist() == pytest.approx([0.0, 1.0], abs=gamma(4, SINGLE))


# ------------------------------------------------------------------ CAOTE


@pytest.mark.parametrize("group", ["rss", "mean", "max"])
@pytest.mark.parametrize("fast", [False, True])
@pytest.mark.parametrize(("reads", "x_over"), [(1, "auto"), (32, "auto"), (0, "held"), (1, "evictable")])
def test_caote_is_its_formula(group: Any, fast: bool, reads: int, x_over: Any) -> None:
    view = make_view(g=3, n=19, d=6, dv=5, parts=2, invalid=4, sinks=2, recent=3, rows=1, seed=3)
    scores = torch.rand(2, 2, 3, 19, generator=torch.Generator().manual_seed(5)) - 0.2 * (reads == 0)
    made = CAOTE(Given(scores, reads), group=group, fast=fast, x_over=x_over)
    got, want, slack = made.score(view), {}, {}
    for b, h, slots, open_ in loops(view):
        counted = slots if (x_over == "held" or (x_over == "auto" and reads == 1)) else open_
        alphas = [weights(scores[b, h, g].double().tolist(), counted) for g in range(3)]
        mean = {j: 1 / len(counted) for j in counted}
        xs = [mix(view, b, h, mean if fast else a) for a in alphas]
        for j in open_:
            errors = [caote_error(view, b, h, a, x, j) for a, x in zip(alphas, xs, strict=True)]
            want[b, h, j] = join(errors, group)
            slacks = [caote_slack(view, a, x, j, b, h) for a, x in zip(alphas, xs, strict=True)]
            slack[b, h, j] = join(slacks, group)
    agree(got, want, slack)
    if fast:
        renamed = FastCAOTE(Given(scores, reads), group=group, x_over=x_over)
        assert torch.equal(got, renamed.score(view))


@pytest.mark.parametrize("softcap", [None, 2.0])
def test_a_dropped_token_moves_the_output_by_exactly_its_score(softcap: float | None) -> None:
    view = make_view(g=2, n=14, rows=1, sinks=1, recent=2, invalid=3, seed=7)
    view.softcap = softcap
    got = CAOTE(TOVA()).head_scores(view)
    for b, h, slots, _ in loops(view):
        for g in range(2):
            assert view.queries is not None
            z = {j: float(view.keys[b, h, j].double() @ view.queries[b, h, g, 0].double()) for j in slots}
            z = {j: x * view.scaling for j, x in z.items()}
            if softcap is not None:
                z = {j: softcap * math.tanh(x / softcap) for j, x in z.items()}

            def output(left: list[int], z: dict[int, float] = z, b: int = b, h: int = h) -> Tensor:
                total = sum(math.exp(z[j]) for j in left)
                return mix(view, b, h, {j: math.exp(z[j]) / total for j in left})

            whole, total = output(slots), sum(math.exp(z[j]) for j in slots)
            alpha = {j: math.exp(z[j]) / total for j in slots}
            for j in slots:
                moved = float((output([i for i in slots if i != j]) - whole).norm())
                assert abs(float(got[b, h, g, j]) - moved) <= caote_slack(view, alpha, whole, j, b, h)


def test_rss_is_the_change_of_the_concatenated_outputs() -> None:
    view = make_view(g=3, n=11, rows=1, seed=9)
    got = CAOTE(TOVA()).score(view)
    for b, h, slots, open_ in loops(view):
        whole = [attention(view, b, h, g, 0, slots) for g in range(3)]
        for j in open_:
            left = [attention(view, b, h, g, 0, [i for i in slots if i != j]) for g in range(3)]
            outputs = [torch.cat([mix(view, b, h, alpha) for alpha in alphas]) for alphas in (whole, left)]
            slacks = [caote_slack(view, alpha, mix(view, b, h, alpha), j, b, h) for alpha in whole]
            moved = float((outputs[0] - outputs[1]).norm())
            assert abs(float(got[b, h, j]) - moved) <= join(slacks, "rss")


def test_uniform_weights_make_caote_and_fastcaote_one() -> None:
    view = make_view(g=2, n=16, invalid=3, recent=2)
    base = Given(torch.full((2, 2, 2, 16), 0.3))
    open_ = there(view) & ~view.protected
    slow, fast = CAOTE(base).score(view), FastCAOTE(base).score(view)
    assert_within(slow[open_], fast[open_], 2 * even_slack(view, fast)[open_])


@pytest.mark.parametrize("settings", [{}, {"fast": True}, {"rows": "window"}, {"iterative": True}])
def test_one_vector_added_to_all_values_changes_nothing(settings: dict[str, Any]) -> None:
    view = make_view(n=24, dv=5, rows=4, recent=4, parts=2, capacity=18)
    policy = CAOTE(SnapKV(window=4, kernel=1), **settings)
    # Values and what is added are multiples of 2**-10: the sum itself loses nothing.
    far = torch.tensor([64.0, -128.0, 32.0, 0.0, 256.0])
    exact = [(k, (v * 1024).round() / 1024) for k, v in view.parts]
    near, moved = with_parts(view, tuple(exact)), with_parts(view, tuple((k, v + far) for k, v in exact))
    open_ = ~view.protected
    a, b = policy.score(near)[open_], policy.score(moved)[open_]
    assert_within(a, b, 2 * even_slack(near, policy.score(near))[open_])


def test_equal_values_tie_exactly_at_zero() -> None:
    view = make_view(n=20, rows=1)
    same = torch.randn(2, 2, 1, 8).expand(2, 2, 20, 8) * 1e3
    view = with_parts(view, ((view.keys, same.contiguous()),))
    for policy in (CAOTE(TOVA()), FastCAOTE(TOVA()), CAOTE(TOVA(), rows="window")):
        assert policy.score(view).count_nonzero() == 0


def test_scores_without_weight_count_as_equal() -> None:
    view = make_view(n=12)
    zero, ones = Given(torch.zeros(2, 2, 2, 12)), Given(torch.ones(2, 2, 2, 12))
    found, expected = CAOTE(zero).score(view), CAOTE(ones).score(view)
    assert_within(found, expected, 2 * even_slack(view, expected))


def test_one_token_is_never_dropped() -> None:
    view = make_view(n=1, newcomers=1, rows=1)
    assert CAOTE(TOVA()).head_scores(view).isposinf().all()
    assert (CAOTE(TOVA()).score(view) == INFINITE).all()


@pytest.mark.parametrize("group", ["rss", "mean", "max"])
def test_a_token_with_all_the_weight_is_never_dropped_but_yields_to_protected_ones(group: Any) -> None:
    scores = torch.full((1, 1, 2, 6), 1e-9)
    scores[..., 2] = 1.0
    view = make_view(b=1, h=1, n=6)
    got = CAOTE(Given(scores), group=group).score(view)[0, 0]
    assert got[2] == INFINITE < math.inf
    assert (got[[0, 1, 3, 4, 5]] < 1).all()


@pytest.mark.parametrize("weight", [0.9, 0.999, 0.9999])
@pytest.mark.parametrize("settings", [{}, {"rows": "window"}, {"iterative": True}])
def test_a_token_with_nearly_all_the_weight_is_measured_rightly(
    weight: float, settings: dict[str, Any]
) -> None:
    """X is nearly its own value: by squares the distance would be all rounding, or none."""
    view = make_view(b=1, h=1, g=1, n=40, d=16, rows=1, parts=2, newcomers=6, capacity=40)
    assert view.queries is not None
    # All keys alike but one, whose logit is ahead by as much as gives it the weight.
    rise = math.log(weight / (1 - weight) * 39) / view.scaling
    query = torch.zeros(16)
    query[0] = 1.0
    keys = torch.zeros(1, 1, 40, 16)
    keys[0, 0, 11, 0] = rise
    values = view.values + 50.0
    view = with_parts(view, tuple((keys[:, :, i:j], values[:, :, i:j]) for i, j in ((0, 34), (34, 40))))
    view.queries = query.expand(1, 1, 1, 1, 16)
    alpha = attention(view, 0, 0, 0, 0, list(range(40)))
    # The logit of the one key is rounded to fp32.
    assert alpha[11] == pytest.approx(weight, rel=gamma(2, SINGLE) * rise)
    x = mix(view, 0, 0, alpha)
    want = {(0, 0, j): caote_error(view, 0, 0, alpha, x, j) for j in range(40)}
    slack = {(0, 0, j): caote_slack(view, alpha, x, j, 0, 0) for j in range(40)}
    # The token itself is measured by a difference, not by squares: from X, a sum over tokens.
    part = gamma(LAMBDA + math.sqrt(40), SINGLE) * spread(view) + gamma(LAMBDA, SINGLE) * spread(view)
    relative = score_bound(view).relative / (1 - weight)
    slack[0, 0, 11] = weight / (1 - weight) * part + relative * want[0, 0, 11]
    agree(CAOTE(TOVA(), **settings).score(view), want, slack)


def test_nothing_to_choose_from_makes_no_nan() -> None:
    for view in (make_view(n=8, recent=8 * 3, rows=1), make_view(n=8, empty=True, invalid=2, rows=1)):
        for policy in (CAOTE(TOVA()), FastCAOTE(KeyDiff()), CAOTE(TOVA(), rows="window")):
            assert not policy.score(view).isnan().any()
            assert not policy.head_scores(view).isnan().any()


def test_a_base_with_negative_scores_drops_its_lowest_first() -> None:
    view = make_view(n=16, recent=2)
    lowest = KeyDiff().score(view).masked_fill(view.protected, math.inf).argmin(-1)
    mine = CAOTE(KeyDiff()).score(view).masked_fill(view.protected, math.inf)
    assert torch.equal(mine.argmin(-1), lowest)
    assert (mine.amin(-1) == 0).all()


# ------------------------------------------------------------------ CAOTE, several at once


def greedy(
    view: View, b: int, h: int, scores: list[list[float]], over: str, fast: bool
) -> tuple[list[int], dict[int, float], dict[int, float], float]:
    """Drop one by one, each time from scratch: the order, the errors of those left and their bounds, and how
    near the nearest choice was, as a share of its bounds.
    """
    _, _, slots, open_ = next(x for x in loops(view) if x[:2] == (b, h))
    first = slots if over == "held" else open_
    start = [weights(s, first) for s in scores]
    gone: list[int] = []
    clear = Clear()

    def errors() -> tuple[dict[int, float], dict[int, float]]:
        out, slack = {}, {}
        for j in open_:
            if j in gone:
                continue
            each, bounds = [], []
            for alpha in start:
                left = {i: a for i, a in alpha.items() if i not in gone}
                total = sum(left.values())
                alpha_now = {i: a / total for i, a in left.items()}
                even = {i: 1 / len(left) for i in left}
                x = mix(view, b, h, even if fast else alpha_now)
                each.append(caote_error(view, b, h, alpha_now, x, j))
                # What is gone is subtracted from sums over all: a share of their size.
                bounds.append(caote_slack(view, alpha_now, x, j, b, h) / total)
            out[j], slack[j] = join(each, "rss"), join(bounds, "rss")
        return out, slack

    for _ in range(max(0, len(slots) - view.capacity)):
        now, slack = errors()
        if not now:
            break
        gone.append(min(now, key=lambda j: (now[j], int(view.positions[b, h, j]))))
        for j, x in now.items():
            if j != gone[-1]:
                clear.note(x - now[gone[-1]], slack[j] + slack[gone[-1]])
    return gone, *errors(), clear.least


@pytest.mark.parametrize("over", ["held", "evictable"])
@pytest.mark.parametrize("fast", [False, True])
@pytest.mark.parametrize("seed", range(3))
def test_iterative_drops_one_by_one(over: Any, fast: bool, seed: int) -> None:
    view = make_view(g=2, n=18, dv=3, invalid=4, sinks=1, recent=2, capacity=9, parts=2, seed=seed)
    scores = torch.rand(2, 2, 2, 18, generator=torch.Generator().manual_seed(seed))
    got = CAOTE(Given(scores), iterative=True, x_over=over, fast=fast).score(view)
    lengths = set()
    for b, h, _, open_ in loops(view):
        order, left, slack, clear = greedy(view, b, h, scores[b, h].double().tolist(), over, fast)
        assert clear > 1, "a choice is nearer than its rounding: take another seed"
        assert sorted(open_, key=lambda j, b=b, h=h: float(got[b, h, j]))[: len(order)] == order
        assert all(float(got[b, h, j]) < 0 for j in order)
        agree(got, *({(b, h, j): x for j, x in each.items()} for each in (left, slack)))
        lengths.add(len(order))
    assert len(lengths) > 1  # heads that drop different numbers


def test_sequential_drops_reach_the_output_of_the_joint_drop() -> None:
    """The errors of those left, which hang on X, are those around the output of what is left of the row."""
    view = make_view(b=1, h=1, g=1, n=12, rows=1, capacity=7)
    got = CAOTE(TOVA(), iterative=True).score(view)[0, 0]
    slots = list(range(12))
    alpha = attention(view, 0, 0, 0, 0, slots)
    dropped = [j for j in slots if got[j] < 0]
    assert len(dropped) == 5
    x = mix(view, 0, 0, alpha)
    mass = sum(alpha[j] for j in dropped)
    left = [j for j in slots if j not in dropped]
    now = attention(view, 0, 0, 0, 0, left)
    moved = mix(view, 0, 0, now) - x
    joint = torch.stack([alpha[j] * (x - value(view, 0, 0, j)) for j in dropped]).sum(0) / (1 - mass)
    most = float(view.values.double().abs().max()) / (1 - mass)
    assert_within(moved, joint, 2 * gamma(12 + 4 * FUNCTION, torch.float64) * most)
    want = {(0, 0, j): caote_error(view, 0, 0, now, x + joint, j) for j in left}
    slack = {(0, 0, j): caote_slack(view, now, x + joint, j, 0, 0) / (1 - mass) for j in left}
    agree(got[None, None], want, slack)


def test_iterative_is_the_plain_rule_while_at_most_one_must_go() -> None:
    view = make_view(n=16, rows=1, recent=2, capacity=15)
    plain, one = CAOTE(TOVA()).score(view), CAOTE(TOVA(), iterative=True).score(view)
    plain = plain.masked_fill(view.protected, math.inf)
    one = one.masked_fill(view.protected, math.inf)
    assert torch.equal(plain.argmin(-1), one.argmin(-1))
    room = replace(view, capacity=16)
    found, expected = (CAOTE(TOVA(), iterative=x).score(room) for x in (True, False))
    open_ = ~view.protected
    assert_within(found[open_], expected[open_], 2 * even_slack(room, expected)[open_])


def test_iterative_among_equals_drops_the_oldest_first() -> None:
    view = make_view(b=1, h=1, n=9, capacity=5, recent=1)
    view = with_parts(view, ((view.keys, torch.ones(1, 1, 9, 4)),))
    got = CAOTE(Given(torch.ones(1, 1, 2, 9)), iterative=True).score(view)[0, 0]
    age = view.positions[0, 0].argsort().tolist()
    assert sorted(range(9), key=lambda j: float(got[j]))[:4] == age[:4]
    assert got[age[4:]].tolist() == [0.0] * 5


def test_iterative_drops_even_what_should_never_go_when_it_must() -> None:
    scores = torch.tensor([[[[0.0, 0.0, 1.0]]]])
    view = make_view(b=1, h=1, g=1, n=3, newcomers=1, capacity=0)
    got = CAOTE(Given(scores), iterative=True).score(view)[0, 0]
    assert (got < 0).all()
    assert int(got.argmax()) == 2
    shut = make_view(b=1, h=1, g=1, n=3, newcomers=1, capacity=1, recent=9)
    assert not CAOTE(Given(scores), iterative=True).score(shut).isnan().any()


# ------------------------------------------------------------------ CAOTE over the rows of a window


@pytest.mark.parametrize("group", ["rss", "mean", "max"])
@pytest.mark.parametrize(("over", "fast"), [("auto", False), ("evictable", False), ("auto", True)])
def test_window_is_dropkv(group: Any, over: Any, fast: bool) -> None:
    view = make_view(g=2, n=15, rows=4, invalid=3, sinks=1, recent=4, parts=2, newcomers=5, seed=2)
    got = CAOTE(SnapKV(window=4), rows="window", group=group, x_over=over, fast=fast).score(view)
    want, slack = {}, {}
    for b, h, slots, open_ in loops(view):
        counted = slots if over == "auto" else open_
        mean = mix(view, b, h, {j: 1 / len(counted) for j in counted})
        squares = {(g, j): 0.0 for g in range(2) for j in open_}
        slacks = dict(squares)
        for g, r in product(range(2), range(4)):
            row = {j: a for j, a in attention(view, b, h, g, r, slots).items() if j in counted}
            total = sum(row.values())
            row = {j: a / total for j, a in row.items()}
            x = mean if fast else mix(view, b, h, row)
            for j in open_:
                a = row.get(j, 0.0)
                squares[g, j] += (a / (1 - a)) ** 2 * float((value(view, b, h, j) - x).square().sum())
                slacks[g, j] += caote_slack(view, row, x, j, b, h) ** 2  # of a root of a sum of squares
        for j in open_:
            want[b, h, j] = join([math.sqrt(squares[g, j]) for g in range(2)], group)
            slack[b, h, j] = join([math.sqrt(slacks[g, j]) for g in range(2)], group)
    agree(got, want, slack)


def test_a_window_of_one_query_is_caote() -> None:
    view = make_view(g=3, n=17, rows=1, invalid=3)
    a, b = CAOTE(TOVA()).score(view), CAOTE(TOVA(), rows="window").score(view)
    assert_within(a[there(view)], b[there(view)], 2 * even_slack(view, b)[there(view)])


def test_rows_without_a_query_weigh_nothing() -> None:
    view = make_view(n=12, rows=3)
    assert view.query_positions is not None
    assert view.queries is not None
    padded = replace(
        view,
        queries=torch.cat([torch.full_like(view.queries[:, :, :, :2], 7.0), view.queries], dim=3),
        query_positions=torch.cat([torch.full((2, 2), -1), view.query_positions], dim=1),
    )
    policy = CAOTE(SnapKV(window=5), rows="window")
    expected = policy.score(view)
    assert_within(policy.score(padded), expected, 2 * even_slack(view, expected))


@pytest.mark.parametrize(
    ("settings", "word"),
    [
        ({"rows": "window"}, "reads queries"),
        ({"rows": "last"}, "window"),
        ({"group": "sum"}, "rss"),
        ({"x_over": "all"}, "evictable"),
    ],
)
def test_caote_refuses_bad_settings(settings: dict[str, Any], word: str) -> None:
    with pytest.raises(PolicyError, match=word):
        CAOTE(KeyDiff(), **settings)


def test_caote_refuses_window_with_iterative() -> None:
    with pytest.raises(PolicyError, match="iterative"):
        CAOTE(TOVA(), rows="window", iterative=True)


# ------------------------------------------------------------------ CriticalKV


def projected(view: View, b: int, h: int, j: int) -> float:
    weight = view.output_weight
    assert weight is not None
    sums = [(value(view, b, h, j) @ weight[h, g].double()).abs().sum() for g in range(weight.shape[1])]
    return float(sum(sums)) / len(sums)


def with_state(view: View, policy: Policy) -> View:
    state = policy.token_state(view.keys, view.values, 2, view.output_weight)
    return replace(view, state=state)


def test_projection_is_the_group_mean_of_l1_norms(monkeypatch: pytest.MonkeyPatch) -> None:
    view = make_view(n=11, dv=5, hidden=9)
    policy, base = CriticalKV(KeyDiff()), KeyDiff()
    state = with_state(view, policy).state
    assert state is not None
    assert state.shape == (2, 2, 11, policy.state_width(2)) == (2, 2, 11, base.state_width(2) + 1)
    assert torch.equal(state[..., :-1], base.token_state(view.keys, view.values, 2, None))
    want = {(b, h, j): projected(view, b, h, j) for b, h, slots, _ in loops(view) for j in slots}
    # A product of 5 numbers (λ for random ones) whose sizes are summed over 9, and the mean of two heads.
    share = gamma(LAMBDA * 3 + 9 + 4, SINGLE)
    agree(state[..., -1], want, share)
    monkeypatch.setattr(criticalkv_module, "_BYTES", 1)  # one token at a time
    again = with_state(view, policy).state
    assert again is not None
    assert_within(state, again, 2 * share * again)


@pytest.mark.parametrize("share", [0.0, 0.3, 0.5, 1.0])
@pytest.mark.parametrize("low", [0.0, -0.5])
def test_criticalkv_is_its_formula(share: float, low: float) -> None:
    view = make_view(n=21, hidden=7, invalid=4, sinks=2, recent=2, capacity=12)
    scores = torch.rand(2, 2, 1, 21, generator=torch.Generator().manual_seed(1)) + low
    policy = CriticalKV(Given(scores), share=share, eps=0.01)
    view = with_state(view, policy)
    got = policy.score(view)
    for b, h, slots, open_ in loops(view):
        base = {j: float(scores[b, h, 0, j]) for j in slots}
        shut = len(slots) - len(open_)
        rest = sorted(open_, key=lambda j: -base[j])
        first, second = rest[: max(0, int(share * 12) - shut)], rest[max(0, int(share * 12) - shut) :]
        floor = min(0.0, *(base[j] for j in open_))
        want = {j: (base[j] - floor + 0.01) * projected(view, b, h, j) for j in second}
        error = gamma(LAMBDA * 3 + 7 + FUNCTION, SINGLE)
        agree(got, {(b, h, j): x for j, x in want.items()}, error)
        gaps = Clear()
        for low, high in pairwise(sorted(want.values())):
            gaps.note(high - low, 2 * error * high)
        assert gaps.least > 1, "two scores are nearer than their rounding: take another seed"
        ranked = sorted(open_, key=lambda j: -float(got[b, h, j]))
        assert ranked == first + sorted(second, key=lambda j: -want[j])
        assert all(math.isfinite(float(got[b, h, j])) for j in open_)


def test_criticalkv_keeps_the_base_state_in_front() -> None:
    view = make_view(n=13, rows=3, hidden=6)
    policy, base = CriticalKV(H2O()), H2O()
    assert policy.state_width(2) == base.state_width(2) + 1
    view = with_state(view, policy)
    assert view.state is not None
    norms = view.state[..., 1].clone()
    alone = base.observe(replace(view, state=view.state[..., :1].clone()))
    seen = policy.observe(view)
    assert torch.equal(seen[..., 0], alone[..., 0])  # the same operations
    assert torch.equal(seen[..., 1], norms)
    share_none = CriticalKV(H2O(), share=0.0).score(replace(view, state=seen))
    expected = (alone[..., 0].double() + 1e-4) * norms.double()
    assert_within(share_none, expected, gamma(FUNCTION, SINGLE) * expected)
    assert policy.accumulates == base.accumulates


@dataclass(frozen=True)
class Counting(Policy):
    """A base whose `observe` gives a new state and leaves the old one alone."""

    def state_width(self, group: int) -> int:
        return 2

    def observe(self, view: View) -> Tensor:
        assert view.state is not None
        return view.state + 1.0


def test_criticalkv_takes_a_state_that_the_base_made_anew() -> None:
    policy = CriticalKV(Counting())
    view = with_state(make_view(n=7, hidden=4), policy)
    assert view.state is not None
    norms = view.state[..., 2].clone()
    for call in (1.0, 2.0):
        state = policy.observe(view)
        assert (state[..., :2] == call).all()
        assert torch.equal(state[..., 2], norms)
        view = replace(view, state=state)


def test_criticalkv_needs_the_output_projection() -> None:
    view = make_view()
    assert CriticalKV(KeyDiff()).needs_output_weight
    with pytest.raises(PolicyError, match="output projection"):
        CriticalKV(KeyDiff()).token_state(view.keys, view.values, 2, None)
    with pytest.raises(PolicyError, match="state"):
        CriticalKV(KeyDiff()).score(view)


# ------------------------------------------------------------------ PyramidKV and Ada-KV


@given(
    budget=st.integers(1, 5000),
    layers=st.integers(1, 80),
    least=st.integers(0, 5000),
    beta=st.one_of(st.integers(1, 100), st.floats(1, 1000)),
)
def test_pyramid_budgets(budget: int, layers: int, least: int, beta: float) -> None:
    policy = PyramidKV(KeyDiff(), beta=beta)
    if budget < least:
        with pytest.raises(BudgetError):
            policy.layer_budgets(budget, layers, least)
        return
    slots = policy.layer_budgets(budget, layers, least)
    assert len(slots) == layers
    assert sum(slots) == layers * budget
    assert min(slots) >= least
    assert sorted(slots, reverse=True) == slots
    if layers > 1:
        free = budget - least
        high, low = 2 * free - free / beta, free / beta
        for i, n in enumerate(slots):
            exact = least + high - i * (high - low) / (layers - 1)
            assert abs(n - exact) < 1 + gamma(10, torch.float64) * exact


def test_pyramid_by_hand() -> None:
    # 100 free: 195, 131 2/3, 68 1/3 and 5, the one left over to the first layer
    assert PyramidKV(KeyDiff()).layer_budgets(136, 4, 36) == [232, 167, 104, 41]
    assert PyramidKV(KeyDiff(), beta=1).layer_budgets(136, 4, 36) == [136] * 4
    assert PyramidKV(KeyDiff()).layer_budgets(36, 3, 36) == [36] * 3
    assert PyramidKV(KeyDiff()).layer_budgets(50, 1, 36) == [50]


@pytest.mark.parametrize("beta", [0.5, 0, -1, math.inf, math.nan])
def test_pyramid_refuses_a_base_wider_than_the_top(beta: float) -> None:
    with pytest.raises(PolicyError, match="beta"):
        PyramidKV(KeyDiff(), beta=beta)


@pytest.mark.parametrize("cls", [AdaKV, PyramidKV])
def test_budget_wrappers_leave_the_score_alone(cls: type[Wrapper]) -> None:
    view, base = make_view(rows=1), TOVA(heads="each")
    policy = cls(TOVA())
    assert torch.equal(policy.score(view), base.score(view))
    assert torch.equal(policy.head_scores(view), base.head_scores(view))
    assert torch.equal(policy.ranking(view), base.ranking(view))


def test_adakv_shares() -> None:
    assert AdaKV(KeyDiff()).head_shares() == 0.2
    assert AdaKV(KeyDiff(), safeguard=0.7).head_shares() == 0.7
    assert PyramidKV(AdaKV(KeyDiff())).head_shares() == 0.2
    assert AdaKV(PyramidKV(KeyDiff())).layer_budgets(136, 4, 36) == [232, 167, 104, 41]
    for bad in (-0.1, 1.1, math.nan):
        with pytest.raises(PolicyError, match="safeguard"):
            AdaKV(KeyDiff(), safeguard=bad)


# ------------------------------------------------------------------ all wrappers

EVERY = [
    "caote+snapkv(window=4)",
    "caote+tova",
    "caote+keydiff",
    "caote+ahakv(window=4)",
    "caote(snapkv(window=4), rows='window')",
    "caote(tova, iterative=True)",
    "caote(keydiff, iterative=True, x_over='evictable', fast=True)",
    "fastcaote+h2o",
    "criticalkv+snapkv(window=4)",
    "criticalkv+h2o",
    "criticalkv+ahakv(window=4)",
    "pyramidkv+tova",
    "adakv+caote+snapkv(window=4)",
    "razor+snapkv(window=4)",
]


def prepared(text: str, **settings: Any) -> tuple[Policy, View]:
    policy = parse_policy(text)
    rows = policy.query_rows if policy.query_rows > 0 else 3
    view = make_view(n=20, rows=rows, invalid=5, sinks=2, recent=4, capacity=12, hidden=6, **settings)
    width = policy.state_width(2)
    return policy, view if not width else with_observed(view, policy)


def with_observed(view: View, policy: Policy) -> View:
    return replace(view, state=policy.observe(with_state(view, policy)))


@pytest.mark.parametrize("text", EVERY)
def test_what_stands_in_empty_slots_changes_nothing(text: str) -> None:
    policy, view = prepared(text)
    assert view.valid is not None
    assert not view.valid.all()
    open_ = there(view) & ~view.protected
    score = policy.score(view)
    assert score.dtype == torch.float32
    assert score.shape == view.positions.shape
    assert score[open_].isfinite().all()
    assert torch.equal(policy.score(spoil_holes(view))[open_], score[open_])


@pytest.mark.parametrize("text", EVERY)
def test_the_order_of_slots_means_nothing(text: str) -> None:
    policy, view = prepared(text, seed=4)
    moved, order = shuffle_slots(view)
    open_ = there(moved) & ~moved.protected
    expected = policy.score(view).gather(-1, order)
    assert_within(policy.score(moved)[open_], expected[open_], 2 * slack(policy, moved, expected)[open_])


@pytest.mark.parametrize("text", EVERY)
def test_parts_are_as_one_tensor(text: str) -> None:
    policy, view = prepared(text, parts=2)
    joined = replace(view, parts=((view.keys, view.values),))
    open_ = there(view) & ~view.protected
    expected = policy.score(view)
    assert_within(policy.score(joined)[open_], expected[open_], 2 * slack(policy, view, expected)[open_])


@pytest.mark.parametrize("text", EVERY)
def test_half_precision_caches_are_scored_in_full(text: str) -> None:
    policy, view = prepared(text, dtype=torch.bfloat16)
    wide = replace(
        view,
        parts=tuple((k.float(), v.float()) for k, v in view.parts),
        queries=None if view.queries is None else view.queries.float(),
    )
    open_ = there(view) & ~view.protected
    expected = policy.score(wide)
    assert_within(policy.score(view)[open_], expected[open_], 2 * slack(policy, wide, expected)[open_])


def test_wrappers_are_registered_and_say_what_they_are() -> None:
    known = {info.name: info for info in policies()}
    for name in ("caote", "fastcaote", "criticalkv", "pyramidkv", "adakv"):
        assert known[name].wrapper
        assert known[name].title
        assert known[name].summary
        assert known[name].paper.startswith("https://")
        with pytest.raises(PolicyError, match="base"):
            parse_policy(name)
    assert modicum.kv.policies.caote.CAOTE is CAOTE
    assert str(parse_policy("adakv+caote+snapkv")) == "adakv(caote(snapkv))"
    assert parse_policy("caote(tova, rows='window')") == CAOTE(TOVA(), rows="window")


@pytest.mark.parametrize(
    ("text", "word"),
    [
        ("caote(tova, iterative=no)", "iterative"),
        ("caote(tova, fast=1)", "fast"),
        ("criticalkv(tova, share=1.5)", "share"),
        ("criticalkv(tova, share=half)", "share"),
        ("criticalkv(tova, eps=-1)", "eps"),
        ("pyramidkv(tova, beta=True)", "beta"),
        ("adakv(tova, safeguard='0.2')", "safeguard"),
    ],
)
def test_settings_of_the_wrong_kind_are_refused_by_name(text: str, word: str) -> None:
    with pytest.raises(PolicyError, match=word):
        parse_policy(text)


@pytest.mark.parametrize("name", ["caote", "fastcaote", "criticalkv", "pyramidkv", "adakv"])
def test_wrappers_pass_on_what_the_base_needs(name: str) -> None:
    policy = parse_policy(f"{name}(snapkv(window=16))")
    assert isinstance(policy, Wrapper)
    assert (policy.query_rows, policy.window, policy.evicts) == (16, 16, True)
    assert parse_policy(f"{name}(tova)").base == TOVA(heads="each")  # type: ignore[attr-defined]
