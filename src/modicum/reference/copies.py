"""Copies: what came before, once more."""

from __future__ import annotations

import random

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
