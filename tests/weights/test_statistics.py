"""Statistics against numpy's plain definitions, whatever the split and order of the tokens."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from modicum.errors import InputError
from modicum.weights.statistics import Statistics
from tests.bounds import FUNCTION, assert_within, gamma
from tests.weights.layers import inputs

DOUBLE, SINGLE = torch.float64, torch.float32


@given(
    cuts=st.lists(st.integers(1, 99), max_size=5),
    order=st.randoms(use_true_random=False),
    merged=st.booleans(),
)
def test_any_split_and_order_gives_the_same(cuts: list[int], order: object, merged: bool) -> None:
    a = inputs(7, 100)
    edges = sorted({0, 100, *cuts})
    parts = [a[i:j] for i, j in itertools.pairwise(edges)]
    order.shuffle(parts)  # type: ignore[attr-defined]
    seen = Statistics(7, gram=True)
    for number, part in enumerate(parts):
        if merged and number % 2:
            other = Statistics(7, gram=True)
            other.add(part)
            seen.merge(other)
        else:
            seen.add(part)
    assert seen.tokens == 100
    # Each side is off by γ of the tokens and of some operations for each of at most 6 parts. What is squared
    # has no size beyond that of the inputs.
    share, power = 2 * gamma(100 + 6 * FUNCTION, DOUBLE), a.square().mean(0)
    assert_within(seen.mean, a.mean(0), share * a.abs().mean(0), "mean")
    assert_within(seen.variance, a.var(0, correction=0), 2 * share * power, "variance")
    assert_within(seen.power, power, 2 * share * power, "power")
    # The Gram matrix: inputs are rounded to fp32, whose products are summed.
    size = a.abs().T @ a.abs() / 100
    assert_within(seen.matrix, a.T @ a / 100, gamma(102, SINGLE) * size, "Gram matrix")
    assert torch.equal(seen.matrix, seen.matrix.T)
    assert bool((seen.variance_within <= seen.variance + 2 * share * power).all())


def test_within_is_the_variance_of_each_sequence_by_itself() -> None:
    a = inputs(5, 60)
    seen = Statistics(5)
    for part in a.split(20):
        seen.add(part)
    within = torch.stack([part.var(0, correction=0) for part in a.split(20)]).mean(0)
    bound = 4 * gamma(60 + 3 * FUNCTION, DOUBLE) * a.square().mean(0)
    assert_within(seen.variance_within, within, bound)
    between = torch.stack([part.mean(0) for part in a.split(20)]).var(0, correction=0)
    assert_within(seen.variance - seen.variance_within, between, 2 * bound)


def test_a_large_mean_does_not_cancel() -> None:
    a = (1e4 + torch.randn(1000, 3, generator=torch.Generator().manual_seed(0))).float()
    seen = Statistics(3)
    for part in a.split(100):
        seen.add(part)
    # Chan's rule: the mean is off by γ·1e4 in float64, and its square joins a variance of 1. The formula
    # E[x²] - E[x]² would be off by γ·1e8, a million times the bound below.
    exact = a.double().var(0, correction=0)
    share = 2 * gamma(1000 + 10 * FUNCTION, DOUBLE)
    assert_within(seen.variance, exact, share * exact + 2 * share * 1e4 * exact.sqrt())


def test_one_token_has_no_variance_and_none_nothing() -> None:
    seen = Statistics(3, gram=True)
    seen.add(torch.empty(0, 3))
    assert seen.tokens == 0
    seen.add(torch.ones(1, 3))
    assert seen.variance.tolist() == [0, 0, 0]


@pytest.mark.parametrize(
    ("given", "message"), [(torch.ones(2, 4), "must be"), (torch.tensor([[1.0, 2, float("nan")]]), "finite")]
)
def test_bad_inputs_are_told_by_the_layers_name(given: torch.Tensor, message: str) -> None:
    seen = Statistics(3, name="blocks.2.up")
    with pytest.raises(InputError, match=f"blocks.2.up.*{message}"):
        seen.add(given)
    assert seen.tokens == 0
    with pytest.raises(InputError, match="not gathered"):
        _ = seen.matrix
