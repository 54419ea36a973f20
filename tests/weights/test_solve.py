"""Scores and SparseGPT's update against their definitions in float64."""

from __future__ import annotations

import itertools

import pytest
import torch

from modicum.errors import InputError
from modicum.weights.pattern import Groups, Rows
from modicum.weights.scores import magnitude, ria, saliency, score, wanda
from modicum.weights.solve import factor, least_squares, sweep
from modicum.weights.statistics import Statistics
from tests.bounds import FUNCTION, assert_within, gamma, solve_bound
from tests.weights.layers import assert_no_worse, layer, loss, loss_bound, solved_bound

SINGLE, DOUBLE = torch.float32, torch.float64


def test_wandas_square_is_the_error_of_that_weight_alone() -> None:
    w, seen, _ = layer(3, 8)
    for i, j in itertools.product(range(3), range(8)):
        sparse = w.clone()
        sparse[i, j] = 0
        alone = float(loss(w, sparse, seen.matrix)[i])
        # The score is √power (float64) rounded to fp32, times |w|, squared. Power and the matrix'
        # diagonal are two routes to one number, the latter by fp32 sums of 50 squares in each of 4 parts.
        assert float(wanda(w, seen)[i, j]) ** 2 == pytest.approx(alone, rel=gamma(52 + 2 * 3, SINGLE))


def test_ria_is_written_as_its_formula() -> None:
    w, seen, a = layer(4, 6)
    found = ria(w, seen)
    size = w.double().abs()
    for i, j in itertools.product(range(4), range(6)):
        share = size[i, j] / size[:, j].sum() + size[i, j] / size[i].sum()
        norm = float(a[:, j].square().mean()) ** 0.25
        # fp32: sums of at most 6 positive sizes, two divisions, their sum, a power, a product
        assert float(found[i, j]) == pytest.approx(float(share) * norm, rel=gamma(6 + 3 * FUNCTION, SINGLE))
    assert_within(ria(3 * w, seen), found, 2 * gamma(6 + 3 * FUNCTION, SINGLE) * found)
    w[:, 2] = 0
    assert ria(w, seen)[:, 2].tolist() == [0, 0, 0, 0]


def test_saliency_is_the_error_once_those_to_the_right_make_up() -> None:
    """[(H_{j:,j:})⁻¹]_00 is U_jj²."""
    w, seen, _ = layer(2, 6)
    h = seen.damped()
    # Of the inverse, its factor and the reference's inverse. A pivot is at least the inverse's norm over κ.
    condition = float(torch.linalg.cond(h))
    share = 3 * condition * solve_bound(6, DOUBLE, condition)
    for j in range(6):
        corner = torch.linalg.inv(h[j:, j:])[0, 0]
        assert float(factor(seen)[j, j] ** 2) == pytest.approx(float(corner), rel=share)
        assert float(saliency(w, seen)[0, j]) == pytest.approx(
            float(w[0, j].double() ** 2 / corner), rel=share + gamma(1, SINGLE)
        )


def test_where_no_token_came_by_size_decides() -> None:
    w = torch.randn(3, 4)
    for method in ("magnitude", "wanda", "ria", "sparsegpt"):
        assert torch.equal(score(method, w, Statistics(4, gram=True)), magnitude(w))


@pytest.mark.parametrize("block", [1, 4, 12])
def test_with_a_mask_given_the_width_of_blocks_changes_nothing(block: int) -> None:
    w, seen, _ = layer(5, 12)
    mask = Rows(0.5).select(wanda(w, seen))
    whole, kept = sweep(w, seen, Rows(0.5), mask, block=12)
    assert torch.equal(kept, mask)
    bound = 2 * solved_bound(w, seen.damped())
    assert_within(sweep(w, seen, Rows(0.5), mask, block=block)[0], whole, bound)
    assert bool((whole[~mask] == 0).all())


def test_the_sweep_against_a_plain_loop() -> None:
    w, seen, _ = layer(4, 10)
    mask = Rows(0.4).select(magnitude(w))
    found, _ = sweep(w, seen, Rows(0.4), mask)
    upper = factor(seen)
    lost, h = torch.zeros(4, dtype=torch.float64), seen.damped()
    for i in range(4):
        row = w[i].double().clone()
        for j in range(10):
            if mask[i, j]:
                continue
            r = row[j] / upper[j, j]
            lost[i] += r * r
            for k in range(j, 10):
                row[k] -= r * upper[j, k]
        row[~mask[i]] = 0
        assert_within(found[i], row, 2 * solved_bound(w, h)[i])
    # A pivot's relative error as above; the errors of rows moved by their bound: 2 |e| |H| δ.
    condition = float(torch.linalg.cond(h))
    moved = 2 * ((w.double() - found).abs() @ h.abs()).sum(1) * solved_bound(w, h)[:, 0]
    share = 3 * condition * solve_bound(10, DOUBLE, condition)
    assert_within(lost, loss(w, found, h), share * lost + moved + loss_bound(w, found, h))


def test_sweep_of_the_first_columns_has_a_closed_form_and_the_last_columns_move_nothing() -> None:
    w, seen, _ = layer(3, 6)
    bound = 2 * solved_bound(w, seen.damped())
    inverse = torch.linalg.inv(seen.damped())
    first = torch.ones(3, 6, dtype=torch.bool)
    first[:, 0] = False
    expected = w.double() - w[:, :1].double() / inverse[0, 0] * inverse[0]
    assert_within(sweep(w, seen, Rows(0.2), first)[0][:, 1:], expected[:, 1:], bound)
    last = torch.ones(3, 6, dtype=torch.bool)
    last[:, 4:] = False
    assert torch.equal(sweep(w, seen, Rows(0.2), last)[0][:, :4], w[:, :4].double())
    some = torch.ones(3, 6, dtype=torch.bool)
    some[:, :3] = False  # the first k: the optimum on the rest
    assert_within(sweep(w, seen, Rows(0.5), some)[0], least_squares(w, seen, some), bound)


@pytest.mark.parametrize("pattern", [Rows(0.6), Rows(0.5), Groups(2, 4), Groups(1, 4)])
@pytest.mark.parametrize("block", [8, 128])
def test_the_masks_it_chooses_are_of_the_pattern(pattern: Rows | Groups, block: int) -> None:
    w, seen, _ = layer(7, 40)
    found, mask = sweep(w, seen, pattern, block=block)
    assert pattern.follows(mask)
    assert bool((found[~mask] == 0).all())


def test_least_squares_has_no_gradient_on_its_support() -> None:
    w, seen, _ = layer(6, 16)
    mask = Rows(0.6).select(wanda(w, seen))
    found, h = least_squares(w, seen, mask), seen.damped()
    residual = (found - w.double()) @ h
    # ‖H δ‖ ≤ ‖H‖·‖δ‖, and the rounding of the product itself
    size = torch.linalg.matrix_norm(h, 2)
    bound = size * (
        solved_bound(w, h) + gamma(17, DOUBLE) * 4 * (found - w.double()).norm(dim=1, keepdim=True)
    )
    assert_within(residual[mask], torch.zeros_like(residual[mask]), bound.expand_as(residual)[mask])
    assert bool((found[~mask] == 0).all())
    # At the least point an error of the solution counts by its square.
    moved = size * solved_bound(w, h)[:, 0] ** 2
    assert_no_worse(w, found, sweep(w, seen, Rows(0.6), mask)[0], h, moved)


def test_dead_inputs_and_too_few_tokens_do_not_break_it() -> None:
    seen = Statistics(6, gram=True)
    a = torch.randn(3, 6, generator=torch.Generator().manual_seed(0))
    a[:, 2] = 0
    seen.add(a)
    w = torch.randn(4, 6, generator=torch.Generator().manual_seed(1))
    found, mask = sweep(w, seen, Rows(0.5))
    assert Rows(0.5).follows(mask)
    assert bool(found.isfinite().all())
    zero = Statistics(6, gram=True, name="up")
    zero.add(torch.zeros(3, 6))
    assert bool(sweep(w, zero, Rows(0.5))[0].isfinite().all())


def test_what_cannot_be_factored_is_told() -> None:
    seen = Statistics(3, gram=True, name="blocks.0.down")
    seen.add(torch.ones(2, 3))
    seen._products = -torch.eye(3, dtype=torch.float64)
    with pytest.raises(InputError, match=r"blocks.0.down: .*cannot be factored"):
        factor(seen)


def test_gram_matrix_is_symmetric_whatever_the_products_rounded_to() -> None:
    """Cholesky reads one triangle, an inverse both: they must be of the same matrix."""
    seen = Statistics(2, gram=True)
    seen.add(torch.ones(1, 2))
    seen._products = torch.tensor([[2.0, 1.0], [1.0 + 2**-23, 2.0]], dtype=torch.float64)
    assert torch.equal(seen.matrix, seen.matrix.T)
    upper = factor(seen)
    assert_within(upper.T @ upper, torch.linalg.inv(seen.damped()), 4 * solve_bound(2, DOUBLE, 4.0))
