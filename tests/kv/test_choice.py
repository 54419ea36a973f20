"""Choosing from scores against sorting in plain Python, with as many ties as there can be."""

from __future__ import annotations

import math

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from modicum.kv.choice import best, compete, worst

MANY = settings(max_examples=200, derandomize=True, deadline=None, database=None)
SCORES = st.sampled_from([-2.0, -0.5, 0.0, -0.0, 0.5, 1.0, 1e30, math.inf])


@st.composite
def heads(draw: st.DrawFn, rows: int = 1, count: int = 1) -> tuple[Tensor, Tensor]:
    """Scores and positions [B, H, N]: distinct positions in no order, -inf and -1 where there is no token."""
    n = draw(st.integers(1, 9))
    score, position = torch.empty(rows, count, n), torch.empty(rows, count, n, dtype=torch.int32)
    for row in range(rows):
        for head in range(count):
            places = draw(st.permutations(range(2 * n)))[:n]
            for i, at in enumerate(places):
                there = draw(st.integers(0, 5)) > 0
                score[row, head, i] = draw(SCORES) if there else -math.inf
                position[row, head, i] = at if there else -1
    return score, position


def order(score: Tensor, position: Tensor) -> list[int]:
    """Slots of one head from the best to the worst: higher scores first, of equals the newer."""
    return sorted(range(len(score)), key=lambda i: (float(score[i]), int(position[i])), reverse=True)


@given(rows=st.integers(1, 2), count=st.integers(1, 2), data=st.data())
@MANY
def test_best_keeps_the_highest_and_of_equals_the_newest(rows: int, count: int, data: st.DataObject) -> None:
    score, position = data.draw(heads(rows, count))
    n = score.shape[-1]
    each = data.draw(st.sampled_from([1, count]))  # one number for all heads of a row, or one for each
    numbers = torch.tensor([[data.draw(st.integers(0, n)) for _ in range(each)] for _ in range(rows)])
    keep = best(score, position, numbers)
    for row in range(rows):
        for head in range(count):
            number = int(numbers[row, head % each])
            wanted = set(order(score[row, head], position[row, head])[:number])
            found = {i for i in range(n) if keep[row, head, i]}
            there = {i for i in range(n) if position[row, head, i] >= 0}
            assert len(found) == number
            # Which empty place is "kept" beyond the tokens there are does not matter.
            assert found & there == wanted & there


@given(table=heads(2, 2))
@MANY
def test_worst_is_the_lowest_and_of_equals_the_oldest(table: tuple[Tensor, Tensor]) -> None:
    score, position = table
    n = score.shape[-1]
    # One goes from a head that is full: no place is empty there.
    position = torch.where(position < 0, torch.arange(100, 100 + n), position).int()
    score = score.nan_to_num(neginf=-3.0, posinf=math.inf)
    victim = worst(score, position)
    for row in range(2):
        for head in range(2):
            assert int(victim[row, head]) == order(score[row, head], position[row, head])[-1]
    keep = best(score, position, torch.tensor([[n - 1]] * 2))
    assert torch.equal(victim, (~keep).int().argmax(-1))


@given(data=st.data())
@MANY
def test_heads_compete_for_what_none_of_them_is_sure_of(data: st.DataObject) -> None:
    number = data.draw(st.integers(1, 4))
    tables = [data.draw(heads()) for _ in range(number)]
    scores, positions = [s[0, 0] for s, _ in tables], [p[0, 0] for _, p in tables]
    sure = data.draw(st.integers(0, 4))
    there = [[i for i in range(len(s)) if s[i] > -math.inf] for s in scores]
    certain = []
    for s, p, slots in zip(scores, positions, there, strict=True):
        first = [i for i in order(s, p) if i in slots][:sure]
        certain.append({*first, *(i for i in slots if s[i] == math.inf)})
    total = data.draw(st.integers(sum(map(len, certain)), sum(map(len, scores)) + 3))
    keeps = compete(scores, positions, total, sure)
    found = [{i for i in range(len(k)) if k[i]} for k in keeps]
    assert [len(k) for k in keeps] == [len(s) for s in scores]
    assert sum(map(len, found)) == min(total, sum(map(len, there)))
    free: list[tuple[float, int]] = []
    for s, p, slots, certainly, stays in zip(scores, positions, there, certain, found, strict=True):
        assert certainly <= stays <= set(slots)
        free += [(float(s[i]), int(p[i])) for i in slots if i not in certainly]
    left = min(total, sum(map(len, there))) - sum(map(len, certain))
    won = [
        (float(s[i]), int(p[i]))
        for s, p, certainly, stays in zip(scores, positions, certain, found, strict=True)
        for i in stays - certainly
    ]
    assert sorted(won) == sorted(free, reverse=True)[:left][::-1]
