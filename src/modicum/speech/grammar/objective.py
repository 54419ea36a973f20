"""Objective: what a grammar with added expressions is worth, as a problem of `modicum.search`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from modicum.errors import InputError
from modicum.speech.grammar.decision import allowed_alarms, check_false_alarm_rate
from modicum.speech.grammar.score_table import ScoreTable

_CHUNK = 64
"""Expressions that are tried at once."""


@dataclass(frozen=True)
class ObjectiveSettings:
    """Settings of `GrammarObjective`. The weights' names are the paper's; their values are ours.

    Attributes:
        missed: weight of the rate of missed commands (beta 1).
        misclassified: weight of the rate of commands taken for others (beta 2).
        false_alarms: weight of the rate of false alarms (beta 3).
        ceiling: the highest rate of false alarms that a grammar may have.
        threshold: of the confidence; None to set it anew for every set of expressions, such that false alarms
            are at the ceiling.

    Raises:
        InputError: a weight is below 0, or the ceiling is no rate.
    """

    missed: float = 1.0
    misclassified: float = 1.0
    false_alarms: float = 1.0
    ceiling: float = 0.01
    threshold: float | None = None

    def __post_init__(self) -> None:
        for name in ("missed", "misclassified", "false_alarms"):
            if not getattr(self, name) >= 0:
                raise InputError(f"the weight of {name} is {getattr(self, name)}: give 0 or more")
        check_false_alarm_rate(self.ceiling)


@dataclass(frozen=True)
class GrammarObjective:
    """A `SubsetProblem`: which candidates are added to a grammar.

    The value of a set is -(missed · MD + misclassified · MC + false_alarms · FA) over the recordings. A set
    whose false alarms are above the ceiling is worth less than any other: its value is -(sum of the weights)
    - 1 - FA.

    Attributes:
        commands: scores of recordings of commands, the original expressions first, then the candidates.
        labels: [recordings] their commands.
        others: scores of other speech, with the same expressions.
        owners: the command of each expression.
        num_original: how many expressions are the original ones.
        settings: weights, ceiling, threshold.

    Raises:
        InputError: sizes do not fit, or there is nothing of some kind.
    """

    commands: ScoreTable
    labels: np.ndarray
    others: ScoreTable
    owners: Sequence[int]
    num_original: int
    settings: ObjectiveSettings

    def __post_init__(self) -> None:
        sizes = {self.commands.scores.shape[1], self.others.scores.shape[1], len(self.owners)}
        if len(sizes) > 1 or len(self.labels) != len(self.commands):
            raise InputError(
                f"tables of {sorted(sizes)} expressions, {len(self.labels)} labels of {len(self.commands)} "
                "recordings: give a score of each expression and a label of each recording"
            )
        if not 0 < self.num_original <= len(self.owners):
            raise InputError(
                f"{self.num_original} of {len(self.owners)} expressions are original: give at least one"
            )
        if not len(self.commands) or not len(self.others):
            raise InputError(
                "there are no recordings of commands, or none of other speech: give some of both"
            )

    @property
    def num_items(self) -> int:
        """Candidates."""
        return len(self.owners) - self.num_original

    def evaluation(self) -> GrammarEvaluation:
        """Of the original grammar."""
        return GrammarEvaluation(self)


class GrammarEvaluation:
    """A grammar that changes by one expression at a time.

    Each recording keeps its best expression of the grammar, so that an addition takes time in the number of
    recordings only. A removal looks through the grammar for those recordings whose best expression it was.
    """

    def __init__(self, objective: GrammarObjective) -> None:
        self._objective = objective
        self._owners = np.asarray(objective.owners, dtype=np.int64)
        self._commands = _Best(objective.commands.confidence(), range(objective.num_original))
        self._others = _Best(objective.others.confidence(), range(objective.num_original))
        self._labels = np.asarray(objective.labels, dtype=np.int64)
        self.value = self._value()

    def values_with(self, items: Sequence[int]) -> list[float]:
        """The value with each candidate added alone."""
        found: list[float] = []
        for start in range(0, len(items), _CHUNK):
            columns = np.asarray(items[start : start + _CHUNK], dtype=np.int64) + self._objective.num_original
            best, won = self._commands.with_each(columns)
            owner = np.where(won, self._owners[columns], self._owners[self._commands.first][:, None])
            other, _ = self._others.with_each(columns)
            found += [float(one) for one in self._values(best, owner == self._labels[:, None], other)]
        return found

    def add(self, item: int) -> None:
        """Add a candidate."""
        self._commands.add(item + self._objective.num_original)
        self._others.add(item + self._objective.num_original)
        self.value = self._value()

    def remove(self, item: int) -> None:
        """Remove a candidate."""
        self._commands.remove(item + self._objective.num_original)
        self._others.remove(item + self._objective.num_original)
        self.value = self._value()

    def replace(self, items: Sequence[int]) -> None:
        """Make it the original grammar with these candidates."""
        columns = [item + self._objective.num_original for item in items]
        self._commands.replace([*range(self._objective.num_original), *columns])
        self._others.replace([*range(self._objective.num_original), *columns])
        self.value = self._value()

    def _value(self) -> float:
        is_right = self._owners[self._commands.first] == self._labels
        best = self._commands.best[:, None]
        return float(self._values(best, is_right[:, None], self._others.best[:, None])[0])

    def _values(self, best: np.ndarray, is_right: np.ndarray, others: np.ndarray) -> np.ndarray:
        """Of grammars [N], from confidences [recordings, N] and whether their commands are right."""
        settings = self._objective.settings
        if settings.threshold is None:
            # The threshold is the confidence of the first recording that must not be taken for a command.
            at = len(others) - 1 - allowed_alarms(len(others), settings.ceiling)
            threshold = np.partition(others, at, axis=0)[at]
        else:
            threshold = np.full(others.shape[1], settings.threshold, dtype=np.float64)
        accepted = best > threshold
        missed = 1 - accepted.sum(0) / len(best)
        misclassified = (accepted & ~is_right).sum(0) / len(best)
        alarms = (others > threshold).sum(0) / len(others)
        cost = (
            settings.missed * missed + settings.misclassified * misclassified + settings.false_alarms * alarms
        )
        most = settings.missed + settings.misclassified + settings.false_alarms
        found: np.ndarray = np.where(alarms > settings.ceiling, -most - 1 - alarms, -cost)
        return found


class _Best:
    """The best of chosen columns in each row.

    Of equal scores the column of the lower number is better, so that the order of additions does not matter.
    """

    def __init__(self, scores: np.ndarray, chosen: range) -> None:
        self._scores = scores
        self._chosen = sorted(chosen)
        self._rows = np.arange(len(scores))
        self.first = np.zeros(len(scores), dtype=np.int64)
        self._rank(self._rows)

    @property
    def best(self) -> np.ndarray:
        """[rows] the highest scores."""
        return self._scores[self._rows, self.first]

    def with_each(self, columns: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The highest scores [rows, columns] with each column added alone, and whether it is the best."""
        best, added = self.best[:, None], self._scores[:, columns]
        won = (added > best) | ((added == best) & (columns < self.first[:, None]))
        return np.where(won, added, best), won

    def add(self, column: int) -> None:
        """Add a column that is not chosen."""
        added, best = self._scores[:, column], self.best
        won = (added > best) | ((added == best) & (column < self.first))
        self.first = np.where(won, column, self.first)
        self._chosen.append(column)
        self._chosen.sort()

    def remove(self, column: int) -> None:
        """Remove a column that is chosen, not the only one."""
        self._chosen.remove(column)
        self._rank(np.flatnonzero(self.first == column))

    def replace(self, columns: Sequence[int]) -> None:
        """Choose these columns, at least one."""
        self._chosen = sorted(columns)
        self._rank(self._rows)

    def _rank(self, rows: np.ndarray) -> None:
        """Find the best column of some rows anew."""
        if len(rows):
            columns = np.array(self._chosen)
            self.first[rows] = columns[self._scores[np.ix_(rows, columns)].argmax(1)]
