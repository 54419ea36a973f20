"""Values that are easily taken for each other: each sign of an answer must be right."""

from __future__ import annotations

import random
from collections.abc import Iterable
from functools import partial

from modicum.reference import lots, needles
from modicum.reference.pieces import Pen, Sequence


def exact(pen: Pen, length: int, rng: random.Random) -> Sequence:
    """Keys and values, and a question for each, most in few words."""
    made = pen.open("exact")
    if length < 128 or rng.random() < 0.35:
        return carry(pen, made, length, rng)
    key, _, _ = lots.draws(rng, length)
    key = partial(lots.two_words(rng), rng) if rng.random() < 0.4 else key
    value = lots.alike(rng)
    shape = "\n{} is: {}." if rng.random() < 0.7 else " One of the special magic numbers for {} is: {}."
    facts: dict[str, str] = {}
    room = length * rng.uniform(0.3, 0.5)
    while len(made.ids) < room:
        one = key()
        if one not in facts:
            facts[one] = value()
            made.add(pen.ids(shape.format(one, facts[one])), 0)
    while len(made.ids) < length:
        for one in rng.sample(list(facts), len(facts)):
            start = len(made.ids)
            needles.ask(pen, made, [one], [[facts[one]]], "number", rng, short=0.9)
            mark_choices(pen, made, start, facts[one], facts.values())
    return made


def carry(pen: Pen, made: Sequence, length: int, rng: random.Random) -> Sequence:
    """Keys, short or of two words, and values of any size, after which the key often comes once more.

    That must be known at each sign, as it may be the last: so each learns whose it is, which tells values
    apart that begin alike.
    """
    key = rng.choice((partial(lots.letters, rng, 1), partial(lots.letters, rng, 2), partial(lots.noun, rng)))
    if rng.random() < 0.6:
        key = partial(lots.two_words(rng), rng)
    value = lots.alike(rng, rng.choice((3, 7)))
    shapes = ["\n{}:", "\n{} is:"]
    if length >= 128:
        shapes.append(" One of the special magic numbers for {} is:")
    told = rng.choice(shapes)
    asked = rng.choice((told, shapes[0]))
    echo = rng.choice((0, 1, 1))
    facts: dict[str, str] = {}
    room = length * rng.uniform(0.35, 0.5)
    while len(made.ids) < room and len(facts) < 20:
        one = key()
        if one not in facts:
            facts[one] = value()
            made.add(pen.ids(told.format(one)), 0)
            made.add(pen.ids(f" {facts[one]}"), 0)
            if rng.random() < echo:
                pen.answer(made, f" {one}")
    while len(made.ids) < length:
        for one in rng.sample(list(facts), len(facts)):
            start = len(made.ids)
            made.add(pen.ids(asked.format(one)), 0)
            pen.answer(made, f" {facts[one]}")
            mark_choices(pen, made, start, facts[one], facts.values())
            if rng.random() < echo:
                pen.answer(made, f" {one}")
    return made


def mark_choices(pen: Pen, made: Sequence, start: int, value: str, values: Iterable[str]) -> None:
    """Each sign of the answer after `start` chooses, if the two before it stand elsewhere with another one
    after them, or if it is the first or second."""
    signs = pen.ids(f" {value}")
    at = next(i for i in range(start, len(made.ids)) if made.ids[i : i + len(signs)] == signs)
    shift = len(signs) - len(value)
    for i in range(len(value)):
        others = (
            other[k + 2]
            for other in values
            for k in range(len(other) - 2)
            if other[k : k + 2] == value[i - 2 : i]
        )
        if i < 2 or any(other != value[i] for other in others):
            made.marks[at + shift + i] = 2
