"""Leave one out: no recording is judged by an expression that only it gave rise to."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from modicum.speech.grammar.candidates import Expression
from modicum.speech.grammar.dictionary import HeardWord
from modicum.speech.grammar.score_table import ScoreTable


def leave_one_out(
    table: ScoreTable,
    heard: Sequence[Sequence[HeardWord]],
    expressions: Sequence[Expression],
    commands: Sequence[str],
    num_original: int,
) -> ScoreTable:
    """The table for a search whose dictionary was learned from the same recordings.

    An expression with a form that was heard in one recording only is that recording's own decode, as a rule,
    and scores there as no other speaker's recording will: such scores become -inf. Without this a search
    chooses expressions that fit single recordings (measured: it took nearly all candidates, and false alarms
    on other recordings were many times those wanted).

    Args:
        table: scores of the recordings.
        heard: of each recording of the table, what was heard.
        expressions: of the table.
        commands: texts.
        num_original: how many of the expressions, the first ones, are the original ones. They need no
            evidence.
    """
    rows: dict[tuple[str, str], set[int]] = {}
    for row, words in enumerate(heard):
        for one in words:
            rows.setdefault((one.word, one.form), set()).add(row)
    scores = table.scores.copy()
    for column, expression in enumerate(expressions[num_original:], num_original):
        said = commands[expression.command].split()
        for word, form in zip(said, expression.forms, strict=True):
            only = rows.get((word, form), set())
            if len(only) == 1:
                scores[next(iter(only)), column] = -np.inf
    return replace(table, scores=scores)
