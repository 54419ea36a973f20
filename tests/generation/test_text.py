"""Text from tokens as they come."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from modicum.generation.text import TextStream, decode
from modicum.loading import load
from tests.tiny_model import TINY_MODEL

TOKENIZER: Any = load(TINY_MODEL)[1]


def pieces(tokens: list[int], tokenizer: Any = TOKENIZER) -> list[str]:
    stream = TextStream(tokenizer)
    return [stream.put([token]) for token in tokens] + [stream.end()]


@given(st.lists(st.integers(0, 511), max_size=40))
@hypothesis_settings(max_examples=200, deadline=None)
def test_pieces_of_any_tokens_join_to_the_whole(tokens: list[int]) -> None:
    assert "".join(pieces(tokens)) == decode(TOKENIZER, tokens)


@given(st.text(max_size=30))
@hypothesis_settings(max_examples=100, deadline=None)
def test_pieces_of_any_text_hold_only_whole_characters(text: str) -> None:
    tokens = TOKENIZER(text, add_special_tokens=False)["input_ids"]
    got = pieces(tokens)
    assert "".join(got) == decode(TOKENIZER, tokens)
    if "\N{REPLACEMENT CHARACTER}" not in text:
        assert not any("\N{REPLACEMENT CHARACTER}" in piece for piece in got)


@pytest.mark.parametrize("text", ["naïve café", "日本語のテキスト", "smile 😀😀 here", "line\nbreak\n next"])
def test_text_is_held_back_no_longer_than_a_run_of_byte_tokens(text: str) -> None:
    tokens = TOKENIZER(text + " ok", add_special_tokens=False)["input_ids"]
    names = TOKENIZER.convert_ids_to_tokens(tokens)
    for name, piece in zip(names, pieces(tokens), strict=False):
        assert (piece == "") == name.startswith("<0x") or name == "▁"
    assert "".join(pieces(tokens)).strip() == text + " ok"


def test_unfinished_characters_come_at_the_end() -> None:
    tokens = TOKENIZER("a😀", add_special_tokens=False)["input_ids"][:-1]
    got = pieces(tokens)
    assert got[-1] != ""
    assert "".join(got) == decode(TOKENIZER, tokens)
