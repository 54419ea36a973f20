"""Copies: what came before, once more."""

from __future__ import annotations

import random
import string

from modicum.reference.pieces import Pen, Sequence


def copy(pen: Pen, length: int, rng: random.Random) -> Sequence:
    """Segments, then some of them again; all but the first tokens of a repeat are known beforehand."""
    made = pen.open("copy")
    random_tokens = length < 128 or rng.random() < 0.5
    segments: list[list[int]] = []
    while len(made.ids) < length:
        if segments and rng.random() < 0.55:
            segment = rng.choice(segments)
            start = rng.randrange(max(1, len(segment) - 4))
            repeat = segment[start : start + rng.randint(4, 64)]
            made.add(repeat[:2], 0)
            made.add(repeat[2:], 1)
            continue
        size = rng.randint(4, max(5, min(length // 4, 200)))
        if random_tokens:
            segment = [rng.randrange(1, pen.words) for _ in range(size)]
            made.add(segment, 0)
        else:
            segment = pen.filler(size, rng, exact=True)
            made.add(segment, -1)
        segments.append(segment)
    return made


def exact(pen: Pen, length: int, rng: random.Random) -> Sequence:
    """Numbers and names of few different digits or letters, some with a common beginning, then each again.

    Two or three tokens back do not tell which digit is next in 5655678; more must be looked at, or counted.
    """
    made = pen.open("exact")
    while len(made.ids) < length:
        digits = rng.random() < 0.65
        signs = rng.sample(string.digits[1:] if digits else string.ascii_uppercase, rng.randint(2, 4))
        size = 7 if digits else 5
        values: list[str] = []
        for _ in range(rng.randint(2, 3 if length < 128 else 6)):
            begin = rng.choice(values)[: rng.randint(1, 4)] if values and rng.random() < 0.5 else ""
            value = begin + "".join(rng.choice(signs) for _ in range(size - len(begin)))
            if value not in values:
                values.append(value)
        keys = [f" {key}" for key in rng.sample(string.ascii_lowercase, len(values))]
        made.add(pen.ids("\n"), 0)
        for key, value in zip(keys, values, strict=True):
            made.add(pen.ids(f"{key}: {value},"), 0)
        for key, value in rng.sample(list(zip(keys, values, strict=True)), len(values)):
            made.add(pen.ids(f"\n{key}:"), 0)
            pen.answer(made, f" {value}")
    return made
