"""Alignment: which part of what was heard belongs to which word of what was said."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

SPACE = " "
"""The unit between words of letters."""

_SPACE_AS_LETTER = 2
"""A space taken for a letter costs as much as leaving one out and adding the other: words seldom run so."""


def edit_table(said: Sequence[str], heard: Sequence[str]) -> np.ndarray:
    """Levenshtein distances of all beginnings: [len(said) + 1, len(heard) + 1] int64.

    Adding, leaving out and replacing a unit cost 1 each; replacing a space costs 2.
    """
    table = np.zeros((len(said) + 1, len(heard) + 1), dtype=np.int64)
    table[:, 0] = np.arange(len(said) + 1)
    table[0] = np.arange(len(heard) + 1)
    steps = np.arange(len(heard) + 1)
    for row, unit in enumerate(said, 1):
        replaced = np.array([_cost(unit, other) for other in heard], dtype=np.int64)
        best = np.minimum(table[row - 1, 1:] + 1, table[row - 1, :-1] + replaced)
        # An added unit costs 1 more than its left neighbour: a running minimum of value - column.
        table[row, 1:] = (
            np.minimum.accumulate(np.concatenate([[table[row, 0]], best]) - steps)[1:] + steps[1:]
        )
    return table


def edit_path(said: Sequence[str], heard: Sequence[str]) -> list[tuple[int | None, int | None]]:
    """Pairs of positions on a path of minimum edits, in order; None for one that has no partner.

    Where several paths cost the same, the traceback from the end prefers a pair, then a unit left out, then
    one that was added.
    """
    table = edit_table(said, heard)
    row, column = len(said), len(heard)
    path: list[tuple[int | None, int | None]] = []
    while row or column:
        if row and column:
            cost = _cost(said[row - 1], heard[column - 1])
            if table[row, column] == table[row - 1, column - 1] + cost:
                row, column = row - 1, column - 1
                path.append((row, column))
                continue
        if row and table[row, column] == table[row - 1, column] + 1:
            row -= 1
            path.append((row, None))
        else:
            column -= 1
            path.append((None, column))
    return path[::-1]


def heard_words(words: Sequence[Sequence[str]], heard: Sequence[str], has_spaces: bool) -> list[list[str]]:
    """What was heard of each word that was said: the units on its part of the path.

    A unit that was added belongs to the word of the unit before it, and one before the first word to that
    one. What was heard for a space belongs to the word before. Spaces at the ends of a part are dropped.

    Args:
        words: units of each word.
        heard: units.
        has_spaces: whether a space stands between the words of what was said.
    """
    said: list[str] = []
    owner: list[int] = []
    for index, word in enumerate(words):
        if has_spaces and index:
            said.append(SPACE)
            owner.append(index - 1)
        said += word
        owner += [index] * len(word)
    parts: list[list[str]] = [[] for _ in words]
    current = 0
    for at, position in edit_path(said, heard):
        if at is not None:
            current = owner[at]
        if position is not None:
            parts[current].append(heard[position])
        if at is not None and said[at] == SPACE and has_spaces and position is not None:
            # What is added after a space that was heard begins the next word.
            current = min(owner[at] + 1, len(words) - 1)
    return [_stripped(part) for part in parts]


def _cost(unit: str, other: str) -> int:
    if unit == other:
        return 0
    return _SPACE_AS_LETTER if SPACE in (unit, other) else 1


def _stripped(part: list[str]) -> list[str]:
    start, end = 0, len(part)
    while start < end and part[start] == SPACE:
        start += 1
    while end > start and part[end - 1] == SPACE:
        end -= 1
    return part[start:end]
