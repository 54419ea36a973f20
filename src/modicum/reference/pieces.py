"""Sequence, and Pen: token ids with what each of them is, and what all kinds of sequences are made with."""

from __future__ import annotations

import random
from dataclasses import dataclass, field

from tokenizers import Tokenizer

_NOISE = (
    "\nThe grass is green.",
    " The sky is blue.",
    " The sun is yellow.",
    " Here we go.",
    " There and back again.",
)


@dataclass
class Sequence:
    """Token ids, with what each is: 2 for the token of an answer that chooses it, 1 for the others of an
    answer (which follow from the first), -1 for running text, 0 for what is left."""

    kind: str
    ids: list[int] = field(default_factory=list)
    marks: list[int] = field(default_factory=list)

    def add(self, ids: list[int], mark: int) -> None:
        """More tokens of one sort."""
        self.ids += ids
        self.marks += [mark] * len(ids)

    def answer(self, ids: list[int], space: list[int]) -> None:
        """An answer, and which of its tokens chooses it: before a digit `space` is a token of its own."""
        choice = 1 if ids[:1] == space else 0
        self.ids += ids
        self.marks += [2 if i == choice else 1 for i in range(len(ids))]


class Pen:
    """Writes pieces of sequences.

    Args:
        tokenizer: of the model.
        texts: tokenised sentences of each text, in order.
        end: the id that opens a sequence.
    """

    def __init__(self, tokenizer: Tokenizer, texts: list[list[list[int]]], end: int = 0) -> None:
        self._tokenizer = tokenizer
        self._texts = texts
        self._sizes = [sum(map(len, text)) for text in texts]
        self._end = end
        self.words = tokenizer.get_vocab_size()
        self._known: dict[str, list[int]] = {}
        self.space = self.ids(" ")

    def open(self, kind: str) -> Sequence:
        made = Sequence(kind)
        made.add([self._end], 0)
        return made

    def bury(
        self,
        needles: list[list[int]],
        length: int,
        made: Sequence,
        rng: random.Random,
        *,
        noise: bool = False,
    ) -> None:
        """The needles in order, at any depth of filler, so that `made` comes to `length` tokens at most."""
        room = length - len(made.ids) - sum(map(len, needles))
        if room <= 8:
            for needle in needles:
                made.add(needle, 0)
            return
        if noise or rng.random() < 0.25:
            straw = [self.ids(sentence) for sentence in _NOISE]
            hay = [straw[i % len(straw)] for i in range(room // 5)]
        else:
            hay = self.sentences(room, rng)
        places = sorted(rng.randint(0, len(hay)) for _ in needles)
        left = room
        for i, sentence in enumerate([*hay, []]):
            while places and places[0] <= i:
                made.add(needles[len(needles) - len(places)], 0)
                places.pop(0)
            if left > 0:
                made.add(sentence[:left], -1)
                left -= len(sentence)

    def sentences(self, room: int, rng: random.Random) -> list[list[int]]:
        """Consecutive sentences of a text, at least `room` tokens if it is that long."""
        (text,) = rng.choices(self._texts, self._sizes)
        start = rng.randrange(len(text))
        taken: list[list[int]] = []
        while room > 0:
            sentence = text[start % len(text)]
            taken.append(sentence)
            room -= len(sentence)
            start += 1
        return taken

    def filler(self, room: int, rng: random.Random, *, exact: bool = False) -> list[int]:
        joined = [token for sentence in self.sentences(room, rng) for token in sentence]
        return joined[:room] if exact else joined

    def answer(self, made: Sequence, text: str) -> None:
        """Tokens of an answer, marked so."""
        made.answer(self.ids(text), self.space)

    def ids(self, text: str) -> list[int]:
        known = self._known.get(text)
        if known is None:
            known = self._tokenizer.encode(text, add_special_tokens=False).ids if text else []
            if len(self._known) < 50_000:
                self._known[text] = known
        return known

    def answer_list(self, made: Sequence, keys: list[list[int]], values: list[list[list[int]]]) -> None:
        """Each key with its values: "a: 1; a, b: 2 and 3; b, and c: 4."

        Which key is next hangs on the last one, which is some tokens back by then; said once more, it is just
        before, and the next follows it in the question's list as here. A comma always leaves the last key.
        """
        for i, (key, its) in enumerate(zip(keys, values, strict=True)):
            if i:
                made.add(self.ids(";"), 1)
                made.answer(keys[i - 1], self.space)
                made.add(self.ids(self.joint(i, len(keys))), 1)
            made.answer(key, self.space)
            made.add(self.ids(":"), 1)
            for j, value in enumerate(its):
                made.add(self.ids(" and") if j else [], 1)
                made.answer(value, self.space)
        made.add(self.ids("."), 1)

    @staticmethod
    def joint(at: int, count: int) -> str:
        """What stands before the entry `at` of a list of so many, as in RULER's questions."""
        return "" if not at else ", and" if at == count - 1 else ","
