"""Chains: RULER's variable tracking, vt.

The wording, the structure and the defaults are the benchmark's definition: NVIDIA/RULER,
scripts/data/synthetic/{constants,variable_tracking}.py and scripts/synthetic.yaml (Apache-2.0; arXiv
2404.06654), with the wording as it is since May 2025: "assigned", which was spelt "assgined" before. Ours is
the code. Differences: no space ends the prompt; every chain of the worked example has a value of its own;
below 2,000 tokens the example takes a quarter of the length, where RULER's takes 500 tokens always.
"""

from __future__ import annotations

import random
import string
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, ClassVar

from modicum.tasks.generated import Body, Draft, Generated, answer_prefix_of
from modicum.tasks.haystack import NOISE, haystack
from modicum.tasks.measure import count, largest
from modicum.tasks.needle import DEPTHS, bury

BEFORE = "Memorize and track the chain(s) of variable assignment hidden in the following text.\n\n"
AFTER = (
    "\nQuestion: Find all variables that are assigned the value {query} in the text above."
    " Answer: According to the chain(s) of variable assignment in the text above, {num_v} variables are "
    "assigned the value {query}, they are:"
)
EXAMPLE = 500
"""Tokens of the worked example."""


@dataclass(frozen=True, kw_only=True)
class Chains(Generated):
    """Variables that take each other's values, hidden in other text; which of them have this value?

    Filler is counted in units of noise or in words of text.
    """

    HAYS: ClassVar = ("noise", "essay")

    kind: str = "vt"
    chains: int = 1
    hops: int = 4
    """How often a value is handed on: a chain has hops + 1 variables."""
    shots: int = 1
    """1: a worked example comes first, as in RULER; 0: none."""
    hay: str = "noise"
    haystack: str | None = None
    """A text file or a folder of them for hay=essay; None is `modicum.sample_text()`."""
    max_new_tokens: int = 30

    def __post_init__(self) -> None:
        self.check("chains", 1)
        self.check("hops", 1)
        self.check("shots", 0, 1)
        self.check("max_new_tokens", 1)
        self.among("hay", self.HAYS)

    def draft(self, index: int, length: int, tokenizer: Any, seed: int) -> Draft:
        """See `Generated.draft`."""
        rng = self.stream(index, length, seed)
        before = BEFORE
        if self.shots:
            before = self._example(rng, min(EXAMPLE, length // 4), tokenizer) + BEFORE
        values, names = self._draw(5, rng)
        question = AFTER.format(query=values[0], num_v=self.hops + 1)
        return Draft(
            build=self._builder(before, values, names, rng.random()),
            least=self._least,
            question=question,
            answers=tuple(names[0]),
            answer_prefix=answer_prefix_of(question),
        )

    @property
    def _least(self) -> int:
        return self.hops + 1 if self.hay == "noise" else 1

    def shorter(self) -> str:
        return super().shorter() + (", or shots=0" if self.shots else "")

    def _example(self, rng: random.Random, room: int, tokenizer: Any) -> str:
        values, names = self._draw(3, rng)
        build = self._builder(BEFORE, values, names, rng.random())
        question = AFTER.format(query=values[0], num_v=self.hops + 1)

        def size(n: int) -> int:
            return count(tokenizer, build(n).text + question, special=False)

        n = largest(size, room, self._least, EXAMPLE) or self._least
        return f"{build(n).text}{question} {' '.join(names[0])}\n\n"

    def _draw(self, letters: int, rng: random.Random) -> tuple[list[str], list[list[str]]]:
        """The chains' values and their variables, all different."""
        names: dict[str, None] = {}
        while len(names) < self.chains * (self.hops + 1):
            names["".join(rng.choices(string.ascii_uppercase, k=letters))] = None
        values = [str(value) for value in rng.sample(range(10_000, 99_999), self.chains)]
        ordered, each = list(names), self.hops + 1
        return values, [ordered[i : i + each] for i in range(0, len(ordered), each)]

    def _builder(
        self, before: str, values: list[str], names: list[list[str]], seed: float
    ) -> Callable[[int], Body]:
        lines = [
            [f"VAR {own[0]} = {value}"] + [f"VAR {name} = VAR {other} " for other, name in pairwise(own)]
            for value, own in zip(values, names, strict=True)
        ]

        def in_noise(n: int) -> Body:
            rng = random.Random(f"{seed}/{n}")
            pieces: list[tuple[str, bool]] = [(NOISE, False)] * n
            for i, chain in enumerate(lines):
                for j, place in enumerate(sorted(rng.sample(range(len(pieces)), len(chain)))):
                    pieces.insert(place + j, (chain[j], i == 0))
            return Body.join(before, pieces, "\n")

        def in_text(n: int) -> Body:
            rng = random.Random(f"{seed}")
            turns = [i for i, chain in enumerate(lines) for _ in chain]
            rng.shuffle(turns)
            left = [iter(chain) for chain in lines]
            needles = [(next(left[i]).strip() + ".", i == 0) for i in turns]
            fractions = sorted(rng.sample(DEPTHS * (1 + (len(needles) - 1) // len(DEPTHS)), len(needles)))
            hay = haystack(self.haystack).first(n)
            return bury(before, hay, needles, [int(len(hay) * fraction) for fraction in fractions], " ")

        return in_noise if self.hay == "noise" else in_text
