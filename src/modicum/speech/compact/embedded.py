"""Embedded: the recognizer that modicum carries. Its card is embedded/speech/README.md."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import modicum
from modicum.speech.compact.packed_file import load_packed
from modicum.speech.compact.word_search import WordSearch, read_words
from modicum.speech.recognizer import Recognizer

_FOLDER = Path(modicum.__file__).parent / "embedded" / "speech"
EMBEDDED = _FOLDER / "recognizer.safetensors"
WORDS = _FOLDER / "words.txt"


@cache
def embedded_recognizer() -> Recognizer:
    """Small English: digits, commands to a house and orders of drinks, learned from synthetic speech."""
    return load_packed(EMBEDDED).recognizer


@cache
def embedded_decoder() -> WordSearch:
    """Writes only words that the embedded recognizer has learned."""
    return WordSearch.of(embedded_recognizer().tokens, read_words(WORDS))
