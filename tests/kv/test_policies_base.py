"""Every base policy against its float64 reference, and the properties that all of them share."""

from __future__ import annotations

from dataclasses import FrozenInstanceError, dataclass, replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import modicum.kv.policies  # noqa: F401  # registers them
from modicum.errors import PolicyError
from modicum.kv.policies.ahakv import AhaKV
from modicum.kv.policies.compactor import Compactor
from modicum.kv.policies.full import Full
from modicum.kv.policies.h2o import H2O
from modicum.kv.policies.keydiff import KeyDiff
from modicum.kv.policies.knorm import Knorm
from modicum.kv.policies.learned import Learned
from modicum.kv.policies.obcache import OBCache
from modicum.kv.policies.random import Random
from modicum.kv.policies.replay import Replay
from modicum.kv.policies.snapkv import SnapKV
from modicum.kv.policies.streaming import StreamingLLM
from modicum.kv.policies.tova import TOVA
from modicum.kv.policies.triattention import TriAttention
from modicum.kv.policy import ALL, Policy
from modicum.kv.turning import Rotary
from modicum.kv.view import View
from tests.bounds import FUNCTION, assert_within, gamma, logit_bound, softmax_bound, solve_bound
from tests.kv.references import (
    REFERENCES,
    Head,
    compactor_parts,
    deviation,
    floored,
    reference,
    snapkv,
    triattention_parts,
)
from tests.kv.views import (
    ScoreBound,
    make_view,
    score_bound,
    shuffle_slots,
    spoil_holes,
    with_newcomer_scores,
    with_parts,
)

POLICIES: list[Policy] = [
    Full(),
    StreamingLLM(),
    Knorm(),
    Random(),
    Random(seed=2**32 - 1),
    KeyDiff(),
    KeyDiff(metric="l2"),
    KeyDiff(anchor_window=7),
    KeyDiff(metric="l2", anchor_window=7),
    TOVA(),
    TOVA(heads="each"),
    SnapKV(window=4, kernel=3),
    SnapKV(window=3, pooling="max", group="max"),
    SnapKV(window=2, over="max", group="max", floor=True),
    SnapKV(window=1, kernel=1, over="max"),
    AhaKV(window=4, kernel=3),
    AhaKV(window=3, group="max", min_gain=1.0),
    AhaKV(window=5, kernel=1, count="held"),
    H2O(),
    OBCache(window=4),
    OBCache(window=3, kernel=3, pooling="max", group="max"),
    Compactor(window=4),
    Compactor(window=3, block=2, kernel=1),
    Compactor(window=2, block=4, ridge=0.1, blending=0.5),
    TriAttention(window=4),
    TriAttention(window=1, group="mean"),
    Learned(),
    Replay(window=3),
    Replay(window=3, plus=True),
]

VIEWS: dict[str, dict[str, object]] = {
    "one part": {},
    "two parts": {"parts": 2, "newcomers": 5},
    "holes": {"invalid": 6, "parts": 2},
    "an empty head": {"invalid": 3, "empty": True},
    "one query head": {"g": 1, "h": 3, "b": 1},
    "soft-capped": {"softcap": 0.5, "g": 3},
    "wide values, protected": {"dv": 12, "sinks": 4, "recent": 3, "invalid": 2},
    "half precision": {"dtype": torch.bfloat16, "parts": 2},
    "few tokens": {"n": 3, "newcomers": 3},
    "one token": {"n": 1, "newcomers": 1},
}

every_policy = pytest.mark.parametrize("policy", POLICIES, ids=str)


def view_for(policy: Policy, **options: object) -> View:
    """A random view with the rows and the state that the policy asks for."""
    newcomers = int(options.setdefault("newcomers", 3))  # type: ignore[call-overload]
    rows = newcomers + policy.kept_queries if policy.query_rows == ALL else policy.query_rows
    view = make_view(  # type: ignore[arg-type]
        rows=rows,
        state=policy.state_width(int(options.get("g", 2))),  # type: ignore[call-overload]
        same_heads=str(policy) == "tova",
        **options,
    )
    if width := policy.tally_width(view.group, view.keys.shape[-1]):
        view = replace(view, tally=tally(view, width), rotary=rotary(view.group))
    if policy.needs_regression:
        view = with_newcomer_scores(view)
    return remembered(policy, view)


def rotary(group: int) -> Rotary:
    """That of a head of 8 dimensions, the last two of which stand still."""
    return Rotary("yarn", 100.0 ** (-torch.arange(3) / 3), 1.25, neighbours=group % 2 == 1)


def tally(view: View, width: int) -> Tensor:
    """Of five queries before those of the view: [B, H, width], see `TriAttention.tally_width`; or how many
    tokens were read twice, and the sum of their norms, see `Replay.tally_width`.
    """
    rng = torch.Generator().manual_seed(int(view.seen.sum()))
    b, h = view.positions.shape[:2]
    if width == 2:
        return 5 * torch.cat([torch.ones(b, h, 1), torch.rand(b, h, 1, generator=rng) + 0.5], -1).double()
    queries = torch.randn(b, h, view.group, 5, 2, (width - 1) // view.group // 3, generator=rng)
    parts = torch.cat([queries, queries.norm(dim=-2, keepdim=True)], dim=-2).double().sum(3)
    return torch.cat([torch.full((b, h, 1), 5.0), parts.flatten(2)], dim=-1)


def remembered(policy: Policy, view: View) -> View:
    """The view with a state that fits its tokens; what H2O has accumulated so far may be anything."""
    if view.state is None or policy.accumulates:
        return view
    state = policy.token_state(view.keys, view.values, view.group, view.output_weight)
    assert state.shape == view.state.shape
    return replace(view, state=state)


def scored(policy: Policy, view: View) -> Tensor:
    """What the engine does in a call: observe, then score."""
    return policy.score(observed(policy, view))


def observed(policy: Policy, view: View) -> View:
    """The view after `observe`; the one given stays as it is."""
    state, tally = (None if x is None else x.clone() for x in (view.state, view.tally))
    view = replace(view, state=state, tally=tally)
    return replace(view, state=policy.observe(view)) if policy.accumulates else view


def bound_for(policy: Policy, view: View) -> ScoreBound:
    """What the policy's score of this view is within."""
    if isinstance(policy, OBCache):
        return obcache_bound(view)
    if isinstance(policy, Compactor):
        return compactor_bound(policy, view)
    if isinstance(policy, TriAttention):
        return triattention_bound(view)
    return score_bound(view)


def obcache_bound(view: View) -> ScoreBound:
    """Σ a²‖(1 + z)v - zo‖² is a sum of three terms, which may cancel: an error relative to their sizes."""
    single, there = torch.float32, view.positions >= 0
    assert view.queries is not None
    z_error = logit_bound(single, view.queries, view.keys[there], view.scaling, view.softcap)
    weight = softmax_bound(view.positions.shape[2], single, z_error)
    z, longest = view.logits().double(), float(view.values.double()[there].norm(dim=-1).max())
    z = z.masked_fill(z == -torch.inf, 0.0).abs()
    size = ((1 + 2 * z) * longest).square()  # of each of the three terms, at most
    slope = 4 * (1 + 2 * z) * longest**2  # of their sum, by z and by o
    error = gamma(2 * view.values.shape[-1] + 8, single) * 3 * size + slope * (z_error + z * weight)
    chain = view.queries.shape[3] * view.queries.shape[2] + FUNCTION
    most = float((view.rows().double().square() * error).sum(3).max())
    return ScoreBound(2 * weight + gamma(chain, single), most)


def compactor_bound(policy: Compactor, view: View) -> ScoreBound:
    """Of z-scores: the error of what is standardised, over its standard deviation.

    With x off by at most e, its mean is off by e, (x - mean) by 2e and the deviation by 3e, and z, which is
    at most √n, by (2 + 3√n) e / deviation.
    """
    single, there = torch.float32, view.positions >= 0
    assert view.queries is not None
    logit = logit_bound(single, view.queries, view.keys[there], 1.0) if there.any() else 0.0
    count = max(view.newcomers, policy.window)
    chain = count * view.queries.shape[2] + view.values.shape[-1] + policy.kernel + 4 * FUNCTION
    share, worst = softmax_bound(count, single, logit) + gamma(chain, single), 0.0
    for row in range(view.positions.shape[0]):
        for head in range(view.positions.shape[1]):
            attention, leverage = compactor_parts(policy, Head(view, row, head))
            here = 0.0
            if len(attention) > 1:
                error = (share + gamma(2 * count + FUNCTION, single)) * max(attention.values())
                here += (2 + 3 * count**0.5) * error / deviation(attention)
            if len(leverage) > 1:  # at most 1, in fp64; the ridge bounds the condition of its system
                dims = view.keys.shape[-1]
                error = solve_bound(dims, torch.float64, dims / policy.ridge + 1)
                here += (2 + 3 * count**0.5) * error / deviation(leverage)
            worst = max(worst, here)
    return ScoreBound(gamma(4, single), worst + gamma(4, single) * count**0.5)


def triattention_bound(view: View) -> ScoreBound:
    """Of z-scores (see `compactor_bound`) of products of keys with vectors from mean queries."""
    single, n, d = torch.float32, view.positions.shape[2], view.keys.shape[-1]
    assert view.queries is not None
    assert view.tally is not None
    worst, sizes = 0.0, view.queries.double().norm(dim=-1).amax((2, 3))  # [B, H]
    for row in range(view.positions.shape[0]):
        for h in range(view.positions.shape[1]):
            head = Head(view, row, h)
            longest = max((float(view.keys[row, h, j].double().norm()) for j in head.slots), default=0.0)
            # The mean query is no longer than the longest; its second part in the score as long again.
            query = max(float(sizes[row, h]), float(view.tally[row, h, 1:].norm() / 5))
            error = gamma(2 * d + 4 * FUNCTION, single) * 2 * 1.25 * query * longest
            for raw in triattention_parts(head):
                if len(raw) > 1:
                    worst = max(worst, (2 + 3 * n**0.5) * error / deviation(raw))
    return ScoreBound(gamma(4, single), worst + gamma(n, single) * n**0.5)


def there(view: View) -> Tensor:
    return view.positions >= 0


@every_policy
@pytest.mark.parametrize("kind", VIEWS)
def test_score_matches_the_reference(policy: Policy, kind: str) -> None:
    view = view_for(policy, seed=len(kind), **VIEWS[kind])
    score, bound = scored(policy, view), bound_for(policy, view)
    assert score.shape == view.positions.shape
    assert score.dtype == torch.float32
    for row in range(score.shape[0]):
        for head in range(score.shape[1]):
            expected = reference(policy, view, row, head)
            assert set(expected) == set(there(view)[row, head].nonzero().flatten().tolist())
            for j, x in expected.items():
                assert abs(score[row, head, j].item() - x) <= bound.relative * abs(x) + bound.absolute, (
                    row,
                    head,
                    j,
                )


def test_the_views_of_these_tests_are_not_too_kind() -> None:
    views = {kind: make_view(rows=4, seed=len(kind), **options) for kind, options in VIEWS.items()}  # type: ignore[arg-type]
    assert len(views["two parts"].parts) == 2
    holes = views["holes"].valid
    assert holes is not None
    assert len(set(holes.sum(-1).flatten().tolist())) > 1, "heads should hold unequally many"
    assert not there(views["an empty head"])[0, 0].any()
    assert (views["few tokens"].query_positions == -1).any() or views["few tokens"].seen.min() > 3
    steps = views["one part"].positions.diff(dim=-1)
    assert (steps < 0).any(), "slots should not be in order"
    assert (steps > 1).any(), "positions should have gaps"


@every_policy
def test_int32_positions_serve_as_well(policy: Policy) -> None:
    view = view_for(policy, invalid=4, seed=1)
    narrow = replace(view, positions=view.positions.int())
    assert torch.equal(scored(policy, narrow)[there(view)], scored(policy, view)[there(view)])


@every_policy
@settings(max_examples=12, deadline=None, derandomize=True)
@given(
    seed=st.integers(0, 10**6),
    invalid=st.integers(1, 12),
    parts=st.integers(1, 2),
    empty=st.booleans(),
    g=st.integers(1, 3),
)
def test_holes_weigh_nothing(
    policy: Policy, seed: int, invalid: int, parts: int, empty: bool, g: int
) -> None:
    view = view_for(policy, invalid=invalid, parts=parts, seed=seed, empty=empty, g=g)
    here = there(view)
    assert torch.equal(scored(policy, spoil_holes(view))[here], scored(policy, view)[here])


@every_policy
@settings(max_examples=12, deadline=None, derandomize=True)
@given(
    seed=st.integers(0, 10**6),
    invalid=st.sampled_from([0, 4]),
    parts=st.integers(1, 2),
)
def test_slot_order_carries_no_meaning(policy: Policy, seed: int, invalid: int, parts: int) -> None:
    view = view_for(policy, invalid=invalid, parts=parts, seed=seed)
    view = observed(policy, view)
    moved, order = shuffle_slots(view, seed)
    here = there(moved)
    found, expected = policy.score(moved)[here], policy.score(view).gather(-1, order)[here]
    torch.testing.assert_close(found, expected, **bound_for(policy, view).both)


@every_policy
def test_a_row_is_itself(policy: Policy) -> None:
    view = view_for(policy, b=3, invalid=4, seed=5)

    def only(x: Tensor | None) -> Tensor | None:
        return None if x is None else x[1:2]

    alone = replace(
        view,
        parts=tuple((k[1:2], v[1:2]) for k, v in view.parts),
        **{
            name: only(getattr(view, name))
            for name in (
                *("positions", "valid", "protected", "seen"),
                *("queries", "query_positions", "state", "tally"),
                *("newcomer_scores", "newcomer_slots"),
            )
        },
    )
    here = there(alone)
    expected = scored(policy, view)[1:2][here]
    torch.testing.assert_close(scored(policy, alone)[here], expected, **bound_for(policy, view).both)


@every_policy
def test_ranking_rises_with_the_score(policy: Policy) -> None:
    view = view_for(policy, n=40, seed=3)
    view = observed(policy, view)
    score, ranking = policy.score(view), policy.ranking(view)
    order = score.argsort(-1)
    rising = ranking.gather(-1, order).diff(dim=-1)
    sorted_score = score.gather(-1, order)
    clear = sorted_score.diff(dim=-1) > 2 * bound_for(policy, view).of(sorted_score[..., 1:])
    assert (rising[clear] > 0).all()


@every_policy
@pytest.mark.parametrize("zero", ["keys", "values", "both"])
def test_zero_keys_and_values_score_finitely(policy: Policy, zero: str) -> None:
    view = view_for(policy, invalid=3, empty=True, seed=4)
    parts = tuple((k * 0 if zero != "values" else k, v * 0 if zero != "keys" else v) for k, v in view.parts)
    view = remembered(policy, with_parts(view, parts))
    assert scored(policy, view)[there(view)].isfinite().all()


@every_policy
def test_head_scores_join_to_the_score(policy: Policy) -> None:
    view = view_for(policy, invalid=3, seed=6)
    view = observed(policy, view)
    policy = policy.per_head()
    each, here = policy.head_scores(view), there(view)
    assert each.shape[:2] == view.positions.shape[:2]
    assert each.shape[2] in (1, view.group)
    assert each.shape[3] == view.positions.shape[2]
    how = getattr(policy, "group", "mean")
    joined = each.amax(2) if how == "max" else each.mean(2)
    if getattr(policy, "floor", False):
        return  # clamped query head by query head, so there is no such identity: the next test
    torch.testing.assert_close(joined[here], policy.score(view)[here], **bound_for(policy, view).both)


def test_floor_of_head_scores_is_each_query_head_s_own() -> None:
    policy = SnapKV(window=2, kernel=3, over="max", group="max", floor=True)
    view = view_for(policy, sinks=2, recent=2, invalid=3, seed=7)
    each, bound = policy.head_scores(view), score_bound(view)
    for row in range(2):
        for h in range(2):
            for g in range(2):
                assert view.queries is not None
                alone = replace(view, queries=view.queries[:, :, g : g + 1])
                head = Head(alone, row, h)
                expected = floored(policy, head, snapkv(policy.with_settings(floor=False), head))
                for j, x in expected.items():
                    assert abs(each[row, h, g, j].item() - x) <= bound.relative * abs(x) + bound.absolute


@pytest.mark.parametrize("parts", [1, 2])
def test_keydiff_remembers_the_norms_of_its_keys(parts: int) -> None:
    view = view_for(KeyDiff(), parts=parts, seed=2)
    assert view.state is not None
    norms = view.keys.double().norm(dim=-1)
    share = gamma(view.keys.shape[-1] / 2 + 2 * FUNCTION, torch.float32)
    assert_within(view.state[..., 0], 1 / norms, share / norms)
    forgetful = replace(view, state=None)
    torch.testing.assert_close(KeyDiff().score(view), KeyDiff().score(forgetful), **score_bound(view).both)
    assert KeyDiff(metric="l2").state_width(1) == KeyDiff(anchor_window=8).state_width(1) == 0


def test_every_base_policy_has_a_reference() -> None:
    assert {policy.name for policy in POLICIES} == set(REFERENCES)


@every_policy
def test_a_policy_says_what_it_is(policy: Policy) -> None:
    assert policy.title
    assert policy.summary.endswith(".")
    assert policy.paper == "—" or policy.paper.startswith("https://arxiv.org/abs/")
    with pytest.raises(FrozenInstanceError):
        policy.name = "other"  # type: ignore[misc]


def test_what_policies_ask_of_the_engine() -> None:
    asks = {
        str(p): (p.query_rows, p.window, p.evicts, p.state_width(4), p.accumulates)
        for p in (
            Full(),
            StreamingLLM(),
            Knorm(),
            Random(),
            TOVA(),
            SnapKV(),
            AhaKV(window=16),
            H2O(),
            OBCache(),
            Compactor(),
            TriAttention(),
            Learned(),
            Replay(),
        )
    }
    assert asks == {
        "full": (0, 0, False, 0, False),
        "streamingllm": (0, 0, True, 0, False),
        "knorm": (0, 0, True, 0, False),
        "random": (0, 0, True, 0, False),
        "tova": (1, 1, True, 0, False),
        "snapkv": (32, 32, True, 0, False),
        "ahakv(window=16)": (16, 16, True, 0, False),
        "h2o": (ALL, 0, True, 1, True),
        "obcache": (32, 32, True, 0, False),
        "compactor": (ALL, 32, True, 1, True),
        "triattention": (ALL, 128, True, 0, True),
        "learned": (0, 0, True, 1, True),
        "replay": (ALL, 32, True, 1, True),
    }
    assert (H2O().kept_queries, SnapKV(window=8).kept_queries, Compactor(window=8).kept_queries) == (0, 8, 8)
    assert TOVA().per_head() == TOVA(heads="each")
    assert SnapKV().per_head() == SnapKV()


@pytest.mark.parametrize(
    ("make", "complaint"),
    [
        (lambda: KeyDiff(metric="l1"), "metric is 'l1'; choose one of cosine, l2"),
        (lambda: KeyDiff(anchor_window=0), "anchor_window is 0"),
        (lambda: KeyDiff(anchor_window=4096.0), "anchor_window is 4096.0"),
        (lambda: Random(seed=-1), "seed is -1"),
        (lambda: Random(seed=2**32), "from 0 to 4294967295"),
        (lambda: Random(seed=True), "seed is True"),
        (lambda: TOVA(heads="all"), "choose one of layer, each"),
        (lambda: SnapKV(window=0), "window is 0"),
        (lambda: SnapKV(window="32"), "window is '32'"),
        (lambda: SnapKV(kernel=4), "kernel is 4; it must be odd, such as 5"),
        (lambda: SnapKV(pooling="mean"), "choose one of avg, max"),
        (lambda: SnapKV(group="sum"), "choose one of mean, max"),
        (lambda: SnapKV(over="mean"), "choose one of sum, max"),
        (lambda: SnapKV(floor=1), "floor is 1"),
        (lambda: AhaKV(window=-1), "window is -1"),
        (lambda: AhaKV(kernel=2), "must be odd"),
        (lambda: AhaKV(min_gain=-0.5), "min_gain is -0.5"),
        (lambda: AhaKV(min_gain=float("nan")), "min_gain is nan"),
        (lambda: AhaKV(min_gain="1"), "min_gain is '1'"),
        (lambda: AhaKV(count="all"), "choose one of seen, held"),
        (lambda: AhaKV(group="rss"), "choose one of mean, max"),
        (lambda: OBCache(window=0), "window is 0"),
        (lambda: OBCache(kernel=2), "must be odd"),
        (lambda: OBCache(pooling="sum"), "choose one of avg, max"),
        (lambda: OBCache(group="rss"), "choose one of mean, max"),
        (lambda: TriAttention(window=0), "window is 0"),
        (lambda: TriAttention(group="rss"), "choose one of max, mean"),
        (lambda: Compactor(block=0), "block is 0"),
        (lambda: Compactor(window=1), "window is 1; a block needs at least 2"),
        (lambda: Compactor(kernel=4), "must be odd"),
        (lambda: Compactor(ridge=0.0), "ridge is 0.0"),
        (lambda: Compactor(blending=1.5), "blending is 1.5; it must be a number from 0.0 to 1.0"),
    ],
)
def test_bad_settings_are_refused_in_words(make: object, complaint: str) -> None:
    with pytest.raises(PolicyError) as caught:
        make()  # type: ignore[operator]
    assert complaint in str(caught.value)


def test_rows_without_asking_for_them_are_refused() -> None:
    with pytest.raises(PolicyError, match="without asking"):
        SnapKV().score(make_view())
    with pytest.raises(PolicyError, match="no tally"):
        TriAttention().score(make_view())
    with pytest.raises(PolicyError, match="no state"):
        Compactor().score(make_view())
    with pytest.raises(PolicyError, match="no state"):
        H2O().score(make_view())


@dataclass(frozen=True)
class ValueNorm(Policy):
    """A user's own policy: one dataclass, one score."""

    power: float = 1.0

    def score(self, view: View) -> Tensor:
        return view.per_value(lambda v: v.norm(dim=-1) ** self.power)


def test_a_policy_of_one_s_own() -> None:
    policy = ValueNorm(power=2.0)
    view = make_view(parts=2, seed=8)
    score = policy.score(view)
    assert torch.equal(score, view.values.norm(dim=-1) ** 2)
    assert torch.equal(policy.head_scores(view), score.unsqueeze(2))
    assert torch.equal(policy.ranking(view), score)
    assert str(policy) == "ValueNorm(power=2.0)"
    assert (policy.query_rows, policy.window, policy.evicts, policy.observe(view)) == (0, 0, True, None)
    assert policy.with_settings(power=1.0) == ValueNorm()
    assert policy.layer_budgets(64, 3, 8) == [64, 64, 64]


def test_a_policy_without_a_score_says_so() -> None:
    @dataclass(frozen=True)
    class Empty(Policy):
        pass

    with pytest.raises(PolicyError, match="Empty has no score"):
        Empty().score(make_view())
