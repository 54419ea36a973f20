"""The sequences the reference model learns from: each a context, questions about it, and their answers.

A sequence is made of pieces that are tokenised apart, so that it is known which tokens are an answer's. The
wording of the needle, chain and counting tasks is that of RULER (`modicum.tasks`), beside shorter forms that
fit into the first, short sequences of the curriculum.
"""

from __future__ import annotations

import random
from collections.abc import Callable

from tokenizers import Tokenizer

from modicum.reference.chains import chain
from modicum.reference.copies import copy
from modicum.reference.counts import count
from modicum.reference.exact import exact
from modicum.reference.needles import keys, needle
from modicum.reference.pieces import Pen, Sequence
from modicum.reference.tables import back, several, table


def text(pen: Pen, length: int, rng: random.Random) -> Sequence:
    """Running text."""
    made = pen.open("text")
    made.add(pen.filler(length - 1, rng, exact=True), -1)
    return made


_MAKERS: dict[str, Callable[[Pen, int, random.Random], Sequence]] = {
    "copy": copy,
    "exact": exact,
    "table": table,
    "back": back,
    "several": several,
    "keys": keys,
    "needle": needle,
    "chain": chain,
    "count": count,
    "text": text,
}
KINDS = tuple(_MAKERS)


class Writer:
    """Draws sequences.

    Args:
        tokenizer: of the model.
        texts: tokenised sentences of each text, in order.
        end: the id that opens a sequence.
    """

    def __init__(self, tokenizer: Tokenizer, texts: list[list[list[int]]], end: int = 0) -> None:
        self._pen = Pen(tokenizer, texts, end)

    def draw(self, kind: str, length: int, rng: random.Random) -> Sequence:
        """A sequence of exactly `length` tokens."""
        made = _MAKERS[kind](self._pen, length, rng)
        if len(made.ids) < length:  # text after the answers
            made.add(self._pen.filler(length - len(made.ids), rng, exact=True), -1)
        del made.ids[length:], made.marks[length:]
        return made
