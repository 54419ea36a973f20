"""Word search: CTC prefix beam search that writes only words of a list.

The search is `PrefixBeamSearch`, without a language model: all words are as probable as each other, and a
prefix goes on only with letters that lead to some word of the list. What is said beside the list comes out as
words of it that sound alike.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from torch import Tensor

from modicum.errors import InputError
from modicum.speech.decoding import PrefixBeamSearch
from modicum.speech.tokens import TokenSet, normalize_text

_NUM_TOKENS = 10
"""Most probable classes of a frame with which prefixes are extended: others cost time and seldom win."""

Word = tuple[int, ...]
"""The classes of its letters."""


@dataclass(frozen=True)
class WordSearch(PrefixBeamSearch):
    """Log-probabilities [T, C] -> tokens of words of the list, with a space between.

    Make it by `WordSearch.of`.

    Attributes:
        words: the list, as classes.
        space: class of the space.
    """

    words: frozenset[Word] = frozenset()
    space: int = 0

    @classmethod
    def of(cls, tokens: TokenSet, words: Iterable[str], beam: int = 16) -> WordSearch:
        """For a model's tokens and words as text. Words with letters that it does not know are left out.

        Raises:
            InputError: the tokens are no graphemes with a space, or no word is left.
        """
        if tokens.kind != "graphemes" or " " not in tokens.symbols:
            raise InputError("a list of words is for models of letters and spaces: leave it out")
        known = set(tokens.symbols) - {" "}
        texts = {normalize_text(word) for word in words} - {""}
        coded = frozenset(tuple(tokens.encode(text)) for text in texts if set(text) <= known)
        if not coded:
            raise InputError("the list has no word of the model's letters: give words, one a line")
        return cls(beam, _NUM_TOKENS, words=coded, space=tokens.symbols.index(" ") + 1)

    def __call__(self, log_probs: Tensor) -> list[int]:
        """The most probable words; a word that the audio cuts off is left out."""
        found = [one.tokens for one in self.search(log_probs)]
        whole = [one for one in found if self._last_word(one) in self.words | {()}]
        best = whole[0] if whole else found[0][: len(found[0]) - len(self._last_word(found[0]))]
        return list(best[:-1] if best[-1:] == (self.space,) else best)

    def _extend(
        self, beams: dict[Word, tuple[float, float]], frame: list[float], tokens: list[int]
    ) -> dict[Word, tuple[float, float]]:
        found = super()._extend(beams, frame, tokens)
        return {prefix: ends for prefix, ends in found.items() if self._is_allowed(prefix)}

    def _is_allowed(self, prefix: Word) -> bool:
        """Of a prefix whose own prefixes are allowed."""
        if prefix[-1:] == (self.space,):
            return self._last_word(prefix[:-1]) in self.words
        return self._last_word(prefix) in self._beginnings

    def _last_word(self, prefix: Word) -> Word:
        """What follows the last space."""
        at = len(prefix)
        while at and prefix[at - 1] != self.space:
            at -= 1
        return prefix[at:]

    @cached_property
    def _beginnings(self) -> frozenset[Word]:
        return frozenset(word[:size] for word in self.words for size in range(len(word) + 1))


def read_words(path: str | Path) -> list[str]:
    """The words of a text file, which has spaces or line ends between.

    Raises:
        InputError: it cannot be read.
    """
    try:
        return Path(path).read_text(encoding="utf-8-sig").split()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"cannot read the words in {path} ({error}): give a text file") from error
