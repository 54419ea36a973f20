"""The rotation of slots in 4 bits, and that no registered policy notices one."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor

from modicum import BudgetCache, Policy, PolicyError, parse_policy
from modicum.kv.hadamard import block_size, rotated
from modicum.kv.policy import Wrapper
from modicum.kv.store import Store
from modicum.kv.view import View
from tests import zoo
from tests.bounds import assert_within, gamma
from tests.kv.cases import EVERY
from tests.kv.reference_methods import hadamard
from tests.kv.views import make_view, with_newcomer_scores


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


@pytest.mark.parametrize("dim", [1, 2, 3, 6, 16, 20, 64, 96, 128, 256])
def test_it_is_a_rotation_and_its_own_inverse(dim: int) -> None:
    x, y = normal(2, 5, dim), normal(2, 5, dim, seed=1)
    error = gamma(4 * dim, torch.float64)
    sizes = x.norm(dim=-1, keepdim=True)
    assert_within(rotated(rotated(x)), x, error * sizes)
    dots = (rotated(x) * rotated(y)).sum(-1)
    assert_within(dots, (x * y).sum(-1), error * sizes[..., 0] * y.norm(dim=-1))
    for row, turned in zip(x.flatten(0, 1), rotated(x).flatten(0, 1), strict=True):
        assert_within(turned, torch.from_numpy(hadamard(row.numpy())), error * float(row.norm()))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_sums_are_in_fp32(dtype: torch.dtype) -> None:
    x = normal(4, 64, dtype=dtype)
    exact = rotated(x.double())
    size = x.double().norm(dim=-1, keepdim=True)
    assert rotated(x).dtype == dtype
    assert_within(rotated(x), exact, gamma(70, torch.float32) * size + gamma(1, dtype) * exact.abs())


def test_a_single_large_number_is_spread_over_its_block() -> None:
    x = torch.zeros(1, 24)
    x[0, 9] = 100.0
    spread = rotated(x)[0]
    assert block_size(24) == 8
    assert torch.equal(spread.abs() > 0, (torch.arange(24) >= 8) & (torch.arange(24) < 16))
    assert_within(spread[8:16].abs(), torch.full((8,), 100 / math.sqrt(8)), 100 * gamma(4, torch.float32))


def orthogonal(dim: int, seed: int) -> Tensor:
    return torch.linalg.qr(normal(dim, dim, seed=seed)).Q


def turned(view: View, keys: Tensor, values: Tensor) -> View:
    """The view after its queries and keys, and its values, are rotated."""
    parts = tuple((k @ keys, v @ values) for k, v in view.parts)
    return replace(view, parts=parts, queries=None if view.queries is None else view.queries @ keys)


@pytest.mark.parametrize("expression", EVERY)
def test_registered_policies_notice_no_rotation_or_are_refused(expression: str) -> None:
    """Any rotation, not only Hadamard's: so scores hang on dot products, norms and distances only."""
    policy = parse_policy(expression)
    if "triattention" in expression:  # reads pairs of coordinates, which RoPE turns
        with pytest.raises(PolicyError, match=r"'int4'.*triattention.*choose store='int8'"):
            Store("int4").check_policy(policy)
        return
    assert policy.is_rotation_invariant
    rows = 17 if policy.query_rows < 0 else policy.query_rows
    keys, values = orthogonal(8, 1), orthogonal(8, 2)
    for seed in range(4):
        plain = make_view(
            rows=rows, parts=2, sinks=2, recent=3, hidden=12, capacity=9, seed=seed, dtype=torch.float64
        )
        scores = []
        for view in (plain, turned(plain, keys, values)):
            # Values meet the output projection rotated back: the engine hands them so (`Bank`).
            state = policy.token_state(view.keys, plain.values, view.group, plain.output_weight)
            view.state = state.clone() if state.shape[-1] else None
            if policy.needs_regression:
                view = with_newcomer_scores(view)
            if policy.accumulates:
                view.state = policy.observe(view)
            scores.append(policy.score(view).double())
        # Scores are in fp32: of differences of their sums, so a few hundred roundings of the largest.
        finite = scores[0].isfinite()
        assert torch.equal(finite, scores[1].isfinite())
        size = scores[0][finite & (scores[0].abs() < 1e29)].abs().max()
        first, second = (torch.where(finite, score, 0.0) for score in scores)
        late = first.abs() >= 1e29  # CriticalKV's first stage: ranks
        assert_within(second[late], first[late], gamma(4, torch.float32) * first[late].abs())
        assert_within(second[~late], first[~late], gamma(300, torch.float32) * size)


@dataclass(frozen=True)
class FirstChannel(Policy):
    """Reads a coordinate."""

    def score(self, view: View) -> Tensor:
        return view.keys[..., 0].float()


@dataclass(frozen=True)
class Around(Wrapper):
    """Says nothing of rotations, whatever its base says."""

    def score(self, view: View) -> Tensor:
        return self.base.score(view)


@pytest.mark.parametrize("store", ["k8v4", "int4"])
@pytest.mark.parametrize("policy", [FirstChannel(), Around(parse_policy("keydiff"))])
def test_a_policy_that_does_not_say_so_is_refused(policy: Policy, store: str) -> None:
    with pytest.raises(
        PolicyError, match=f"'{store}'.*{type(policy).__name__}.*choose store='int8'.*is_rotation"
    ):
        BudgetCache(zoo.shared("llama"), policy, 48, store=store)
    BudgetCache(zoo.shared("llama"), policy, 48, store="int8")


@pytest.mark.parametrize("name", ["model", "int8", "fp8"])
def test_8_bits_are_not_rotated(name: str) -> None:
    assert not Store(name).is_rotated
    Store(name).check_policy(FirstChannel())
