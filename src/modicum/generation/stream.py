"""Stream: the text of an answer as it comes."""

from __future__ import annotations

from collections.abc import Generator
from typing import Self

from modicum.generation.answer import Answer
from modicum.generation.result import Generation
from modicum.generation.text import TextStream


class Stream:
    """Text pieces of an answer in the making; joined, they are its text."""

    def __init__(self, answer: Answer) -> None:
        self._answer = answer
        self._steps: Generator[list[list[int]]] = answer.steps()
        self._text: TextStream | None = TextStream(answer.settings.tokenizer)

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> str:
        with self._answer.interrupt:
            for new in self._steps:
                if self._text is not None and (piece := self._text.put(new[0])):
                    return piece
        rest = "" if self._text is None else self._text.end()
        self._text = None
        if not rest:
            raise StopIteration
        return rest

    def close(self) -> None:
        """Stop here; the cache takes in the last token that was handed out."""
        with self._answer.interrupt:
            self._steps.close()
        self._text = None

    @property
    def result(self) -> Generation:
        """The whole answer and what it cost; asked for before the end, it stops the stream."""
        self.close()
        return self._answer.results()[0]
