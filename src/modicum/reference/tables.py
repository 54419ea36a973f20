"""Tables: keys with values, read out in another order, from right to left, or several keys at a time."""

from __future__ import annotations

import random

from modicum.reference import lots
from modicum.reference.pieces import Pen, Sequence
from modicum.tasks.words import pair

_Row = tuple[list[int], list[int]]


def table(pen: Pen, length: int, rng: random.Random) -> Sequence:
    """Keys with values, dense, then again in another order: as many as fit."""
    made = pen.open("table")
    if rng.random() < (0.5 if length <= 128 else 0.1):
        return token_table(pen, made, length, rng)
    key, value, _ = lots.draws(rng, length)
    before, between, after = rng.choice(
        (
            ("", ":", "\n"),
            ("", " =", ";"),
            (" The", " is", "."),
            (" (", ",", ")"),
            (" for", " is:", "."),
            (" One of the special magic numbers for", " is:", "."),
        )
        if length >= 128
        else (("", ":", "\n"), ("", " =", ";"), ("", " is", "."))
    )
    pairs: dict[str, str] = {}
    context: list[int] = []
    room = (length - 2) * rng.uniform(0.4, 0.6)
    while True:
        one, other = key(), value()
        if one in pairs:
            continue
        row = pen.ids(before) + pen.ids(f" {one}") + pen.ids(between)
        row += pen.ids(f" {other}") + pen.ids(after)
        if pairs and len(context) + len(row) > room:
            break
        pairs[one] = other
        context += row
    made.add(context, 0)
    asked = list(pairs)
    while len(made.ids) < length:
        rng.shuffle(asked)
        for one in asked:
            made.add(pen.ids(before) + pen.ids(f" {one}") + pen.ids(between), 0)
            pen.answer(made, f" {pairs[one]}")
            made.add(pen.ids(after), 0)
    return made


def token_table(pen: Pen, made: Sequence, length: int, rng: random.Random) -> Sequence:
    """The same with any tokens as keys and values."""
    between, after = (
        pen.ids(mark) for mark in rng.choice(((":", "\n"), (" is", "."), (" =", ";"), ("", ",")))
    )
    row = 2 + len(between) + len(after)
    count = max(2, min(200, int(length * rng.uniform(0.3, 0.6)) // row))
    keys = rng.sample(range(1, pen.words), count)
    values = [rng.randrange(1, pen.words) for _ in keys]
    for turn in range(2 + length // (row * count)):
        order = list(range(count))
        rng.shuffle(order)
        for i in order:
            made.add([keys[i], *between], 0)
            made.add([values[i]], 2 if turn else 0)
            made.add(after, 0)
    return made


def back(pen: Pen, length: int, rng: random.Random) -> Sequence:
    """Short tables, each followed by its values, and which key has each.

    To answer, a value must have been seen with the key before it, and in an early layer, so that a later one
    can look for the value. Of chains of variables that is never learnt, but of two tokens side by side it is,
    and from there it spreads to names of several tokens and to more words between.
    """
    made = pen.open("back")
    while len(made.ids) < length:
        rows = _rows(pen, length, rng)
        _tell(pen, made, rows, rng)
        rng.shuffle(rows)
        for key, value in rows:
            made.add(pen.ids("\nWhat is") + value, 0)
            made.answer(key, pen.space)
    return made


def several(pen: Pen, length: int, rng: random.Random) -> Sequence:
    """Short tables, and questions for several of their keys at once: which is next must be learnt as well."""
    made = pen.open("several")
    while len(made.ids) < length:
        rows = _rows(pen, length, rng)
        _tell(pen, made, rows, rng)
        rng.shuffle(rows)
        while rows and len(made.ids) < length:
            count = rng.randint(2, 6)
            asked, rows = rows[:count], rows[count:]
            made.add(pen.ids("\nfor"), 0)
            for i, (key, _) in enumerate(asked):
                made.add(pen.ids(pen.joint(i, len(asked))) + key, 0)
            made.add(pen.ids(rng.choice((":", " are"))), 0)
            pen.answer_list(made, [key for key, _ in asked], [[value] for _, value in asked])
    return made


def _rows(pen: Pen, length: int, rng: random.Random) -> list[_Row]:
    """Keys and values, all different: single tokens of any sort, letters, numbers, words."""
    count = rng.randint(3, 5 if length < 128 else rng.choice((4, 8, 24) if length > 128 else (4, 6)))
    if rng.random() < (0.8 if length < 128 else 0.4):
        tokens = rng.sample(range(1, pen.words), 2 * count)
        return [([key], [value]) for key, value in zip(tokens[:count], tokens[count:], strict=True)]
    digits = rng.choice((2, 3, 5))
    if length >= 128 and rng.random() < 0.6:
        names = {f" {pair(rng)}" for _ in range(2 * min(count, 8))}
        digits = 2
    else:
        size = rng.choice((1, 1, 2, 3, 5))
        names = {f" {lots.letters(rng, size)}" for _ in range(2 * min(count, 10))}
    drawn = [pen.ids(name) for name in sorted(names)]
    rng.shuffle(drawn)
    half = len(drawn) // 2
    values = drawn[half:]
    if rng.random() < (0.5 if digits > 2 else 0.8):
        values = [pen.ids(f" {n}") for n in rng.sample(range(10 ** (digits - 1), 10**digits), half)]
    return list(zip(drawn[:half], values, strict=False))


def _tell(pen: Pen, made: Sequence, rows: list[_Row], rng: random.Random) -> None:
    forms = (("", "", ""), ("", "", ","), ("", " =", ";"), ("", " is", "."), (" VAR", " =", ""))
    before, between, after = (pen.ids(p) for p in rng.choice((*forms, *((" VAR", " = VAR", ""),) * 2)))
    made.add(pen.ids("\n"), 0)
    for key, value in rows:
        made.add(before + key + between + value + after, 0)
