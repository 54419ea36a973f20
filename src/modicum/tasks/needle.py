"""Needle: RULER's needles in a haystack, niah_single_1 to niah_multiquery.

The wording, the eight kinds and their numbers are the benchmark's definition: NVIDIA/RULER,
scripts/data/synthetic/{constants,niah}.py and scripts/synthetic.yaml (Apache-2.0; arXiv 2404.06654).
Ours are the code, the cutting of sentences (RULER: NLTK's punkt) and the default text (RULER: essays of
P. Graham, which are not free to pass on). Keys and values of one sample are all different from each other.
"""

from __future__ import annotations

import random
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

from modicum.errors import InputError
from modicum.tasks.generated import Body, Draft, Generated
from modicum.tasks.haystack import NOISE, haystack
from modicum.tasks.words import pair

TEMPLATE = (
    "Some special magic {type_needle_v} are hidden within the following text. Make sure to memorize it. I "
    "will quiz you about the {type_needle_v} afterwards.\n",
    "\nWhat are all the special magic {type_needle_v} for {query} mentioned in the provided text?"
    " The special magic {type_needle_v} for {query} mentioned in the provided text are",
)
"""Before and after the haystack; the answer's prefix is the second sentence after it."""
NEEDLE = "One of the special magic {type_needle_v} for {key} is: {value}."
DEPTHS = [round(100 * i / 39) / 100 for i in range(40)]
"""Where needles may be in running text: 40 places from its start to its end."""
NIAH: dict[str, dict[str, Any]] = {
    "niah_single_1": {"hay": "noise"},
    "niah_single_2": {},
    "niah_single_3": {"value": "uuids"},
    "niah_multikey_1": {"keys": 4},
    "niah_multikey_2": {"hay": "needle"},
    "niah_multikey_3": {"hay": "needle", "key": "uuids", "value": "uuids"},
    "niah_multivalue": {"values": 4},
    "niah_multiquery": {"queries": 4},
}
"""What makes each kind, beside the defaults of `Needle`."""

_GOLDEN = (5**0.5 - 1) / 2
_DRAWS: dict[str, Callable[[random.Random], str]] = {
    "words": pair,
    "numbers": lambda rng: str(rng.randint(1_000_000, 9_999_999)),
    "uuids": lambda rng: str(uuid.UUID(int=rng.getrandbits(128), version=4)),
}


@dataclass(frozen=True, kw_only=True)
class Needle(Generated):
    """Sentences that give keys values, hidden in other text; which values do these keys have?

    Filler is counted in words of text, in units of noise, or in needles that nobody asks for.
    """

    HAYS: ClassVar = ("noise", "essay", "needle")

    hay: str = "essay"
    """"essay": running text; "noise": five short sentences again and again; "needle": other needles."""
    key: str = "words"
    """"words" (adjective-noun), "numbers" (of seven digits) or "uuids"."""
    value: str = "numbers"
    keys: int = 1
    """How many keys have values; at least `queries`."""
    values: int = 1
    """How many values each key has."""
    queries: int = 1
    """How many keys are asked for."""
    each: bool = False
    """Ask about each key of a context in turn: samples i·keys to i·keys + keys - 1 are of context i."""
    depth: float | str | None = None
    """Of the (first) needle asked for, 0 to 1; "spread": evenly over the indices; None: drawn as in RULER."""
    haystack: str | None = None
    """A text file or a folder of them for "essay"; None is `modicum.sample_text()`."""

    def __post_init__(self) -> None:
        for name in ("keys", "values", "queries", "max_new_tokens"):
            self.check(name, 1)
        self.check("depth", 0, 1)
        self.among("hay", self.HAYS)
        self.among("key", tuple(_DRAWS))
        self.among("value", tuple(_DRAWS))
        if isinstance(self.depth, str) and self.depth != "spread":
            raise InputError(f"{self.kind}: depth={self.depth!r} is unknown; give 0 to 1, or spread")

        if self.each and (self.queries > 1 or self.keys == 1 or self.depth is not None):
            raise InputError(
                f"{self.kind}: each=true asks about one key after the other: give several keys, one query, "
                f"no depth; not keys={self.keys}, queries={self.queries} and depth={self.depth}"
            )

    @property
    def questions(self) -> int:
        """How many samples in a row ask about the same context."""
        return self.keys if self.each else 1

    def presets(self) -> dict[str, Any]:
        return NIAH[self.kind]

    def draft(self, index: int, length: int, tokenizer: Any, seed: int) -> Draft:
        """See `Generated.draft`."""
        index, turn = divmod(index, self.questions)
        rng = self.stream(index, length, seed)
        drawn: set[str] = set()
        facts = [
            (self._new(self.key, drawn, rng), [self._new(self.value, drawn, rng) for _ in range(self.values)])
            for _ in range(max(self.keys, self.queries))
        ]
        asked = [turn] if self.each else rng.sample(range(len(facts)), self.queries)
        needles = [
            (self._sentence(key, value), i in asked)
            for i, (key, values) in enumerate(facts)
            for value in values
        ]
        fractions = rng.sample(DEPTHS * (1 + (len(needles) - 1) // len(DEPTHS)), len(needles))
        forced = self._forced(index)
        before, question = self._worded([facts[i][0] for i in asked])
        others = tuple(self._worded([key])[1] for key, _ in facts) if self.each else ()
        straws: list[str] = []
        straw_rng = self.stream(index, length, seed, "straws")

        def build(n: int) -> Body:
            if self.hay == "essay":
                hay = haystack(self.haystack).first(n)
                places = [int(len(hay) * fraction) for fraction in fractions]
            else:
                if self.hay == "needle":
                    while len(straws) < n:
                        key, value = (self._new(what, drawn, straw_rng) for what in (self.key, self.value))
                        straws.append(self._sentence(key, value))
                hay = straws[:n] if self.hay == "needle" else [NOISE] * n
                places = self.stream(index, length, seed, n).sample(range(n), len(needles))
            if forced is not None:
                places[asked[0] * self.values] = int(len(hay) * forced)
            return bury(before, hay, needles, places, " " if self.hay == "essay" else "\n")

        return Draft(
            build=build,
            least=1 if self.hay == "essay" else len(needles),
            question=question,
            others=others,
            answer_prefix=question[question.index("? ") + 1 :],
            answers=tuple(value for i in asked for value in facts[i][1]),
        )

    def _forced(self, index: int) -> float | None:
        if self.depth == "spread":
            return index * _GOLDEN % 1.0  # any number of indices in a row lies evenly
        return None if self.depth is None else float(self.depth)

    def _worded(self, keys: list[str]) -> tuple[str, str]:
        """Before the haystack, and after it; in the singular for a single answer."""
        what = self.value
        before, after = TEMPLATE
        if self.queries * self.values == 1:
            what = what[:-1]
            before = before.replace("Some", "A").replace(" are ", " is ")
            after = after.replace("are all", "is").removesuffix("are") + "is"
        query = keys[0] if len(keys) == 1 else f"{', '.join(keys[:-1])}, and {keys[-1]}"
        return before.format(type_needle_v=what), after.format(type_needle_v=what, query=query)

    def _sentence(self, key: str, value: str) -> str:
        return NEEDLE.format(type_needle_v=self.value, key=key, value=value)

    def _new(self, what: str, drawn: set[str], rng: random.Random) -> str:
        while (made := _DRAWS[what](rng)) in drawn:
            pass
        drawn.add(made)
        return made


def bury(
    before: str, hay: list[str], needles: list[tuple[str, bool]], places: list[int], between: str
) -> Body:
    """Each needle (text, whether it is asked for) in front of the piece of hay that its place counts to."""
    pieces: list[tuple[str, bool]] = []
    at = 0
    for place, i in sorted((place, i) for i, place in enumerate(places)):
        pieces += [(straw, False) for straw in hay[at:place]]
        pieces.append(needles[i])
        at = place
    pieces += [(straw, False) for straw in hay[at:]]
    return Body.join(before, pieces, between)
