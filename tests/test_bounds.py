"""The error bounds hold, and are small enough for a test to fail."""

from __future__ import annotations

import copy
import math

import pytest
import torch

from tests import zoo
from tests.bounds import (
    Clear,
    assert_same_logits,
    assert_same_tokens,
    assert_within,
    dot_bound,
    gamma,
    logits_bound,
    softmax_bound,
    solve_bound,
    unit_roundoff,
)


def test_unit_roundoff_is_the_largest_error_of_a_rounding() -> None:
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        u = unit_roundoff(dtype)
        half_way = torch.tensor(1 + u, dtype=torch.float64)
        assert abs(float(half_way.to(dtype)) - float(half_way)) == u
    assert gamma(10, torch.float64) == pytest.approx(10 * 2**-53, rel=1e-12)


@pytest.mark.parametrize("random", [False, True])
@pytest.mark.parametrize("length", [1, 16, 1000])
def test_dot_products_are_within_their_bound(length: int, random: bool) -> None:
    generator = torch.Generator().manual_seed(length)
    a, b = torch.randn(2, 500, length, generator=generator)
    found = sum(
        (a[:, i] * b[:, i] for i in range(1, length)), a[:, 0] * b[:, 0]
    )  # the worst order: one by one
    exact = (a.double() * b.double()).sum(-1)
    bound = dot_bound(length, torch.float32, a.norm(dim=-1), b.norm(dim=-1), random)
    assert_within(found, exact, bound)
    # An accumulator of 8 bits would not pass, but where the worst case of a long sum allows as much.
    if random:
        rough = sum((a[:, i] * b[:, i]).bfloat16() for i in range(length)).double()  # type: ignore[union-attr]
        with pytest.raises(AssertionError, match="times its error bound"):
            assert_within(rough, exact, bound)


def test_softmax_weights_are_within_their_bound() -> None:
    logits = 20 * torch.randn(200, 60, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    rounded = logits.float()
    error = unit_roundoff(torch.float32) * float(logits.abs().max())
    exact = logits.softmax(-1)
    share = softmax_bound(60, torch.float32, error)
    assert share < 1e-4
    assert_within(rounded.softmax(-1), exact, share * exact + torch.finfo(torch.float32).tiny)


def test_solutions_are_within_their_bound() -> None:
    generator = torch.Generator().manual_seed(0)
    axes, _ = torch.linalg.qr(torch.randn(12, 12, generator=generator, dtype=torch.float64))
    matrix = (axes * torch.logspace(0, -3, 12, dtype=torch.float64)) @ axes.T
    right = torch.randn(12, 1, generator=generator, dtype=torch.float64)
    exact = torch.linalg.solve(matrix, right)
    factor = torch.linalg.cholesky(matrix.float())
    error = (torch.cholesky_solve(right.float(), factor).double() - exact).norm() / exact.norm()
    assert float(error) < solve_bound(12, torch.float32, 1e3) < 0.1


@pytest.mark.parametrize("name", ["llama", "gemma3"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_logits_are_within_their_bound_and_a_token_less_is_not(name: str, dtype: torch.dtype) -> None:
    model, ids = zoo.shared(name, dtype), zoo.tokens(2, 40)
    exact = copy.deepcopy(model).double()
    with torch.no_grad():
        expected, found = exact(ids).logits, model(ids).logits
        other = model(ids.clone().index_fill_(1, torch.tensor([37]), 1)).logits
    assert_same_logits(model, found, expected)
    with pytest.raises(AssertionError, match="logits is off by"):
        assert_same_logits(model, other, expected)
    assert float((found.double() - expected).abs().max()) > 0.001 * logits_bound(model, expected)


def test_tokens_may_part_only_where_two_are_as_good() -> None:
    model, ids = zoo.shared("llama"), zoo.tokens(1, 20)
    expected = model.generate(ids, max_new_tokens=3, do_sample=False)[:, 20:]
    assert_same_tokens(model, ids, expected, expected)
    with pytest.raises(AssertionError, match="parts at token 1"):
        assert_same_tokens(model, ids, expected + torch.tensor([[0, 1, 0]]), expected)


def test_clear_says_how_near_the_nearest_decision_was() -> None:
    clear = Clear()
    clear.note(1.0, 0.1)
    clear.note(-0.2, 0.1)
    assert clear.least == 2
    clear.note_best([3.0, 1.0, 1.5], 0.5)
    assert clear.least == pytest.approx(0.5 / (2 * 0.5 * 1.5))
    assert worst_of_infinities() == math.inf


def worst_of_infinities() -> float:
    from tests.bounds import worst

    assert worst(torch.tensor([math.inf]), torch.tensor([math.inf]), 0.0) == 0
    return worst(torch.tensor([math.nan]), torch.tensor([1.0]), 1.0)
