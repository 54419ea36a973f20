"""Means and intervals."""

from __future__ import annotations

import math
import random
from dataclasses import replace

import pytest

from modicum.errors import InputError
from modicum.evaluation.summary import confidence, summarise, wilson
from tests.evaluation.test_store import CELL, row


def test_wilson_against_published_values() -> None:
    # Newcombe 1998, Statistics in Medicine 17, table I, method 3 (score without continuity correction).
    for hits, n, low, high in (
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ):
        assert wilson(hits / n, n) == pytest.approx((low, high), abs=5e-5)
    assert wilson(1.0, 20) == pytest.approx((1 - 0.1611, 1.0), abs=5e-5)


def test_wilson_solves_its_equation() -> None:
    for share, n in ((0.3, 10), (0.95, 40), (0.5, 1000)):
        for bound in wilson(share, n):
            assert abs(share - bound) == pytest.approx(
                1.959964 * math.sqrt(bound * (1 - bound) / n), rel=1e-5
            )


def test_zeros_and_ones_have_wilsons_interval_others_a_bootstrap() -> None:
    assert confidence([1.0, 0.0, 1, True]) == (*wilson(0.75, 4), "wilson")
    assert confidence([1.0]) == (*wilson(1.0, 1), "wilson")
    assert confidence([0.4]) == (0.4, 0.4, "none")
    assert confidence([1.0, math.inf, 2.0])[2] == "none"


def test_the_bootstrap_is_repeatable_and_near_the_normal_interval() -> None:
    rng = random.Random(1)
    scores = [rng.gauss(3.0, 1.0) for _ in range(200)]
    low, high, kind = confidence(scores)
    assert kind == "bootstrap"
    assert confidence(scores) == (low, high, kind)
    mean = sum(scores) / 200
    spread = 1.96 * math.sqrt(sum((s - mean) ** 2 for s in scores) / 199 / 200)
    assert (low, high) == pytest.approx((mean - spread, mean + spread), abs=0.25 * spread)


def test_a_cell_is_the_mean_of_its_rows() -> None:
    other = replace(CELL, budget="128")
    rows = [
        replace(row(0), score=1.0, held_bytes=10, held_tokens=(2, 4)),
        replace(row(0), cell=other, score=0.0),
        replace(row(1), score=0.0, held_bytes=30, held_tokens=(4, 4)),
    ]
    first, second = summarise(rows)
    assert first.key["budget"] == "64"
    assert second.key["budget"] == "128"
    assert (first.count, first.score, first.held_bytes, first.held_tokens) == (2, 0.5, 20, (3, 4))
    assert (first.low, first.high, first.interval) == (*wilson(0.5, 2), "wilson")
    assert second.count == 1
    assert first.to_dict()["policy"] == "keydiff"
    assert first.to_dict()["score"] == 0.5


def test_cells_may_be_taken_together() -> None:
    rows = [row(0), replace(row(0), cell=replace(CELL, task="u"), metric="other", score=1.0)]
    (both,) = summarise(rows, by=("policy", "budget"))
    assert both.key == {"policy": "keydiff", "budget": "64"}
    assert (both.count, both.metric, both.score) == (2, "mixed", 0.75)
    with pytest.raises(InputError, match="no field 'colour'"):
        summarise(rows, by=("colour",))
    with pytest.raises(InputError, match="losses and scores"):
        summarise([*rows, replace(row(5), metric="loss")], by=("policy",))
    assert summarise([]) == []
