"""Decision: the best expression, its confidence, a threshold, and the rates of errors."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from modicum.errors import InputError
from modicum.speech.grammar.score_table import ScoreTable
from modicum.speech.scoring import Rate

NO_COMMAND = -1
"""The command of recordings that hold none, and of those that are rejected."""


@dataclass(frozen=True)
class Decisions:
    """What is decided for recordings, before a threshold.

    Attributes:
        command: [recordings] int64, of the best expression; the first of equal ones.
        confidence: [recordings] float32: the best expression's score above that of the free decode.
    """

    command: np.ndarray
    confidence: np.ndarray

    @classmethod
    def of(cls, table: ScoreTable, commands: Sequence[int]) -> Decisions:
        """From scores and the command of each expression.

        Raises:
            InputError: there is no expression, or not a command for each.
        """
        if not commands or len(commands) != table.scores.shape[1]:
            raise InputError(
                f"there are {table.scores.shape[1]} expressions and {len(commands)} commands of them: give "
                "one for each, and at least one"
            )
        best = table.scores.argmax(1)
        rows = np.arange(len(table))
        return cls(np.asarray(commands, dtype=np.int64)[best], table.scores[rows, best] - table.reference)

    def accepted(self, threshold: float) -> np.ndarray:
        """[recordings] int64: the command where the confidence is above the threshold, else `NO_COMMAND`."""
        return np.where(self.confidence > threshold, self.command, NO_COMMAND)


@dataclass(frozen=True)
class Rates:
    """Shares of errors, with 95 % intervals by resampling recordings (see `Rate`)."""

    missed: Rate
    """Of recordings of commands: rejected."""
    misclassified: Rate
    """Of recordings of commands: taken for another command."""
    false_alarms: Rate
    """Of recordings of other speech: taken for a command."""

    @property
    def wrong(self) -> float:
        """Missed and misclassified together."""
        return self.missed.value + self.misclassified.value

    def to_dict(self) -> dict[str, Any]:
        """As JSON takes it."""
        return asdict(self)


def rates(
    decisions: Decisions, labels: Sequence[int] | np.ndarray, others: Decisions, threshold: float
) -> Rates:
    """Errors at a threshold.

    Args:
        decisions: for recordings of commands.
        labels: their commands.
        others: decisions for recordings of other speech.
        threshold: of the confidence.

    Raises:
        InputError: there is no recording of commands or of other speech, or not a label for each.
    """
    if len(labels) != len(decisions.command):
        raise InputError(
            f"there are {len(labels)} labels for {len(decisions.command)} recordings: give one for each"
        )
    if not len(labels) or not len(others.command):
        raise InputError("rates need recordings of commands and of other speech: give some of both")
    accepted = decisions.accepted(threshold)
    missed = accepted == NO_COMMAND
    wrong = ~missed & (accepted != np.asarray(labels))
    alarms = others.accepted(threshold) != NO_COMMAND
    return Rates(*(_rate(found) for found in (missed, wrong, alarms)))


def threshold_for(confidence: np.ndarray, false_alarm_rate: float) -> float:
    """The lowest threshold at which no more than this share of other speech is taken for a command.

    Args:
        confidence: [recordings] of other speech.
        false_alarm_rate: 0 to below 1.

    Raises:
        InputError: the rate is out of range, or there is too little speech to set it by.
    """
    check_enough(len(confidence), false_alarm_rate)
    allowed = allowed_alarms(len(confidence), false_alarm_rate)
    return float(np.sort(confidence)[::-1][allowed])


def check_enough(num_recordings: int, false_alarm_rate: float) -> None:
    """Raise unless so many recordings of other speech can set a threshold for a rate.

    Raises:
        InputError: the rate is out of range, or they are too few.
    """
    check_false_alarm_rate(false_alarm_rate)
    needed = needed_recordings(false_alarm_rate)
    if num_recordings < needed:
        raise InputError(
            f"a false-alarm rate of {false_alarm_rate:g} needs {needed:,} recordings of other speech, so "
            f"that one false alarm is no more than that, and there are {num_recordings:,}: give more, cut "
            f"long ones into pieces, or ask for a rate of {1 / max(1, num_recordings):.3g} or above"
        )


def needed_recordings(false_alarm_rate: float) -> int:
    """Recordings of other speech that a rate needs at least: one false alarm must be within it."""
    return 1 if not false_alarm_rate else math.ceil(1 / false_alarm_rate - 1e-9)


def allowed_alarms(num_recordings: int, false_alarm_rate: float) -> int:
    """False alarms that a rate allows."""
    return min(num_recordings - 1, math.floor(num_recordings * false_alarm_rate + 1e-9))


def check_false_alarm_rate(rate: float) -> None:
    """Raise unless it is a rate.

    Raises:
        InputError: it is not.
    """
    if not 0 <= rate < 1:
        raise InputError(f"the false-alarm rate is {rate}: give a share from 0 to below 1, such as 0.01")


def _rate(is_error: np.ndarray) -> Rate:
    return Rate.of([int(one) for one in is_error], [1] * len(is_error))
