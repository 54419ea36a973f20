"""Command model: what grammar search asks of an acoustic model, and the models there are."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
from torch import Tensor

SPHINX = "pocketsphinx"
"""The name of its US-English model."""

EMBEDDED = "embedded"
"""The name of the recognizer that modicum carries."""

Form = str
"""One way in which a word is written for a model: letters, or phones with spaces between."""


@dataclass(frozen=True)
class Heard:
    """A decode of free speech."""

    units: tuple[str, ...]
    """Letters and spaces, or phones."""
    weight: float
    """Its share among the decodes of its recording, which sum up to 1."""


class CommandModel(Protocol):
    """An acoustic model that scores expressions, which are forms of words in order."""

    @property
    def name(self) -> str:
        """As people know it."""

    @property
    def units(self) -> str:
        """What forms are written in: "graphemes", "phones" or "arpabet"."""

    @property
    def symbols(self) -> tuple[str, ...]:
        """All that a form may have."""

    @property
    def digest(self) -> str:
        """Stands for all that scores depend on."""

    @property
    def sample_rate(self) -> int:
        """Of its input, per second."""

    def forms(self, word: str) -> tuple[Form, ...]:
        """How a word is written before anything is learned, the usual one first.

        Raises:
            InputError: the model has no units for it.
        """

    def split(self, form: Form) -> tuple[str, ...]:
        """The units of a form."""

    def join(self, units: Sequence[str]) -> Form:
        """The form of units."""

    def hear(self, samples: Tensor, num_best: int) -> list[Heard]:
        """The most probable free decodes of samples [n], at most `num_best`; the first one is the best."""

    def score(self, samples: Tensor, expressions: Sequence[tuple[Form, ...]]) -> tuple[np.ndarray, float]:
        """Log-scores [expressions] float32 of samples [n], and the score of the free decode.

        A score is that of the whole recording. -inf: the recording is too short for the expression.
        """


def open_model(name: str | Path) -> CommandModel:
    """A model by its name: "embedded", "pocketsphinx", or a recognizer's folder or packed file.

    Raises:
        InputError: pocketsphinx is not installed, or the recognizer is none for CTC.
        ModelError: there is no recognizer there, or it is damaged.
    """
    if str(name) == SPHINX:
        from modicum.speech.grammar.sphinx_model import SphinxModel

        return SphinxModel()
    from modicum.speech.grammar.ctc_model import CtcModel

    if str(name) == EMBEDDED:
        from modicum.speech.compact.embedded import embedded_recognizer

        return CtcModel(embedded_recognizer(), EMBEDDED)
    from modicum.speech.recognizer import Recognizer

    return CtcModel(Recognizer.load(name), str(name))
