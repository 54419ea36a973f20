"""Words that come most often, in RULER's words."""

from __future__ import annotations

import random

from modicum.reference import lots
from modicum.reference.pieces import Pen, Sequence


def count(pen: Pen, length: int, rng: random.Random) -> Sequence:
    """Which words come most often?"""
    made = pen.open("count")
    coded = rng.random() < 0.5
    if coded:
        intro = (
            "Read the following coded text and track the frequency of each coded word. Find the three "
            "most frequently appeared coded words."
        )
        ask = (
            "\nQuestion: Do not provide any explanation. Please ignore the dots '....'. What are the "
            "three most frequently appeared words in the above coded text? Answer: According to the "
            "coded text above, the three most frequently appeared words are:"
        )
        top, size = 3, (length - 110) // 3
        names = ["...", *(lots.letters(rng, 6).lower() for _ in range(40))]
        power = rng.uniform(1.5, 2.5)
        weights = [1.0 / (rank + 1) ** power for rank in range(len(names))]
    else:
        intro = (
            "Below is a numbered list of words. In these words, some appear more often than others. "
            "Memorize the ones that appear most often.\n"
        )
        top, size = rng.randint(3, 10), (length - 110) // 5
        ask = (
            f"\nQuestion: What are the {top} most common words in the above list? Answer: The top {top} "
            "words that appear most often in the list are:"
        )
        names = [lots.noun(rng) for _ in range(max(top + 10, size // 8))]
        weights = [10.0 if rank < top else 1.0 for rank in range(len(names))]
    listed = rng.choices(names, weights, k=max(8, size))
    counts = {name: listed.count(name) for name in dict.fromkeys(names) if name != "..."}
    best = sorted(counts, key=lambda name: -counts[name])[:top]
    made.add(pen.ids(intro), 0)
    for place, name in enumerate(listed, 1):
        made.add(pen.ids(f" {name}" if coded else f" {place}. {name}"), 0)
    made.add(pen.ids(ask), 0)
    for place, name in enumerate(best, 1):
        pen.answer(made, f" {name}" if coded else f" {place}. {name}")
    made.add(pen.ids("."), 1)
    return made
