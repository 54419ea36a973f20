"""Rivals of docs/grammar.md: pocketsphinx's own keyword spotting and JSGF search."""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pocketsphinx
from torch import Tensor

from modicum.speech.grammar import Expression, Grammar, command_of, export_grammar
from modicum.speech.grammar.letter_to_sound import letter_to_sound

_FOLDER = Path(pocketsphinx.get_model_path()) / "en-us"
_LOWEST = 1e-120
"""A threshold of keyword spotting so low that every recording has a detection, whose score then decides."""


def _decoder(**options: Any) -> Any:
    # cmn: a recording's result must not depend on those before.
    return pocketsphinx.Decoder(hmm=str(_FOLDER / "en-us"), cmn="batch", loglevel="FATAL", **options)


def _pcm(samples: Tensor) -> bytes:
    return (samples * 32_767).round().numpy().astype(np.int16).tobytes()


def _run(decoder: Any, pcm: bytes) -> None:
    decoder.reinit_feat()  # else what it keeps of the recording before changes the scores of this one
    decoder.start_utt()
    decoder.process_raw(pcm, full_utt=True)
    decoder.end_utt()


class KeywordSpotting:
    """The search `kws` with each command a key phrase; the confidence is the best detection's score."""

    def __init__(self, commands: Sequence[str]) -> None:
        self._commands = list(commands)
        self._decoder = _decoder(lm=None, dict=str(_FOLDER / "cmudict-en-us.dict"))
        for word in {word for command in commands for word in command.split()}:
            if self._decoder.lookup_word(word) is None:
                self._decoder.add_word(word, " ".join(letter_to_sound(word)), True)
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "phrases"
            path.write_text("".join(f"{command} /{_LOWEST}/\n" for command in commands))
            self._decoder.add_kws("commands", str(path))
        self._decoder.activate_search("commands")

    def decide(self, samples: Tensor) -> tuple[int, float]:
        """The command and its log-score; -inf without a detection."""
        _run(self._decoder, _pcm(samples))
        found = [(segment.prob, segment.word) for segment in self._decoder.seg() or ()]
        if not found:
            return 0, -np.inf
        score, phrase = max(found)
        return self._commands.index(phrase.strip()), float(score)


class PhoneLoop:
    """pocketsphinx's phone decoder: the free decode of `modicum.speech.grammar`. Scores are remembered."""

    def __init__(self) -> None:
        self._decoder = _decoder(
            allphone=str(_FOLDER / "en-us-phone.lm.bin"), lw=2.0, beam=1e-20, pbeam=1e-20
        )
        self._known: dict[bytes, float] = {}

    def score(self, pcm: bytes) -> float:
        """The log-score of the best path."""
        key = hashlib.sha256(pcm).digest()
        if key not in self._known:
            _run(self._decoder, pcm)
            self._known[key] = float(np.log(self._decoder.hyp().score))
        return self._known[key]


class SphinxGrammar:
    """A JSGF that `modicum speech grammar export` wrote, run by pocketsphinx.

    It has no confidence for grammars, so the score of the best path is taken less that of the phone decoder,
    the free decode of `modicum.speech.grammar`.
    """

    def __init__(self, commands: Sequence[str], expressions: Sequence[Expression], phones: PhoneLoop) -> None:
        self._commands, self._phones = list(commands), phones
        grammar = Grammar("pocketsphinx", "arpabet", (), "", tuple(commands), tuple(expressions), 1, 0.0, 0.0)
        with tempfile.TemporaryDirectory() as folder:
            files = export_grammar(grammar, folder)
            self._decoder = _decoder(jsgf=str(files.jsgf), dict=str(files.dictionary))

    def decide(self, samples: Tensor) -> tuple[int, float]:
        """The command and its log-score above the free decode; -inf where the grammar has no path."""
        pcm = _pcm(samples)
        _run(self._decoder, pcm)
        hypothesis = self._decoder.hyp()
        command = "" if hypothesis is None else command_of(hypothesis.hypstr)
        if command not in self._commands:
            return 0, -np.inf
        return self._commands.index(command), float(np.log(hypothesis.score)) - self._phones.score(pcm)
