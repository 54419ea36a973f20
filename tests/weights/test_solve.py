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
from tests.weights.layers import layer, loss


def test_wandas_square_is_the_error_of_that_weight_alone() -> None:
    w, seen, _ = layer(3, 8)
    for i, j in itertools.product(range(3), range(8)):
        sparse = w.clone()
        sparse[i, j] = 0
        alone = float(loss(w, sparse, seen.matrix)[i])
        assert float(wanda(w, seen)[i, j]) ** 2 == pytest.approx(alone, rel=1e-4)


def test_ria_is_written_as_its_formula() -> None:
    w, seen, a = layer(4, 6)
    found = ria(w, seen)
    size = w.double().abs()
    for i, j in itertools.product(range(4), range(6)):
        share = size[i, j] / size[:, j].sum() + size[i, j] / size[i].sum()
        norm = float(a[:, j].square().mean()) ** 0.25
        assert float(found[i, j]) == pytest.approx(float(share) * norm, rel=1e-5)
    torch.testing.assert_close(ria(3 * w, seen), found)
    w[:, 2] = 0
    assert ria(w, seen)[:, 2].tolist() == [0, 0, 0, 0]


def test_saliency_is_the_error_once_those_to_the_right_make_up() -> None:
    """[(H_{j:,j:})⁻¹]_00 is U_jj²."""
    w, seen, _ = layer(2, 6)
    h = seen.damped()
    for j in range(6):
        corner = torch.linalg.inv(h[j:, j:])[0, 0]
        assert float(factor(seen)[j, j] ** 2) == pytest.approx(float(corner), rel=1e-6)
        assert float(saliency(w, seen)[0, j]) == pytest.approx(
            float(w[0, j].double() ** 2 / corner), rel=1e-4
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
    torch.testing.assert_close(sweep(w, seen, Rows(0.5), mask, block=block)[0], whole)
    assert bool((whole[~mask] == 0).all())


def test_the_sweep_against_a_plain_loop() -> None:
    w, seen, _ = layer(4, 10)
    mask = Rows(0.4).select(magnitude(w))
    found, _ = sweep(w, seen, Rows(0.4), mask)
    upper = factor(seen)
    lost = torch.zeros(4, dtype=torch.float64)
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
        torch.testing.assert_close(found[i], row)
    torch.testing.assert_close(lost, loss(w, found, seen.damped()), rtol=1e-6, atol=1e-9)


def test_the_first_column_alone_has_a_closed_form_and_the_last_ones_move_nothing() -> None:
    w, seen, _ = layer(3, 6)
    inverse = torch.linalg.inv(seen.damped())
    first = torch.ones(3, 6, dtype=torch.bool)
    first[:, 0] = False
    expected = w.double() - w[:, :1].double() / inverse[0, 0] * inverse[0]
    torch.testing.assert_close(sweep(w, seen, Rows(0.2), first)[0][:, 1:], expected[:, 1:])
    last = torch.ones(3, 6, dtype=torch.bool)
    last[:, 4:] = False
    torch.testing.assert_close(sweep(w, seen, Rows(0.2), last)[0][:, :4], w[:, :4].double())
    some = torch.ones(3, 6, dtype=torch.bool)
    some[:, :3] = False  # the first k: the optimum on the rest
    torch.testing.assert_close(sweep(w, seen, Rows(0.5), some)[0], least_squares(w, seen, some))


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
    assert float(residual[mask].abs().max()) < 1e-9 * float((w.double() @ h).abs().max())
    assert bool((found[~mask] == 0).all())
    assert bool((loss(w, found, h) <= loss(w, sweep(w, seen, Rows(0.6), mask)[0], h) * (1 + 1e-9)).all())


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
