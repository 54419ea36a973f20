"""1-swap: each change is what it says, the error never rises, and at the end no swap helps."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from modicum.weights import swap
from modicum.weights.pattern import Blocks, Groups, Pattern, Rows, Whole
from modicum.weights.scores import wanda
from modicum.weights.statistics import Statistics
from modicum.weights.swap import Swap
from tests.bounds import Clear, gamma
from tests.weights.layers import assert_no_worse, layer, loss, loss_bound

SINGLE, DOUBLE = torch.float32, torch.float64
TOLERANCE = Swap().tolerance
"""A swap is taken only if it lowers the error by more than this share."""


def row_loss(w: Tensor, mask: Tensor, matrix: Tensor) -> float:
    return float(loss(w[None], torch.where(mask, w, 0.0)[None], matrix))


def unsure(w: Tensor, matrix: Tensor, dtype: torch.dtype = DOUBLE, operations: int = 0) -> float:
    """Error bound of any `row_loss` of this row of weights: that where everything is removed is the largest.

    dtype, operations: of the matrix' own numbers, where two matrices are compared.
    """
    most = float(loss_bound(w[None], torch.zeros_like(w)[None], matrix))
    return most / gamma(2 * len(w) + 2, DOUBLE) * (gamma(2 * len(w) + 2, DOUBLE) + gamma(operations, dtype))


def best_swap(
    w: Tensor, mask: Tensor, matrix: Tensor, pattern: Pattern, clear: Clear | None = None, error: float = 0.0
) -> tuple[float, int, int]:
    """By trying all: the lowest error after a swap, and which. `clear` notes the gap to the next."""
    found, every = (float("inf"), -1, -1), []
    for p, u in itertools.product(range(len(w)), repeat=2):
        if mask[p] or not mask[u] or (isinstance(pattern, Groups) and p // pattern.of != u // pattern.of):
            continue
        new = mask.clone()
        new[p], new[u] = True, False
        every.append(row_loss(w, new, matrix))
        found = min(found, (every[-1], p, u))
    if clear is not None:
        clear.note_best(every, 1.0, error)
    return found


def no_swap_helps(w: Tensor, mask: Tensor, matrix: Tensor, pattern: Pattern) -> bool:
    """But for swaps that lower the error by less than the tolerance, or than its rounding."""
    least = row_loss(w, mask, matrix) * (1 - TOLERANCE) - 2 * unsure(w, matrix)
    return best_swap(w, mask, matrix, pattern)[0] >= least


def by_loop(w: Tensor, mask: Tensor, matrix: Tensor, pattern: Pattern, inexact: int = 0) -> Tensor:
    """Swap by swap. Asserts that no decision is nearer than its rounding.

    inexact: fp32 operations in the matrix, where another one must lead to the same decisions.
    """
    out, clear = mask.clone(), Clear()
    for i in range(len(w)):
        # The engine carries error and gradient on from swap to swap.
        error = (2 + w.shape[1]) * unsure(w[i], matrix) + unsure(w[i], matrix, SINGLE, inexact)
        for _ in range(w.shape[1]):
            now = row_loss(w[i], out[i], matrix)
            then, p, u = best_swap(w[i], out[i], matrix, pattern, clear, error)
            clear.note(then - now * (1 - TOLERANCE), 2 * error)
            if not then - now < -TOLERANCE * now:
                break
            out[i, p], out[i, u] = True, False
    assert clear.least > 1, "a decision of the loop is nearer than its rounding: take another seed"
    return out


@pytest.mark.parametrize("pattern", [Rows(0.5), Rows(0.7), Groups(2, 4), Groups(1, 4)], ids=str)
@pytest.mark.parametrize("seed", range(4))
def test_masks_are_those_of_a_loop_and_no_swap_is_left(pattern: Pattern, seed: int) -> None:
    w, seen, _ = layer(6, 12, seed)
    mask = pattern.select(wanda(w, seen))
    found = swap.refine(Swap(), w, mask, seen, pattern)
    assert pattern.follows(found.mask)
    assert found.capped == 0
    assert torch.equal(found.mask, by_loop(w, mask, seen.matrix, pattern))
    assert all(no_swap_helps(w[i], found.mask[i], seen.matrix, pattern) for i in range(6))


@settings(max_examples=25)
@given(seed=st.integers(0, 300), swaps=st.integers(0, 6))
def test_the_error_never_rises(seed: int, swaps: int) -> None:
    w, seen, _ = layer(5, 16, seed)
    mask = Rows(0.6).select(wanda(w, seen))
    few, more = (swap.refine(Swap(max_swaps=n), w, mask, seen, Rows(0.6)) for n in (swaps, swaps + 1))
    assert_no_worse(w, *(torch.where(each.mask, w, 0.0) for each in (more, few)), seen.matrix)


def test_it_is_never_better_than_the_best_of_all_masks() -> None:
    w, seen, _ = layer(8, 8)
    found = swap.refine(Swap(), w, Rows(0.5).select(wanda(w, seen)), seen, Rows(0.5)).mask
    for i in range(8):
        every = []
        for kept in itertools.combinations(range(8), 4):
            mask = torch.zeros(8, dtype=torch.bool)
            mask[list(kept)] = True
            every.append(row_loss(w[i], mask, seen.matrix))
        assert row_loss(w[i], found[i], seen.matrix) >= min(every)  # among them this very one


def test_rows_that_keep_unequally_many_keep_as_many() -> None:
    w, seen, _ = layer(6, 12)
    w[0] *= 10
    pattern = Whole(0.5)
    mask = pattern.select(wanda(w, seen))
    assert len(set(mask.sum(1).tolist())) > 2
    found = swap.refine(Swap(), w, mask, seen, pattern)
    assert torch.equal(found.mask.sum(1), mask.sum(1))
    assert torch.equal(found.mask, by_loop(w, mask, seen.matrix, pattern))


def test_independent_inputs_leave_wandas_mask() -> None:
    seen = Statistics(8, gram=True)
    seen.add(torch.diag(torch.arange(1.0, 9)))
    w = torch.randn(5, 8, generator=torch.Generator().manual_seed(0))
    mask = Rows(0.5).select(wanda(w, seen))
    found = swap.refine(Swap(), w, mask, seen, Rows(0.5))
    assert found.swaps == 0
    assert torch.equal(found.mask, mask)


def test_equal_columns_are_not_swapped_for_ever() -> None:
    a = torch.randn(50, 4, generator=torch.Generator().manual_seed(0)).repeat(1, 2)
    seen = Statistics(8, gram=True)
    seen.add(a)
    w = torch.randn(5, 4, generator=torch.Generator().manual_seed(1)).repeat(1, 2)
    found = swap.refine(Swap(), w, Rows(0.5).select(wanda(w, seen)), seen, Rows(0.5))
    assert found.capped == 0


def test_order_of_columns_does_not_matter() -> None:
    w, seen, a = layer(6, 14, seed=3)
    order = torch.randperm(14, generator=torch.Generator().manual_seed(2))
    other = Statistics(14, gram=True)
    other.add(a[:, order])
    mask = Rows(0.5).select(wanda(w, seen))
    found = swap.refine(Swap(), w, mask, seen, Rows(0.5)).mask
    # The other Gram matrix is summed in another order, in fp32: products of 200 tokens in 4 parts, or in one.
    assert torch.equal(found, by_loop(w, mask, seen.matrix, Rows(0.5), inexact=2 * 202))
    assert torch.equal(
        swap.refine(Swap(), w[:, order], mask[:, order], other, Rows(0.5)).mask, found[:, order]
    )


def test_with_a_bias_that_makes_up_the_covariance_counts() -> None:
    w, seen, _ = layer(6, 10)
    mask = Rows(0.5).select(wanda(w, seen))
    covariance = seen.matrix - torch.outer(seen.mean, seen.mean)
    found = swap.refine(Swap(centred=True), w, mask, seen, Rows(0.5)).mask
    assert torch.equal(found, by_loop(w, mask, covariance, Rows(0.5)))


def test_little_memory_changes_nothing_and_a_shortlist_ends_where_no_swap_helps_either() -> None:
    w, seen, _ = layer(7, 40)
    mask = Rows(0.6).select(wanda(w, seen))
    whole = swap.refine(Swap(), w, mask, seen, Rows(0.6))
    few = swap.refine(Swap(work_bytes=1), w, mask, seen, Rows(0.6))
    assert torch.equal(few.mask, whole.mask)
    assert torch.equal(whole.mask, by_loop(w, mask, seen.matrix, Rows(0.6)))  # 32 are all of 24 and 16
    short = swap.refine(Swap(shortlist=3, work_bytes=4_000), w, mask, seen, Rows(0.6))
    assert short.capped == 0
    assert short.swaps > whole.swaps
    assert all(no_swap_helps(w[i], short.mask[i], seen.matrix, Rows(0.6)) for i in range(7))


@pytest.mark.parametrize("pattern", [Blocks(2, 3, 0.5), Blocks(1, 2, 0.4), Blocks(3, 1, 0.6)], ids=str)
def test_blocks_are_swapped_as_a_whole(pattern: Blocks) -> None:
    w, seen, _ = layer(6, 12)
    mask = pattern.select(wanda(w, seen).square())
    found = swap.refine(Swap(), w, mask, seen, pattern)
    assert pattern.follows(found.mask)
    before, after = (float(loss(w, torch.where(m, w, 0.0), seen.matrix).sum()) for m in (mask, found.mask))
    assert after <= before + 2 * sum(unsure(row, seen.matrix) for row in w)
    count = 12 // pattern.width
    for strip in range(6 // pattern.height):
        rows = slice(strip * pattern.height, (strip + 1) * pattern.height)
        now = float(loss(w[rows], torch.where(found.mask[rows], w[rows], 0.0), seen.matrix).sum())
        slack = 2 * sum(unsure(row, seen.matrix) for row in w[rows])
        for p, u in itertools.product(range(count), repeat=2):
            new = found.mask[rows].clone().view(pattern.height, count, pattern.width)
            if bool(new[0, p, 0]) or not bool(new[0, u, 0]):
                continue
            new[:, p], new[:, u] = True, False
            kept = torch.where(new.view(pattern.height, -1), w[rows], 0.0)
            assert float(loss(w[rows], kept, seen.matrix).sum()) >= now * (1 - TOLERANCE) - slack
