"""The objective beside its definition in plain loops, and the searches on it."""

from __future__ import annotations

import random
from itertools import combinations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from modicum.errors import InputError
from modicum.search import cross_entropy_search, exhaustive_search, greedy_search, refined_search, value_of
from modicum.speech.grammar import GrammarObjective, ObjectiveSettings, ScoreTable
from tests.bounds import exactly


def made(
    seed: int, num_candidates: int, settings: ObjectiveSettings, num_commands: int = 3
) -> GrammarObjective:
    """Scores are small whole numbers, so that many are equal; some expressions cannot be scored at all."""
    chance = np.random.default_rng(seed)
    owners = [*range(num_commands), *chance.integers(0, num_commands, num_candidates).tolist()]

    def table(rows: int) -> ScoreTable:
        scores = chance.integers(-6, 3, (rows, len(owners))).astype(np.float32)
        scores[chance.random(scores.shape) < 0.1] = -np.inf
        return ScoreTable(scores, chance.integers(0, 3, rows).astype(np.float32))

    labels = chance.integers(0, num_commands, 25)
    return GrammarObjective(table(25), labels, table(20), owners, num_commands, settings)


def plainly(objective: GrammarObjective, chosen: frozenset[int]) -> float:
    """By the definition."""
    settings, size = objective.settings, objective.num_original
    columns = [*range(size), *sorted(size + item for item in chosen)]

    def decide(table: ScoreTable, row: int) -> tuple[int, float]:
        best = columns[0]
        for column in columns:
            if table.scores[row][column] > table.scores[row][best]:
                best = column
        return best, float(table.scores[row][best] - table.reference[row])

    others = [decide(objective.others, row)[1] for row in range(len(objective.others))]
    threshold = settings.threshold
    if threshold is None:
        allowed = [t for t in others if sum(c > t for c in others) <= settings.ceiling * len(others)]
        threshold = min(allowed)
    missed = wrong = 0
    for row, label in enumerate(objective.labels):
        column, confidence = decide(objective.commands, row)
        if confidence <= threshold:
            missed += 1
        elif objective.owners[column] != label:
            wrong += 1
    alarms = sum(confidence > threshold for confidence in others) / len(others)
    weights = (settings.missed, settings.misclassified, settings.false_alarms)
    if alarms > settings.ceiling:
        return -sum(weights) - 1 - alarms
    n = len(objective.labels)
    return -(weights[0] * missed / n + weights[1] * wrong / n + weights[2] * alarms)


SETTINGS = [
    ObjectiveSettings(ceiling=0.25, threshold=-2.0),
    ObjectiveSettings(ceiling=0.1, threshold=None),
    ObjectiveSettings(2.0, 0.5, 3.0, ceiling=0.3, threshold=-3.0),
]


@pytest.mark.parametrize("settings", SETTINGS)
@given(seed=st.integers(0, 10**6))
def test_values_after_any_additions_and_removals_are_those_of_the_definition(
    settings: ObjectiveSettings, seed: int
) -> None:
    objective = made(seed, 8, settings)
    evaluation = objective.evaluation()
    chance = random.Random(seed)
    present: set[int] = set()
    assert evaluation.value == exactly(plainly(objective, frozenset()))
    for _ in range(12):
        item = chance.randrange(8)
        if item in present:
            present.remove(item)
            evaluation.remove(item)
        else:
            present.add(item)
            evaluation.add(item)
        assert evaluation.value == exactly(plainly(objective, frozenset(present)))
    left = [item for item in range(8) if item not in present]
    expected = [plainly(objective, frozenset({*present, item})) for item in left]
    assert evaluation.values_with(left) == exactly(expected)
    some = frozenset(chance.sample(range(8), 3))
    assert value_of(objective, some) == exactly(plainly(objective, some))


@pytest.mark.parametrize("settings", SETTINGS)
def test_searches_are_at_the_best_of_all_sets_or_at_least_of_single_additions(
    settings: ObjectiveSettings,
) -> None:
    for seed in range(2):
        objective = made(seed, 12, settings)
        best = exhaustive_search(objective)
        single = max(value_of(objective, items) for size in (0, 1) for items in combinations(range(12), size))
        assert cross_entropy_search(objective).value == best.value
        for search in (greedy_search, refined_search):
            assert single <= search(objective).value <= best.value


def test_a_ceiling_is_kept_where_the_original_grammar_keeps_it() -> None:
    for seed in range(20):
        objective = made(seed, 12, ObjectiveSettings(false_alarms=0.0, ceiling=0.25, threshold=-1.0))
        if value_of(objective, []) < -2:
            continue
        for search in (greedy_search, cross_entropy_search):
            best = objective.others.scores[:, [0, 1, 2, *(3 + i for i in search(objective).chosen)]].max(1)
            assert np.mean(best - objective.others.reference > -1.0) <= 0.25


def test_one_original_expression_may_be_all_there_is() -> None:
    objective = made(0, 3, ObjectiveSettings(ceiling=0.2), num_commands=1)
    evaluation = objective.evaluation()
    for item in (2, 0, 1):
        evaluation.add(item)
    for item in (0, 2, 1):
        evaluation.remove(item)
    assert evaluation.value == exactly(plainly(objective, frozenset()))


def test_bad_sizes_and_settings_are_named() -> None:
    table = ScoreTable(np.zeros((2, 2), np.float32), np.zeros(2, np.float32))
    with pytest.raises(InputError, match="3 labels"):
        GrammarObjective(table, np.zeros(3), table, [0, 1], 1, ObjectiveSettings())
    with pytest.raises(InputError, match="0 of 2"):
        GrammarObjective(table, np.zeros(2), table, [0, 1], 0, ObjectiveSettings())
    with pytest.raises(InputError, match="no recordings"):
        GrammarObjective(table, np.zeros(2), table.rows([]), [0, 1], 1, ObjectiveSettings())
    with pytest.raises(InputError, match="weight of missed is -1"):
        ObjectiveSettings(missed=-1)
    with pytest.raises(InputError, match="false-alarm rate is 1"):
        ObjectiveSettings(ceiling=1)
    with pytest.raises(InputError, match="references"):
        ScoreTable(np.zeros((2, 2), np.float32), np.zeros(3, np.float32))
