"""Statistics against numpy's plain definitions, whatever the split and order of the tokens."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from modicum.errors import InputError
from modicum.weights.statistics import Statistics
from tests.weights.layers import inputs


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
    torch.testing.assert_close(seen.mean, a.mean(0), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(seen.variance, a.var(0, correction=0), rtol=1e-11, atol=1e-12)
    torch.testing.assert_close(seen.power, a.square().mean(0), rtol=1e-11, atol=1e-12)
    torch.testing.assert_close(seen.matrix, a.T @ a / 100, rtol=1e-5, atol=1e-5)
    assert bool((seen.variance_within <= seen.variance + 1e-12).all())


def test_within_is_the_variance_of_each_sequence_by_itself() -> None:
    a = inputs(5, 60)
    seen = Statistics(5)
    for part in a.split(20):
        seen.add(part)
    within = torch.stack([part.var(0, correction=0) for part in a.split(20)]).mean(0)
    torch.testing.assert_close(seen.variance_within, within, rtol=1e-10, atol=1e-12)
    between = torch.stack([part.mean(0) for part in a.split(20)]).var(0, correction=0)
    torch.testing.assert_close(seen.variance - seen.variance_within, between, rtol=1e-9, atol=1e-12)


def test_a_large_mean_does_not_cancel() -> None:
    a = (1e4 + torch.randn(1000, 3, generator=torch.Generator().manual_seed(0))).float()
    seen = Statistics(3)
    for part in a.split(100):
        seen.add(part)
    torch.testing.assert_close(seen.variance, a.double().var(0, correction=0), rtol=1e-6, atol=0)


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
