"""Variables that take each other's values, in RULER's words."""

from __future__ import annotations

import random
from collections.abc import Callable

from modicum.reference import lots
from modicum.reference.pieces import Pen, Sequence


def chain(pen: Pen, length: int, rng: random.Random) -> Sequence:
    """Variables that take each other's values; which of them have a value?"""
    made = pen.open("chain")
    long = length >= 1024  # mostly as RULER has it: an example, then lines of noise
    if length >= 128 and rng.random() < (0.2 if long else 0.6):
        # Little but assignments and short questions; with short names, which are sooner learnt, more of them.
        size = rng.choice((1, 2, 3, 5))
        count = min(8, length // (28 + 7 * size))  # of one letter there are 26 names
        dense = _chains(count, lambda: rng.randint(0, 2), size, rng)
        # To answer, one must know at the end of an assignment whose it was: often that is asked at once.
        chain_part(pen, made, length, dense, rng, short=True, echo=rng.choice((0, 0, 0.3, 0.6)))
        return made
    # Each assignment on a line of its own, among lines of noise.
    lined = length >= 256 and rng.random() < (0.75 if long else 0.5)
    if length >= 512 and rng.random() < (0.75 if long else 0.4):
        chain_part(pen, made, 200, _chains(1, lambda: rng.randint(1, 3), 3, rng), rng, lined=True)
        made.add(pen.ids("\n\n"), 0)
    most = max(1, min(4, (length - len(made.ids)) // (100 if length < 256 else 150)))
    count = 1 if rng.random() < 0.4 else rng.randint(1, most)
    chains = _chains(count, lambda: rng.randint(1, 2 if length < 256 else 4), 5, rng)
    chain_part(pen, made, length, chains, rng, lined=lined, short=length < 256)
    return made


def _chains(count: int, hops: Callable[[], int], size: int, rng: random.Random) -> dict[str, list[str]]:
    """Values, and the variables that have them, one after the other; all names differ."""
    names: set[str] = set()
    chains: dict[str, list[str]] = {}
    while len(chains) < count:
        chain: list[str] = []
        for _ in range(1 + hops()):
            while (name := lots.letters(rng, size)) in names:
                pass
            names.add(name)
            chain.append(name)
        least, most = (10, 99) if size < 3 else (10_000, 99_999)
        while (value := str(rng.randint(least, most))) in chains:
            pass
        chains[value] = chain
    return chains


def chain_part(
    pen: Pen,
    made: Sequence,
    length: int,
    chains: dict[str, list[str]],
    rng: random.Random,
    *,
    lined: bool = False,
    short: bool = False,
    echo: float = 0,
) -> None:
    """One text with its questions, up to `length` tokens in all; `short`: questions of few words; `echo`:
    how often the variable comes once more after its assignment, with no other text between them."""
    lines: list[list[tuple[float, str, str]]] = []
    for value, names in chains.items():
        places = sorted(rng.random() for _ in names)
        right = [value, *(f"VAR {name}" for name in names)]
        shape = "\nVAR {} = {} " if lined else " VAR {} = {}"
        lines.append([(p, shape.format(n, r), n) for p, n, r in zip(places, names, right, strict=False)])
    told = sorted(one for line in lines for one in line)
    if not short and rng.random() < 0.7:
        made.add(
            pen.ids(
                "Memorize and track the chain(s) of variable assignment hidden in the following text.\n\n"
            ),
            0,
        )
    questions = Sequence("chain")
    asked = list(chains)
    rng.shuffle(asked)
    for value in asked:
        names = chains[value]
        if short and rng.random() < 0.5:
            questions.add(pen.ids(f"\nWhat is {value}"), 0)
        else:
            words = (
                f"\nQuestion: Find all variables that are assigned the value {value} in the text "
                "above. Answer: According to the chain(s) of variable assignment in the text above, "
                f"{len(names)} variables are assigned the value {value}, they are:"
            )
            questions.add(pen.ids(f"\nthe value {value}, they are:" if short else words), 0)
            # As with needles: what stands just before is looked up sooner than what must be carried over.
            pen.answer(questions, f" {value}")
        for name in names:
            pen.answer(questions, f" {name}")
        questions.add(pen.ids("."), 1)
    if echo:
        for _, text, name in told:
            made.add(pen.ids(text), 0)
            if rng.random() < echo:
                pen.answer(made, f" {name}")
    else:
        needles = [pen.ids(text) for _, text, _ in told]
        pen.bury(needles, length - len(questions.ids), made, rng, noise=lined)
    made.ids += questions.ids
    made.marks += questions.marks
