"""Needles: facts in text, and questions about them, most in RULER's words."""

from __future__ import annotations

import random
from functools import partial

from modicum.reference import lots
from modicum.reference.pieces import Pen, Sequence

_TAIL = ("mentioned", "in", "the", "provided", "text")


def keys(pen: Pen, length: int, rng: random.Random) -> Sequence:
    """Needles side by side, as many as fit, and a question for each: which key is it?"""
    made = pen.open("keys")
    key, value, what = lots.draws(rng, length)
    if rng.random() < 0.6:
        key = partial(lots.two_words(rng), rng)
    # Dense: short values, so that there are more choices in as many tokens.
    dense = rng.random() < (0.6 if length < 256 else 0.35)
    if dense:
        value, what = partial(lots.two_digits, rng), "number"
    room = length * rng.uniform(0.3, 0.5)
    facts: dict[str, str] = {}
    while len(made.ids) < room:
        one, other = key(), value()
        if one in facts:
            continue
        facts[one] = other
        shape = "\n{} is: {}." if dense else " One of the special magic {}s for {} is: {}."
        made.add(pen.ids(shape.format(*(() if dense else (what,)), one, other)), 0)
    asked: list[str] = []
    lists = 0.4 if length >= 256 else 0
    while len(made.ids) < length:
        asked = asked or rng.sample(list(facts), len(facts))
        count = min(len(asked), rng.randint(2, 6)) if rng.random() < lists else 1
        ones, asked = asked[:count], asked[count:]
        ask(pen, made, ones, [[facts[one]] for one in ones], what, rng, short=0.9 if length < 256 else 0.4)
    return made


def needle(pen: Pen, length: int, rng: random.Random) -> Sequence:
    """Needles of one or several keys in text, noise or among other needles; several questions."""
    made = pen.open("needle")
    key, value, what = lots.draws(rng, length)
    if length >= 192 and rng.random() < 0.12:
        return fact(pen, length, rng)
    plain = length < 192 and rng.random() < 0.7
    each = 12 if plain else 30
    most = max(2, min(24, length // (4 * each)))
    # Long sequences are half as RULER has them, a few needles far from their question.
    any_count = 0.7 if length < 2048 else 0.5
    count = rng.randint(1, most) if rng.random() < any_count else rng.choice((1, 4, 4, 8))
    facts: dict[str, list[str]] = {}
    while len(facts) < min(count, most):
        several = rng.choice((1, 1, 1, 1, 1, 1, 2, 4)) if length >= 256 and count <= 4 else 1
        facts[key()] = [value() for _ in range(several)]
    needles = [
        (" " + one + " is " + other + ".")
        if plain
        else f" One of the special magic {what}s for {one} is: {other}."
        for one, values in facts.items()
        for other in values
    ]
    order = list(range(len(needles)))
    rng.shuffle(order)
    if not plain and rng.random() < 0.7:
        many = len(needles) > 1
        made.add(
            pen.ids(
                f"{'Some' if many else 'A'} special magic {what}{'s are' if many else ' is'} hidden "
                "within the following text. Make sure to memorize it. I will quiz you about the "
                f"{what}{'s' if many else ''} afterwards.\n"
            ),
            0,
        )
    ranked = [needles[i] for i in order]
    told = {one: [v for n in ranked for v in values if n.endswith(f" {v}.")] for one, values in facts.items()}
    questions = ask_all(pen, told, what, plain, length, rng)
    pen.bury([pen.ids(n) for n in ranked], length - len(questions.ids), made, rng)
    made.ids += questions.ids
    made.marks += questions.marks
    return made


def ask_all(
    pen: Pen, facts: dict[str, list[str]], what: str, plain: bool, length: int, rng: random.Random
) -> Sequence:
    """Questions until a third of the sequence is theirs, or each fact was asked twice.

    In long sequences most facts are asked once, as a second answer could be copied from the first, near by.
    """
    made = Sequence("needle")
    room = length * rng.uniform(0.2, 0.4)
    for turn in range(2 if length < 2048 or rng.random() < 0.25 else 1):
        asked = list(facts)
        rng.shuffle(asked)
        while asked:
            several = 1 if plain or rng.random() < 0.5 else min(len(asked), rng.randint(2, 5))
            keys, asked = asked[:several], asked[several:]
            values = [facts[key] for key in keys]
            if len(made.ids) > room and (turn or len(made.ids) > 0):
                return made
            if plain:
                made.add(pen.ids(f" {keys[0]} is"), 0)
                pen.answer(made, f" {values[0][0]}")
                made.add(pen.ids("."), 0)
                continue
            ask(pen, made, keys, values, what, rng)
    return made


def ask(
    pen: Pen,
    made: Sequence,
    keys: list[str],
    values: list[list[str]],
    what: str,
    rng: random.Random,
    short: float = 0.25,
) -> None:
    """A question in RULER's words, without its first half, or (`short`) in few words, with its answer.

    Unless the question just ended in the key, the answer repeats it first: to look up what stands just before
    is learnt far sooner than to carry a key over "mentioned in the provided text is".
    """
    many = sum(map(len, values)) > 1
    names = "".join(f"{pen.joint(i, len(keys))} {key}" for i, key in enumerate(keys)).strip()
    whats, verb = (f"{what}s", "are") if many else (what, "is")
    direct = rng.random() < short
    if direct:
        forms = (f"\nfor {names}:", f"\n{names} {verb}", f"\n The {whats} for {names} {verb}")
        made.add(pen.ids(rng.choice(forms)), 0)
    else:
        words = _TAIL if rng.random() < 0.65 else _TAIL[: rng.randint(0, len(_TAIL))]
        opening = "What are all the" if many else "What is the"
        asked = f" special magic {whats} for {names}"
        tail = " ".join(("", *words))
        made.add(pen.ids("\n" + (f"{opening}{asked}{tail}?" if rng.random() < 0.6 else "")), 0)
        made.add(pen.ids(f" The{asked}{tail} {verb}"), 0)
    if direct and not many:
        pen.answer(made, f" {values[0][0]}")
        made.add(pen.ids("."), 1)
    else:
        told = [[pen.ids(f" {value}") for value in its] for its in values]
        pen.answer_list(made, [pen.ids(f" {key}") for key in keys], told)


def fact(pen: Pen, length: int, rng: random.Random) -> Sequence:
    """Plain facts: The password of the captain is 4817."""
    made = pen.open("needle")
    facts: dict[str, str] = {}
    for _ in range(rng.randint(1, max(1, length // 96))):
        facts[f"the {lots.noun(rng)} of the {lots.noun(rng)}"] = rng.choice(
            (lots.short_number(rng), lots.noun(rng))
        )
    questions = Sequence("needle")
    names = list(facts)
    rng.shuffle(names)
    for name in names:
        if len(questions.ids) > length // 3:
            break
        questions.add(pen.ids(f"\nWhat is {name}?"), 0)
        questions.add(pen.ids(f" T{name[1:]} is"), 0)
        pen.answer(questions, f" {facts[name]}.")
    needles = [pen.ids(f" T{name[1:]} is {value}.") for name, value in facts.items()]
    pen.bury(needles, length - len(questions.ids), made, rng)
    made.ids += questions.ids
    made.marks += questions.marks
    return made
