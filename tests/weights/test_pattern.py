"""Patterns hold exactly, and choose what a brute force would."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from modicum.errors import InputError
from modicum.weights.pattern import Blocks, Groups, Rows, Whole, parse_pattern
from tests.bounds import gamma


@given(data=st.data())
def test_masks_are_of_their_pattern(data: st.DataObject) -> None:
    kind = data.draw(st.sampled_from(["rows", "groups", "whole", "blocks"]))
    sparsity = data.draw(st.floats(0.01, 0.85))
    rows, width = 6, 24
    pattern = {
        "rows": Rows(sparsity),
        "groups": Groups(*data.draw(st.sampled_from([(2, 4), (1, 4), (4, 8), (3, 4)]))),
        "whole": Whole(sparsity),
        "blocks": Blocks(*data.draw(st.sampled_from([(2, 3), (1, 4), (6, 2)])), sparsity),
    }[kind]
    pattern.check(rows, width, "a layer")
    score = torch.randint(
        0, 5, (rows, width), generator=torch.Generator().manual_seed(data.draw(st.integers(0, 9)))
    ).float()
    mask = pattern.select(score)
    assert pattern.follows(mask)
    assert not pattern.follows(~mask) or float(mask.float().mean()) == 0.5
    if kind == "whole":
        assert float(score[mask].min()) >= float(score[~mask].max()) if bool((~mask).any()) else True
    if kind == "rows":
        for row, keep in zip(score, mask, strict=True):
            assert float(row[keep].min()) >= float(row[~keep].max()) if (~keep).any() else True


def test_the_best_of_all_masks_of_a_row() -> None:
    score = torch.randn(3, 8, generator=torch.Generator().manual_seed(1))
    mask = Rows(0.5).select(score)
    for row, keep in zip(score, mask, strict=True):
        assert float(row[keep].sum()) == pytest.approx(
            max(float(row[list(c)].sum()) for c in itertools.combinations(range(8), 4)),
            abs=2 * gamma(4, torch.float32) * float(row.abs().sum()),
        )


def test_among_equals_the_lower_column_goes() -> None:
    assert Rows(0.5).select(torch.ones(1, 4)).tolist() == [[False, False, True, True]]
    assert Groups(1, 4).select(torch.ones(1, 4)).tolist() == [[False, False, False, True]]


def test_shares_are_counted_as_meant() -> None:
    assert Rows(0.29).removed(100) == 29
    assert Rows(0.6).removed(7) == 4


@pytest.mark.parametrize("sparsity", [0, 1, -0.1, 1.5, float("nan"), True, "0.5"])
def test_a_sparsity_outside_its_range(sparsity: object) -> None:
    with pytest.raises(InputError, match="sparsity is"):
        Rows(sparsity)  # type: ignore[arg-type]


def test_patterns_by_their_names() -> None:
    assert parse_pattern("2:4", None) == Groups(2, 4)
    assert parse_pattern("16x4", 0.5) == Blocks(16, 4, 0.5)
    for text, sparsity, message in (
        ("2:4", 0.7, "not 0.7"),
        ("16x4", None, "need a sparsity"),
        ("half", None, "not known"),
        ("4:4", None, "0 < N < M"),
    ):
        with pytest.raises(InputError, match=message):
            parse_pattern(text, sparsity)
    for pattern, rows, width, message in (
        (Groups(2, 4), 8, 10, "up: pattern 2:4 does not divide its 10"),
        (Blocks(3, 4, 0.5), 8, 8, "up: blocks of 3x4"),
        (Blocks(8, 8, 0.99), 8, 8, None),
    ):
        if message is None:
            pattern.check(rows, width, "up")
            continue
        with pytest.raises(InputError, match=message):
            pattern.check(rows, width, "up")
