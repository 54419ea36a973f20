"""Generation on every family of models, and with tokenizers of other kinds."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from modicum.errors import InputError
from modicum.generation.generate import generate, stream
from modicum.generation.text import TextStream, decode
from tests.zoo import ALL, FULL, HYBRID, build

TIGHT: dict[str, Any] = {"budget": 16, "chunk": 8, "n_sink": 2, "recent": 4, "max_new_tokens": 14}
ROWS = ["a longer prompt than the others", "short", "of middling length"]


class Letters:
    """A tokenizer of one token per character."""

    pad_token_id = 0
    eos_token_id = None
    all_special_ids = (0,)

    def __call__(self, text: str, **_: Any) -> dict[str, list[int]]:
        return {"input_ids": [1 + ord(letter) % 119 for letter in text]}

    def decode(self, tokens: list[int], **_: Any) -> str:
        return "".join(chr(96 + token) for token in tokens if token)

    def convert_ids_to_tokens(self, token: int) -> str:
        return chr(96 + token)


@pytest.mark.parametrize("name", ALL)
def test_rows_questions_and_streams(name: str) -> None:
    model, letters = build(name), Letters()
    batch = generate(model, letters, ROWS, **TIGHT)
    batch[0].cache.check_integrity()
    for text, answer in zip(ROWS, batch, strict=True):
        alone = generate(model, letters, text, **TIGHT)
        assert answer.tokens == alone.tokens
        assert "".join(stream(model, letters, text, **TIGHT)) == alone.text
    asked = generate(model, letters, ROWS[0], question=["why?", "who is it"], **TIGHT)
    for question, answer in zip(["why?", "who is it"], asked, strict=True):
        assert answer.tokens == generate(model, letters, ROWS[0], question=question, **TIGHT).tokens


@pytest.mark.parametrize("name", ALL)
def test_all_that_fits_is_as_transformers_has_it(name: str) -> None:
    model, letters = build(name), Letters()
    ids = torch.tensor([letters(ROWS[0])["input_ids"]])
    expected = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=14)
    got = generate(model, letters, ROWS[0], budget=64, chunk=8, n_sink=2, recent=4, max_new_tokens=14)
    assert got.tokens == expected[0, ids.shape[1] :].tolist()


def test_a_table_of_positions_is_not_read_past_its_end() -> None:
    config = GPT2Config(vocab_size=120, n_positions=40, n_embd=32, n_layer=2, n_head=2)
    model, letters = GPT2LMHeadModel(config).eval(), Letters()
    model.generation_config.eos_token_id = None
    assert len(generate(model, letters, "x" * 30, max_new_tokens=10, budget=64, recent=4).tokens) == 10
    with pytest.raises(InputError, match="position 41, the model's table of positions ends at 40"):
        generate(model, letters, "x" * 30, max_new_tokens=11, budget=64, recent=4)


def byte_level() -> PreTrainedTokenizerFast:
    """One token per byte, as GPT-2 and its kind spell what they have no word for."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    inner = Tokenizer(models.BPE(vocab={letter: i for i, letter in enumerate(alphabet)}, merges=[]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=inner)


@pytest.mark.parametrize("text", ["naïve café", "日本語のテキスト", "smile 😀😀", " leading and\n\n lines  "])
def test_byte_level_pieces_come_with_the_last_byte_of_a_character(text: str) -> None:
    tokenizer = byte_level()
    tokens = tokenizer(text)["input_ids"]
    assert len(tokens) == len(text.encode())
    reader = TextStream(tokenizer)
    pieces = [reader.put([token]) for token in tokens]
    assert [piece for piece in pieces if piece] == list(text)
    assert reader.end() == ""


def test_byte_level_pieces_of_bad_bytes_join_to_the_whole() -> None:
    tokenizer = byte_level()
    generator = torch.Generator().manual_seed(0)
    for _ in range(200):
        tokens = torch.randint(256, (30,), generator=generator).tolist()
        reader = TextStream(tokenizer)
        pieces = [reader.put([token]) for token in tokens]
        assert "".join([*pieces, reader.end()]) == decode(tokenizer, tokens)


@pytest.mark.parametrize("name", FULL)
def test_turns_of_a_padded_batch(name: str) -> None:
    """Rows of unequal length, then turns of unequal length: padding in the middle of rows as well."""
    model, letters = build(name), Letters()
    turns = ["and then?", "well", "go on"]
    first = generate(model, letters, ROWS, **TIGHT)
    second = generate(model, letters, turns, cache=first[0].cache, max_new_tokens=9)
    for text, turn, answer in zip(ROWS, turns, second, strict=True):
        alone = generate(model, letters, text, **TIGHT)
        after = generate(model, letters, turn, cache=alone.cache, max_new_tokens=9)
        assert answer.tokens == after.tokens
        assert answer.seen == after.seen == len(text) + 14 + len(turn) + 9


@pytest.mark.parametrize("name", HYBRID)
def test_padding_between_turns_is_warned_of_where_windows_count_it(name: str) -> None:
    model, letters = build(name), Letters()
    first = generate(model, letters, ROWS, **TIGHT)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        even = generate(model, letters, ["even", "even", "even"], cache=first[0].cache, max_new_tokens=9)
    for text, answer in zip(ROWS, even, strict=True):
        alone = generate(model, letters, text, **TIGHT)
        assert answer.tokens == generate(model, letters, "even", cache=alone.cache, max_new_tokens=9).tokens
    with pytest.warns(UserWarning, match="padding between their turns") as caught:
        generate(model, letters, ["a", "bc", "d"], cache=first[0].cache, max_new_tokens=3)
    assert caught[0].filename == __file__
