"""Search for words of a list: against all sequences, and its edges."""

from __future__ import annotations

import itertools
import math
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional as F

from modicum.errors import InputError
from modicum.speech import TokenSet
from modicum.speech.compact.word_search import WordSearch, read_words

TOKENS = TokenSet("graphemes", (" ", "a", "b"))
WORDS = st.sets(st.sampled_from(["a", "b", "ab", "ba", "aab", "bb"]), min_size=1)


@given(words=WORDS, frames=st.integers(1, 6), seed=st.integers(0, 999))
def test_with_a_wide_beam_it_finds_the_most_probable_words(words: set[str], frames: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    log_probs = (2 * torch.randn(frames, 4, generator=generator, dtype=torch.float64)).log_softmax(-1)
    found = TOKENS.decode(WordSearch.of(TOKENS, words, beam=100_000)(log_probs))
    texts = [""] + [
        " ".join(some)
        for num in range(1, 4)
        for some in itertools.product(sorted(words), repeat=num)
        if len(" ".join(some)) <= frames
    ]
    assert found in texts
    # A space at the end is left out afterwards, so each text stands for two sequences.
    ended = [text + " " for text in texts if text and len(text) < frames]
    best = max([*texts, *ended], key=lambda text: _log_prob(log_probs, text))
    assert found == best.rstrip() or math.isclose(
        max(_log_prob(log_probs, found), _log_prob(log_probs, found + " ")), _log_prob(log_probs, best)
    )


def _log_prob(log_probs: torch.Tensor, text: str) -> float:
    symbols = [" ab".index(one) + 1 for one in text]
    tokens, size = torch.tensor(symbols, dtype=torch.int64), torch.tensor([len(log_probs)])
    loss = F.ctc_loss(log_probs[:, None], tokens, size, torch.tensor([len(tokens)]), reduction="sum")
    return -float(loss)


@given(words=WORDS, frames=st.integers(1, 12), seed=st.integers(0, 999), beam=st.integers(1, 8))
def test_it_writes_only_words_of_the_list(words: set[str], frames: int, seed: int, beam: int) -> None:
    log_probs = torch.randn(frames, 4, generator=torch.Generator().manual_seed(seed)).log_softmax(-1)
    text = TOKENS.decode(WordSearch.of(TOKENS, words, beam)(log_probs))
    assert text == " ".join(text.split())
    assert set(text.split()) <= words


def test_lists_that_cannot_be_used_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="for models of letters and spaces"):
        WordSearch.of(TokenSet("phones", ("a", "b")), ["a"])
    with pytest.raises(InputError, match="no word of the model's letters"):
        WordSearch.of(TOKENS, ["", "xyz"])
    assert len(WordSearch.of(TOKENS, ["A", "a", "axe"]).words) == 1
    with pytest.raises(InputError, match="cannot read the words"):
        read_words(tmp_path / "none")
    (tmp_path / "words").write_text("one two\nthree\n")
    assert read_words(tmp_path / "words") == ["one", "two", "three"]
