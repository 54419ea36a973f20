"""Evaluation: error rates of a grammar, beside those of the original one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from modicum.errors import InputError
from modicum.speech.grammar.decision import (
    Decisions,
    Rates,
    needed_recordings,
    rates,
    threshold_for,
)
from modicum.speech.grammar.score_table import ScoreTable

_POINTS = 60
"""Of a trade-off curve."""


@dataclass(frozen=True)
class LabelledScores:
    """Scores of recordings of commands, with their commands, and of other speech."""

    commands: ScoreTable
    labels: np.ndarray
    others: ScoreTable

    def columns(self, chosen: Sequence[int]) -> LabelledScores:
        """Of some expressions."""
        return LabelledScores(self.commands.columns(chosen), self.labels, self.others.columns(chosen))

    def rows(self, commands: np.ndarray, others: np.ndarray) -> LabelledScores:
        """Of some recordings."""
        return LabelledScores(self.commands.rows(commands), self.labels[commands], self.others.rows(others))


@dataclass(frozen=True)
class CurvePoint:
    """Rates at a threshold."""

    false_alarms: float
    missed: float
    misclassified: float


@dataclass(frozen=True)
class GrammarRates:
    """Rates of one grammar.

    Attributes:
        name: of the grammar.
        size: its expressions.
        fixed: at the threshold that was set before.
        equal: at the lowest threshold with no more false alarms here than wanted; None where there is too
            little other speech to set it.
        curve: missed and misclassified at all rates of false alarms, few first.
    """

    name: str
    size: int
    fixed: Rates
    equal: Rates | None
    curve: tuple[CurvePoint, ...]

    def to_dict(self) -> dict[str, Any]:
        """As JSON takes it, without the curve."""
        equal = None if self.equal is None else self.equal.to_dict()
        return {"grammar": self.name, "size": self.size, "fixed": self.fixed.to_dict(), "equal": equal}


def grammar_rates(
    name: str, scores: LabelledScores, owners: Sequence[int], threshold: float, false_alarm_rate: float
) -> GrammarRates:
    """Rates of the grammar of all expressions of some scores.

    Args:
        name: of the grammar.
        scores: of its expressions.
        owners: the command of each expression.
        threshold: that was set before.
        false_alarm_rate: for "equal".
    """
    decisions = Decisions.of(scores.commands, owners)
    others = Decisions.of(scores.others, owners)
    equal = None
    if len(scores.others) >= needed_recordings(false_alarm_rate):
        here = threshold_for(others.confidence, false_alarm_rate)
        equal = rates(decisions, scores.labels, others, here)
    return GrammarRates(
        name,
        len(owners),
        rates(decisions, scores.labels, others, threshold),
        equal,
        trade_off(decisions, scores.labels, others),
    )


def trade_off(decisions: Decisions, labels: np.ndarray, others: Decisions) -> tuple[CurvePoint, ...]:
    """Missed and misclassified against false alarms, as the threshold falls.

    Raises:
        InputError: there is no recording of commands or of other speech.
    """
    if not len(labels) or not len(others.confidence):
        raise InputError("a trade-off needs recordings of commands and of other speech: give some of both")
    alarms = np.sort(others.confidence)[::-1]
    counts = np.unique(np.round(np.geomspace(1, len(alarms), _POINTS)).astype(int))
    points = []
    for count in (0, *counts[:-1]):
        accepted = decisions.accepted(float(alarms[count]))
        points.append(
            CurvePoint(
                float((others.confidence > alarms[count]).mean()),
                float((accepted < 0).mean()),
                float(((accepted >= 0) & (accepted != labels)).mean()),
            )
        )
    return tuple(points)
