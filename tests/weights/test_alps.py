"""ALPS: the splits of a plain loop, an error no mask beats, and never worse than its start."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from modicum.weights.alps import alps
from modicum.weights.pattern import Blocks, Groups, Pattern, Rows
from modicum.weights.scores import score
from modicum.weights.solve import least_squares, sweep
from modicum.weights.statistics import Statistics
from tests.bounds import Clear, assert_within, gamma, solve_bound
from tests.weights.layers import layer, loss, loss_bound, solved_bound

SINGLE, DOUBLE = torch.float32, torch.float64


def by_loop(w: Tensor, h: Tensor, kept: int, clear: Clear) -> Tensor:
    """The mask of one row, by the paper's steps with inverses written out; [d] bool.

    Sizes are compared in fp32, as all scores are. Before that, each of the n steps so far has solved with a
    matrix whose condition is at most that of the first.
    """
    d = len(w)
    t = [float(h[j, j]) ** 0.5 for j in range(d)]
    unit = torch.tensor([[float(h[i, j]) / (t[i] * t[j]) for j in range(d)] for i in range(d)]).double()
    dense = torch.tensor([float(w[j]) * t[j] for j in range(d)]).double()

    step = solve_bound(d, DOUBLE, float(torch.linalg.cond(unit)))
    number = 0

    def top(x: Tensor) -> set[int]:
        sizes = x.abs().sort(descending=True).values
        bound = 2 * (gamma(1, SINGLE) * float(sizes[kept]) + number * step * float(x.norm()))
        clear.note(float(sizes[kept - 1] - sizes[kept]), bound)
        return set(sorted(range(d), key=lambda j: (float(x[j].abs().float()), j))[-kept:])

    def cut(x: Tensor, support: set[int]) -> Tensor:
        return torch.tensor([float(x[j]) if j in support else 0.0 for j in range(d)]).double()

    rho, raised = 0.1, False
    v = torch.zeros(d).double()
    support = top(dense)
    z, before = cut(dense, support), support
    for number in range(1, 301):
        x = torch.linalg.inv(unit + rho * torch.eye(d).double()) @ (unit @ dense - v + rho * z)
        near = x + v / rho
        support = top(near)
        z = cut(near, support)
        v = v + rho * (x - z)
        if number % 3:
            continue
        changed = len(support - before) / kept
        before = support
        if (number >= 31 and changed < 3e-4) or (changed == 0 and raised):
            break
        if changed > 0.005:
            rho, raised = rho * (1.3 if changed > 0.1 else 1.2), True
        elif raised:
            rho *= 1.1
        else:
            rho /= 5
            if changed:
                v, support = torch.zeros(d).double(), top(dense)
                z, before = cut(dense, support), support
    return torch.tensor([j in support for j in range(d)])


@pytest.mark.parametrize("seed", range(8))
def test_a_row_is_split_as_by_a_plain_loop(seed: int) -> None:
    w, seen, _ = layer(1, 14, seed)
    found, mask = alps(w, seen, Rows(0.6))
    clear = Clear()
    expected = by_loop(w[0], seen.damped(), 14 - Rows(0.6).removed(14), clear)[None]
    start = Rows(0.6).select(score("alps", w, seen))
    h = seen.damped()
    solved = [least_squares(w, seen, each) for each in (start, expected)]
    errors = [float(loss(w, each, h)) for each in solved]
    if not torch.equal(start, expected):
        clear.note(errors[1] - errors[0], 2 * max(float(loss_bound(w, each, h)) for each in solved))
    assert clear.least > 1, "a decision of the loop is nearer than its rounding: take another seed"
    assert torch.equal(mask, expected if errors[1] < errors[0] else start)
    assert_within(found, least_squares(w, seen, mask), 2 * solved_bound(w, h))


@pytest.mark.parametrize(
    "pattern", [Rows(0.5), Rows(0.75), Groups(2, 4), Groups(1, 4), Blocks(2, 4, 0.5)], ids=str
)
@settings(max_examples=10)
@given(seed=st.integers(0, 300))
def test_masks_are_of_the_pattern_and_no_worse_than_the_start(pattern: Pattern, seed: int) -> None:
    w, seen, _ = layer(6, 24, seed)
    found, mask = alps(w, seen, pattern)
    assert pattern.follows(mask)
    assert bool((found[~mask] == 0).all())
    h = seen.damped()
    began = score("alps", w, seen)
    start = pattern.select(began.square() if isinstance(pattern, Blocks) else began)
    began = least_squares(w, seen, start)
    slack = sum(float(loss_bound(w, each, h).sum()) for each in (found, began))
    assert float(loss(w, found, h).sum()) <= float(loss(w, began, h).sum()) + slack


def test_no_mask_of_all_is_beaten() -> None:
    w, seen, _ = layer(6, 8)
    found, _ = alps(w, seen, Rows(0.5))
    h = seen.damped()
    for i in range(6):
        every, row, bound = [], w[i : i + 1], 0.0
        for kept in itertools.combinations(range(8), 4):
            mask = torch.zeros(1, 8, dtype=torch.bool)
            mask[0, list(kept)] = True
            solved = least_squares(row, seen, mask)
            every.append(float(loss(row, solved, h)))
            bound = max(bound, 2 * float(loss_bound(row, solved, h)))
        assert min(every) - bound <= float(loss(row, found[i : i + 1], h))


def test_layers_of_many_weights_lose_less_than_by_sparsegpt() -> None:
    w, seen, _ = layer(32, 64, tokens=400)
    h = seen.damped()
    found, swept = alps(w, seen, Rows(0.7))[0], sweep(w, seen, Rows(0.7))[0]
    assert float(loss(w, found, h).sum()) < float(loss(w, swept, h).sum())


def test_independent_inputs_leave_the_kept_weights_and_wandas_mask() -> None:
    seen = Statistics(8, gram=True)
    seen.add(torch.diag(torch.arange(1.0, 9)))
    w = torch.randn(5, 8, generator=torch.Generator().manual_seed(0))
    found, mask = alps(w, seen, Rows(0.5))
    assert torch.equal(mask, Rows(0.5).select(score("alps", w, seen)))
    assert_within(found[mask], w.double()[mask], solved_bound(w, seen.damped()).expand_as(w)[mask])


def test_dead_inputs_do_not_break_it() -> None:
    zero = Statistics(6, gram=True)
    zero.add(torch.zeros(3, 6))
    w = torch.randn(4, 6, generator=torch.Generator().manual_seed(1))
    found, mask = alps(w, zero, Rows(0.5))
    assert Rows(0.5).follows(mask)
    assert bool(found.isfinite().all())
