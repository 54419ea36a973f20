"""A command model without audio: a recording's samples are what it hears."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from modicum.errors import InputError
from modicum.speech import save_audio
from modicum.speech.grammar import Recording
from modicum.speech.grammar.alignment import edit_table
from modicum.speech.grammar.command_model import Heard

LETTERS = " abcdefghijklmnopqrstuvwxyz"


class LetterModel:
    """Hears the letters that `written` made into samples; a score is minus the edits to them."""

    name = "letters"
    units = "graphemes"
    symbols = tuple(LETTERS)
    digest = "0123456789abcdef"
    sample_rate = 16_000

    def __init__(self) -> None:
        self.num_scored = 0

    def forms(self, word: str) -> tuple[str, ...]:
        if unknown := set(word) - set(LETTERS):
            raise InputError(f"{min(unknown)!r} in {word!r} is not among the letters")
        return (word,)

    def split(self, form: str) -> tuple[str, ...]:
        return tuple(form)

    def join(self, units: Sequence[str]) -> str:
        return " ".join("".join(units).split())

    def hear(self, samples: Tensor, num_best: int) -> list[Heard]:
        return [Heard(tuple(self._text(samples)), 1.0)]

    def score(self, samples: Tensor, expressions: Sequence[tuple[str, ...]]) -> tuple[np.ndarray, float]:
        self.num_scored += 1
        heard = self._text(samples)
        found = [-float(edit_table(" ".join(forms), heard)[-1, -1]) for forms in expressions]
        return np.array(found, dtype=np.float32), 0.0

    def _text(self, samples: Tensor) -> str:
        levels = (samples[::100] * 64).round().long() - 1
        return "".join(LETTERS[int(one)] for one in levels)


def written(folder: Path, heard: str, text: str = "", speaker: str = "") -> Recording:
    """A file in which the model hears this."""
    name = hashlib.sha256(f"{heard} {text} {speaker}".encode()).hexdigest()[:12]
    path = folder / f"{name}.wav"
    levels = torch.tensor([LETTERS.index(letter) + 1 for letter in heard]) / 64
    folder.mkdir(parents=True, exist_ok=True)
    save_audio(path, levels.repeat_interleave(100))
    return Recording(path, text, speaker=speaker)
