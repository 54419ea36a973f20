"""Variables that take each other's values, in RULER's words."""

from __future__ import annotations

import random

from modicum.reference import lots
from modicum.reference.pieces import Pen, Sequence


def chain(pen: Pen, length: int, rng: random.Random) -> Sequence:
    """Variables that take each other's values; which of them have a value?"""
    made = pen.open("chain")
    dense = length >= 256 and rng.random() < 0.45  # little but assignments and short questions
    long = length >= 256 and not dense
    lined = long and rng.random() < 0.5  # each assignment on a line of its own, among lines of noise
    if long and length >= 512 and rng.random() < 0.4:
        chain_part(pen, made, 200, True, True, 3, rng)
        made.add(pen.ids("\n\n"), 0)
    chain_part(pen, made, min(length, 512) if dense else length, long, lined, 5, rng, dense)
    return made


def chain_part(
    pen: Pen,
    made: Sequence,
    length: int,
    long: bool,
    lined: bool,
    size: int,
    rng: random.Random,
    dense: bool = False,
) -> None:
    """One text with its questions, up to `length` tokens in all."""
    most = max(1, min(4, (length - len(made.ids)) // (150 if long else 100)))
    chains: dict[str, list[str]] = {}
    for _ in range(length // 85 if dense else 1 if rng.random() < 0.4 else rng.randint(1, most)):
        hops = 2 if dense else rng.randint(1, 2 if length < 256 else 4)
        chains[str(rng.randint(10_000, 99_999))] = [lots.letters(rng, size) for _ in range(hops + 1)]
    lines: list[list[tuple[float, str]]] = []
    for value, names in chains.items():
        places = sorted(rng.random() for _ in names)
        right = [value, *(f"VAR {name}" for name in names)]
        shape = "\nVAR {} = {} " if lined else " VAR {} = {}"
        lines.append([(p, shape.format(n, r)) for p, n, r in zip(places, names, right, strict=False)])
    needles = [pen.ids(text) for _, text in sorted(x for line in lines for x in line)]
    if long and rng.random() < 0.7:
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
        if long:
            questions.add(
                pen.ids(
                    f"\nQuestion: Find all variables that are assigned the value {value} in the text "
                    "above. Answer: According to the chain(s) of variable assignment in the text above, "
                    f"{len(names)} variables are assigned the value {value}, they are:"
                ),
                0,
            )
        else:
            questions.add(pen.ids(f"\nthe value {value}, they are:"), 0)
        for name in names:
            pen.answer(questions, f" {name}")
        questions.add(pen.ids("."), 1)
    pen.bury(needles, length - len(questions.ids), made, rng, noise=lined)
    made.ids += questions.ids
    made.marks += questions.marks
