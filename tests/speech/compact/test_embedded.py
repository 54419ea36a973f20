"""The recognizer that modicum carries."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from modicum.speech import read_digits
from modicum.speech.compact.byte_count import file_nbytes, sections
from modicum.speech.compact.embedded import EMBEDDED, WORDS, embedded_decoder, embedded_recognizer
from modicum.speech.compact.onnx_export import _is_for_sherpa
from modicum.speech.compact.packed_file import load_packed, packed_metadata
from modicum.speech.compact.streaming import StreamingRecognizer
from modicum.speech.compact.word_search import read_words
from tests.speech.test_command import command

DIGITS = Path(os.environ.get("MODICUM_DATA", "")) / "fsdd"


def test_it_is_small_and_has_a_card() -> None:
    assert EMBEDDED.stat().st_size <= 1_000_000
    compact = load_packed(EMBEDDED)
    assert EMBEDDED.stat().st_size == file_nbytes(sections(compact), packed_metadata(compact))
    card = (EMBEDDED.parent / "README.md").read_text(encoding="utf-8")
    assert f"{EMBEDDED.stat().st_size:,} bytes" in card
    assert f"{compact.recognizer.model.num_parameters:,} parameters" in card


def test_it_can_be_streamed_and_its_features_are_those_of_sherpa() -> None:
    recognizer = embedded_recognizer()
    samples = 0.1 * torch.randn(16_000, generator=torch.Generator().manual_seed(0))
    stream = StreamingRecognizer(recognizer)
    for part in samples.split(1000):
        stream.accept(part)
    stream.finish()
    assert stream.text == recognizer.transcribe(samples).text
    assert _is_for_sherpa(recognizer)


@pytest.mark.skipif(not DIGITS.is_dir(), reason="MODICUM_DATA names no folder with fsdd")
def test_it_is_what_transcribes_without_a_model() -> None:
    path = read_digits(DIGITS)[0].audio
    code, out, err = command("transcribe", path)
    assert code == 0, err
    assert out == embedded_recognizer().transcribe(path, embedded_decoder()).text + "\n"
    assert set(out.split()) <= set(read_words(WORDS))
