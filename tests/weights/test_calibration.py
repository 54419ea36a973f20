"""Calibration text: windows of it, and what is said where it cannot be used."""

from __future__ import annotations

import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from modicum.errors import InputError
from modicum.weights import calibration
from tests.weights.models import SHAPE


class Letters:
    """A tokenizer with a token per letter."""

    def __call__(self, text: str, **_: Any) -> dict[str, list[int]]:
        return {"input_ids": [ord(letter) for letter in text]}


def test_windows_do_not_overlap_and_those_held_back_are_others() -> None:
    text = "".join(chr(n) for n in range(1, 101))
    ids = calibration.tokens(text, Letters(), 7, 10, seed=3, held=2)
    assert ids.shape == (9, 10)
    assert len(ids.unique()) == 90
    assert torch.equal(ids[:7], calibration.tokens(text, Letters(), 7, 10, seed=3))


@pytest.mark.parametrize(("sequences", "length", "held"), [(8, 20, 1), (50, 2, 6), (3, 101, 0)])
def test_too_little_text_names_a_length_that_fits(sequences: int, length: int, held: int) -> None:
    text = "x" * 100
    with pytest.raises(InputError) as caught:
        calibration.tokens(text, Letters(), sequences, length, held=held)
    message = str(caught.value)
    assert f"needs {sequences} sequences of {length} tokens" in message
    assert (f"and {held} to measure perplexity on" in message) == (held > 0)
    assert f"{(sequences + held) * length:,} tokens, and the text has 100: give more text" in message
    found = re.search(r"length=(\d+)", message)
    assert (found is None) == (100 // (sequences + held) < 2)
    if found:
        assert (
            len(calibration.tokens(text, Letters(), sequences, int(found[1]), held=held)) == sequences + held
        )


def test_text_files_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"there is no .*missing to calibrate on: give a text file"):
        calibration.texts_in(tmp_path / "missing")
    with pytest.raises(InputError, match=r"holds no text files .*: give one with \*\.txt files"):
        calibration.texts_in(tmp_path)
    (tmp_path / "a.txt").write_text("one", encoding="utf-8")
    (tmp_path / "b.txt").write_bytes("zwölf".encode("latin-1"))
    with pytest.raises(InputError, match=r"b\.txt is not UTF-8 \(byte 2\): convert it first"):
        calibration.texts_in(tmp_path)
    (tmp_path / "b.txt").unlink()
    (tmp_path / "b.txt").mkdir()
    with pytest.raises(InputError, match=r"cannot read .*b\.txt"):
        calibration.texts_in(tmp_path)
    assert calibration.texts_in(tmp_path / "a.txt") == ["one"]


def test_sequences_are_no_longer_than_the_context() -> None:
    model = LlamaForCausalLM(LlamaConfig(**{**SHAPE, "intermediate_size": 24}))
    assert calibration.length_for(model) == SHAPE["max_position_embeddings"]
    model.config.max_position_embeddings = 10**6
    assert calibration.length_for(model) == calibration.LONGEST
    unbounded = SimpleNamespace(max_position_embeddings=None)
    model = SimpleNamespace(config=SimpleNamespace(get_text_config=lambda: unbounded))
    assert calibration.length_for(model) == calibration.LONGEST
