"""Frequent: RULER's common words (cwe) and frequent coded words (fwe).

The wording, the structure and the defaults are the benchmark's definition: NVIDIA/RULER,
scripts/data/synthetic/{constants,common_words_extraction,freq_words_extraction}.py and scripts/synthetic.yaml
(Apache-2.0; arXiv 2404.06654). Ours is the code. Differences: where a list needs more words than
`wonderwords` has, adjective-noun pairs come in (RULER: a dictionary); a text of coded words whose third and
fourth word would be equally frequent is made a little shorter, so that its answer is certain.
"""

from __future__ import annotations

import random
import string
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch

from modicum.tasks.generated import Body, Draft, Generated, answer_prefix_of
from modicum.tasks.words import every, pair

COMMON = (
    "Below is a numbered list of words. In these words, some appear more often than others. Memorize the "
    "ones that appear most often.\n",
    "\nQuestion: What are the {num_cw} most common words in the above list?"
    " Answer: The top {num_cw} words that appear most often in the list are:",
)
CODED = (
    "Read the following coded text and track the frequency of each coded word. Find the three most "
    "frequently appeared coded words. ",
    "\nQuestion: Do not provide any explanation. Please ignore the dots '....'. What are the three most "
    "frequently appeared words in the above coded text?"
    " Answer: According to the coded text above, the three most frequently appeared words are:",
)


@dataclass(frozen=True, kw_only=True)
class CommonWords(Generated):
    """A numbered list of words in which some come more often; which ones?

    Filler is counted in other words.
    """

    kind: str = "cwe"
    common: int = 10
    """How many words come more often, and are asked for."""
    repeats: int | None = None
    """How often each of them comes; None as in RULER: 30, or 6 at lengths below 4,096."""
    rare: int | None = None
    """How often each other word comes; None as in RULER: 3, or 1 at lengths below 4,096."""
    shots: int = 1
    """How many worked examples come first."""
    max_new_tokens: int = 120

    def __post_init__(self) -> None:
        for name in ("common", "repeats", "rare", "max_new_tokens"):
            self.check(name, 1)
        self.check("shots", 0)

    def draft(self, index: int, length: int, tokenizer: Any, seed: int) -> Draft:
        """See `Generated.draft`."""
        rng = self.stream(index, length, seed)
        short = length < 4096
        question = COMMON[1].format(num_cw=self.common)
        before = ""
        for _ in range(self.shots):
            size, often, seldom = (20, 3, 1) if short else (40, 10, 3)
            words = rng.sample(every(), max(size, 2 * self.common))
            shown = self._listed(words, often, seldom, rng.random())
            answer = " ".join(f"{i}. {word}" for i, word in enumerate(words[: self.common], 1))
            before += f"{COMMON[0]}{shown}{question} {answer}\n"
        words = rng.sample(every(), len(every()))
        often = self.repeats or (6 if short else 30)
        seldom = self.rare or (1 if short else 3)
        order = rng.random()

        def build(n: int) -> Body:
            more = self.stream(index, length, seed, "more")
            while len(words) < self.common + n:
                words.append(pair(more))
            taken = words[: self.common + n]
            return Body(before + COMMON[0] + self._listed(taken, often, seldom, order))

        return Draft(
            build=build,
            least=1,
            question=question,
            answers=tuple(words[: self.common]),
            answer_prefix=answer_prefix_of(question),
        )

    def shorter(self) -> str:
        return super().shorter() + (", or shots=0" if self.shots else "")

    def _listed(self, words: list[str], often: int, seldom: int, order: float) -> str:
        listed = words[: self.common] * often + words[self.common :] * seldom
        random.Random(f"{order}").shuffle(listed)
        return " ".join(f"{i}. {word}" for i, word in enumerate(listed, 1))


@dataclass(frozen=True, kw_only=True)
class FrequentWords(Generated):
    """Made-up words whose counts fall off as a power of their rank; which three come most often?

    Word k of n comes n · k^-alpha / zeta(alpha) times, rounded down; the first is "...", to be ignored.
    """

    kind: str = "fwe"
    alpha: float = 2.0
    letters: int = 6
    """Of a word."""
    vocabulary: int | None = None
    """How many words there are; None as in RULER: one for each 50 tokens of the text."""
    max_new_tokens: int = 50

    def __post_init__(self) -> None:
        self.check("alpha", 1.01)
        self.check("letters", 3)
        self.check("vocabulary", 5, 26**3)
        self.check("max_new_tokens", 1)

    def draft(self, index: int, length: int, tokenizer: Any, seed: int) -> Draft:
        """See `Generated.draft`."""
        rng = self.stream(index, length, seed)
        wanted = self.vocabulary or max(5, (length - self.max_new_tokens) // 50)
        names: dict[str, None] = {}
        while len(names) < wanted:
            names["".join(rng.choices(string.ascii_lowercase, k=self.letters))] = None
        words = ["...", *list(names)[1:]]
        counts = _counter(self.alpha, wanted)
        order = rng.random()

        def certain(n: int) -> bool:
            shares = counts(n)
            return shares[3] > (shares[4] if wanted > 4 else 0)

        least = next(n for n in range(1, 2**24) if certain(n))

        def build(n: int) -> Body:
            while not certain(n):
                n -= 1
            coded = [word for word, times in zip(words, counts(n), strict=True) for _ in range(times)]
            random.Random(f"{order}").shuffle(coded)
            return Body(CODED[0] + " ".join(coded))

        return Draft(
            build=build,
            least=least,
            question=CODED[1],
            answers=tuple(words[1:4]),
            answer_prefix=answer_prefix_of(CODED[1]),
        )


def _counter(alpha: float, words: int) -> Callable[[int], list[int]]:
    whole = _zeta(alpha)
    shares = [k**-alpha / whole for k in range(1, words + 1)]
    return lambda n: [int(n * share) for share in shares]


@cache
def _zeta(alpha: float) -> float:
    """Riemann's zeta function."""
    return float(torch.special.zeta(torch.tensor(alpha, dtype=torch.float64), 1.0))
