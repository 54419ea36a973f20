"""Embedded: the recognizer that modicum carries. Its card is embedded/speech/README.md."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import modicum
from modicum.speech.compact.packed_file import load_packed
from modicum.speech.recognizer import Recognizer

EMBEDDED = Path(modicum.__file__).parent / "embedded" / "speech" / "recognizer.safetensors"


@cache
def embedded_recognizer() -> Recognizer:
    """Small English: digits, commands to a house and orders of drinks, learned from synthetic speech."""
    return load_packed(EMBEDDED).recognizer
