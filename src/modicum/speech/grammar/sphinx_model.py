"""Sphinx model: pocketsphinx's US-English acoustic model as a `CommandModel`.

pocketsphinx itself computes the likelihood of every state at every frame, once for a recording, and decodes
phones freely. From these likelihoods all expressions are scored here, with the same models of phones in
context (see `PhoneChains`): it has no call that scores many expressions.
"""

from __future__ import annotations

import hashlib
import math
import struct
import tempfile
import warnings
import weakref
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from modicum.errors import InputError, ModelError
from modicum.packages import import_package
from modicum.speech.grammar.command_model import SPHINX, Form, Heard
from modicum.speech.grammar.letter_to_sound import letter_to_sound
from modicum.speech.grammar.phone_scores import PhoneChains, free_score
from modicum.speech.grammar.sphinx_definition import SphinxDefinition

_SAMPLES = 16_000
_LOG_STEP = math.log(1.0001) * 1024
"""A step of the whole numbers in which pocketsphinx keeps likelihoods: log base 1.0001, 10 bits shifted."""

_FREE = {"lw": 2.0, "beam": 1e-20, "pbeam": 1e-20, "cmn": "batch", "compallsen": True}
"""Of the phone decoder: the first three as its documentation has them; normalisation over the recording."""


def import_pocketsphinx() -> Any:
    """The module.

    Raises:
        InputError: it is not installed.
    """
    return import_package("pocketsphinx", "grammar")


class SphinxModel:
    """The US-English model that comes with the package pocketsphinx.

    Raises:
        InputError: the package is not installed.
        ModelError: the model is not as this file knows it.
    """

    name = SPHINX
    units = "arpabet"
    sample_rate = _SAMPLES

    def __init__(self) -> None:
        self._package = import_pocketsphinx()
        self._folder = Path(self._package.get_model_path()) / "en-us"
        self.definition = SphinxDefinition.read(self._folder / "en-us")
        fillers = set(self.definition.fillers)
        self.symbols = tuple(x for at, x in enumerate(self.definition.phones) if at not in fillers)
        self._known: tuple[bytes, tuple[np.ndarray, tuple[str, ...]]] | None = None
        self._chained: tuple[tuple[tuple[Form, ...], ...], PhoneChains] | None = None

    @cached_property
    def digest(self) -> str:
        """Of the model's files."""
        sha = hashlib.sha256()
        for path in sorted((self._folder / "en-us").iterdir()):
            sha.update(path.name.encode())
            sha.update(path.read_bytes())
        return sha.hexdigest()[:16]

    def forms(self, word: str) -> tuple[Form, ...]:
        """The pronunciations of its dictionary; for another word a guess by rules, with a warning.

        Raises:
            InputError: no letter of the word has a phone.
        """
        found = self.pronunciations(word)
        if found:
            return found
        guess = letter_to_sound(word)
        if not guess:
            raise InputError(
                f"{word!r} is not in pocketsphinx's dictionary and has no English letters: spell the command "
                "as it sounds in English"
            )
        warnings.warn(
            f"{word!r} is not in pocketsphinx's dictionary: taken as {' '.join(guess)}, by rules",
            stacklevel=2,
        )
        return (" ".join(guess),)

    def pronunciations(self, word: str) -> tuple[Form, ...]:
        """Those of its dictionary; none for a word that it does not have."""
        return self._dictionary.get(word, ())

    def split(self, form: Form) -> tuple[str, ...]:
        """Phones."""
        return tuple(form.split())

    def join(self, units: Sequence[str]) -> Form:
        """Phones with spaces between."""
        return " ".join(units)

    def hear(self, samples: Tensor, num_best: int) -> list[Heard]:
        """The phones of its free decoder, fillers left out; there is one decode, whatever `num_best`."""
        _, phones = self._observed(samples)
        return [Heard(phones, 1.0)]

    def score(self, samples: Tensor, expressions: Sequence[tuple[Form, ...]]) -> tuple[np.ndarray, float]:
        """Viterbi log-likelihoods; that of the free decode is of a loop of all phones."""
        scores, _ = self._observed(samples)
        return self._chains(tuple(expressions)).scores(scores), free_score(scores, self.definition)

    def _chains(self, expressions: tuple[tuple[Form, ...], ...]) -> PhoneChains:
        """Of expressions. Those of the last call are kept, for the next recording."""
        if self._chained is None or self._chained[0] != expressions:
            words = [[form.split() for form in forms] for forms in expressions]
            self._chained = expressions, PhoneChains.of(self.definition, words)
        return self._chained[1]

    def _observed(self, samples: Tensor) -> tuple[np.ndarray, tuple[str, ...]]:
        """Log-likelihoods [frames, senones] float32, and phones. Those of the last recording are kept."""
        data = (samples.clamp(-1, 1) * 32_767).round().numpy().astype(np.int16).tobytes()
        if self._known is None or self._known[0] != data:
            self._known = (data, self._run(data))
        return self._known[1]

    def _run(self, data: bytes) -> tuple[np.ndarray, tuple[str, ...]]:
        decoder, log = self._decoder
        decoder.reinit_feat()  # else what it keeps of the recording before changes the scores of this one
        decoder.start_utt()
        decoder.process_raw(data, full_utt=True)
        decoder.end_utt()
        segments = [segment.word for segment in decoder.seg() or ()]
        try:
            (path,) = Path(log.name).iterdir()
            scores = _read_senones(path.read_bytes())
            path.unlink()
        except (OSError, ValueError) as error:
            raise ModelError(
                f"pocketsphinx did not log its scores as it should ({error}): install pocketsphinx 5"
            ) from error
        return scores, tuple(one for one in segments if one in self.symbols)

    @cached_property
    def _decoder(self) -> tuple[Any, Any]:
        log = tempfile.TemporaryDirectory(prefix="modicum-sphinx-")
        weakref.finalize(self, log.cleanup)
        decoder = self._package.Decoder(
            hmm=str(self._folder / "en-us"),
            allphone=str(self._folder / "en-us-phone.lm.bin"),
            senlogdir=log.name,
            loglevel="FATAL",
            **_FREE,
        )
        return decoder, log

    @cached_property
    def _dictionary(self) -> dict[str, tuple[Form, ...]]:
        found: dict[str, list[Form]] = {}
        with open(self._folder / "cmudict-en-us.dict", encoding="utf-8") as file:
            for line in file:
                word, _, phones = line.strip().partition(" ")
                found.setdefault(word.partition("(")[0], []).append(" ".join(phones.split()))
        return {word: tuple(dict.fromkeys(forms)) for word, forms in found.items()}


def _read_senones(data: bytes) -> np.ndarray:
    """Log-likelihoods [frames, senones] float32 of a file that pocketsphinx logged, all of them active."""
    at = data.index(b"endhdr\n") + len(b"endhdr\n")
    if struct.unpack("=I", data[at : at + 4])[0] != 0x11223344:
        raise ValueError("the byte order is another")
    count = next(int(line.split()[1]) for line in data[:at].split(b"\n") if line.startswith(b"n_sen"))
    frames = np.frombuffer(data, np.int16, offset=at + 4)
    if not len(frames) or len(frames) % (count + 1):
        raise ValueError("not all senones are there; is the recording empty?")
    frames = frames.reshape(-1, count + 1)
    if (frames[:, 0] != count).any():
        raise ValueError("not all senones are active")
    found: np.ndarray = frames[:, 1:].astype(np.float32) * np.float32(-_LOG_STEP)
    return found
