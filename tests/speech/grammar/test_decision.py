"""Decisions, thresholds and rates beside plain counts."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from modicum.errors import InputError
from modicum.speech.grammar import Decisions, LabelledScores, ScoreTable, grammar_rates, rates, threshold_for
from modicum.speech.grammar.decision import needed_recordings

numbers = st.lists(st.integers(-9, 9).map(float), min_size=10, max_size=60)


@given(numbers, st.sampled_from([0.0, 0.1, 0.25, 0.5, 0.99]))
def test_a_threshold_is_the_lowest_that_keeps_the_rate(confidence: list[float], rate: float) -> None:
    found = threshold_for(np.array(confidence), rate)

    def alarms(threshold: float) -> int:
        return sum(one > threshold for one in confidence)

    assert alarms(found) <= rate * len(confidence) + 1e-9
    lower = [one for one in confidence if one < found]
    assert not lower or alarms(max(lower)) > rate * len(confidence)


def test_too_little_other_speech_says_how_much_is_needed() -> None:
    with pytest.raises(InputError, match=r"0\.01 needs 100 recordings .* there are 99: give more"):
        threshold_for(np.zeros(99), 0.01)
    assert threshold_for(np.zeros(100), 0.01) == 0
    assert [needed_recordings(rate) for rate in (0.0, 0.003, 0.01, 0.1, 0.3)] == [1, 334, 100, 10, 4]
    with pytest.raises(InputError, match="false-alarm rate is 1"):
        threshold_for(np.zeros(9), 1.0)


def test_rates_are_counts() -> None:
    table = ScoreTable(
        np.array([[-1, -2], [-2, -1], [-5, -6], [-3, -1]], np.float32), np.zeros(4, np.float32)
    )
    decisions = Decisions.of(table, [0, 1])
    assert decisions.command.tolist() == [0, 1, 0, 1]
    assert decisions.confidence.tolist() == [-1, -1, -5, -1]
    assert decisions.accepted(-1.5).tolist() == [0, 1, -1, 1]
    assert decisions.accepted(-1.0).tolist() == [-1] * 4  # the threshold itself is not enough
    found = rates(decisions, [0, 0, 0, 1], decisions, -1.5)
    assert (found.missed.count, found.misclassified.count, found.false_alarms.count) == (1, 1, 3)
    assert (found.missed.value, found.false_alarms.value, found.wrong) == (0.25, 0.75, 0.5)
    assert found.missed.low <= 0.25 <= found.missed.high


def test_equal_false_alarms_and_curves_are_of_the_recordings_given() -> None:
    chance = np.random.default_rng(0)
    table = ScoreTable(chance.normal(0, 1, (40, 3)).astype(np.float32), np.zeros(40, np.float32))
    others = ScoreTable(chance.normal(-1, 1, (50, 3)).astype(np.float32), np.zeros(50, np.float32))
    scores = LabelledScores(table, np.arange(40) % 3, others)
    found = grammar_rates("g", scores, [0, 1, 2], 0.5, 0.1)
    assert found.equal is not None
    assert found.equal.false_alarms.count == 5
    alarms = [point.false_alarms for point in found.curve]
    missed = [point.missed for point in found.curve]
    assert alarms == sorted(alarms)
    assert missed == sorted(missed, reverse=True)
    assert alarms[0] == 0
    assert grammar_rates("g", scores, [0, 1, 2], 0.5, 0.001).equal is None  # 50 are too few
    assert grammar_rates("g", scores.rows(np.arange(9), np.arange(20)), [0, 1, 2], 0.5, 0.1).size == 3


def test_bad_sizes_are_named() -> None:
    table = ScoreTable(np.zeros((2, 2), np.float32), np.zeros(2, np.float32))
    with pytest.raises(InputError, match="2 expressions and 1 commands"):
        Decisions.of(table, [0])
    decisions = Decisions.of(table, [0, 1])
    with pytest.raises(InputError, match="3 labels for 2"):
        rates(decisions, [0, 0, 0], decisions, 0.0)
    with pytest.raises(InputError, match="commands and of other speech"):
        rates(decisions, [0, 0], Decisions.of(table.rows([]), [0, 1]), 0.0)
