"""CTC model: a recognizer of ours as a `CommandModel`."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from modicum.errors import InputError, ModelError
from modicum.speech.decoding import PrefixBeamSearch, greedy_decode
from modicum.speech.features import Fbank
from modicum.speech.grammar.command_model import Form, Heard
from modicum.speech.grammar.ctc_forward import ctc_scores
from modicum.speech.recognizer import Recognizer
from modicum.speech.tokens import BLANK


@dataclass(frozen=True)
class CtcModel:
    """A CTC recognizer of letters or of phones.

    Attributes:
        recognizer: see `Recognizer`.
        name: as people know it.

    Raises:
        ModelError: it is not for CTC.
    """

    recognizer: Recognizer
    name: str

    def __post_init__(self) -> None:
        if self.recognizer.tokens.kind == "thirds":
            raise ModelError(
                f"{self.name} labels frames by thirds of phones, and grammars need CTC: train with --model "
                "conv, dfsmn or sanm"
            )

    @property
    def units(self) -> str:
        """Letters or phones."""
        return self.recognizer.tokens.kind

    @property
    def symbols(self) -> tuple[str, ...]:
        """Of the token set."""
        return self.recognizer.tokens.symbols

    @cached_property
    def digest(self) -> str:
        """The recognizer's."""
        return self.recognizer.digest

    @property
    def sample_rate(self) -> int:
        """Of its features."""
        return self.recognizer.features.sample_rate

    def forms(self, word: str) -> tuple[Form, ...]:
        """The word's own letters.

        Raises:
            InputError: it has a letter that the model does not have, or the model's units are phones.
        """
        if self.units == "phones":
            raise InputError(
                f"{self.name} writes phones, and there is no dictionary of {word!r} for them: use a "
                "recognizer of letters, or pocketsphinx"
            )
        unknown = sorted(set(word) - set(self.symbols))
        if unknown:
            raise InputError(
                f"{unknown[0]!r} in {word!r} is not among the {len(self.symbols)} letters of {self.name}: "
                "spell the command with those, or use another recognizer"
            )
        return (word,)

    def split(self, form: Form) -> tuple[str, ...]:
        """Letters and spaces."""
        return tuple(form)

    def join(self, units: Sequence[str]) -> Form:
        """Letters and single spaces."""
        return " ".join("".join(units).split())

    def hear(self, samples: Tensor, num_best: int) -> list[Heard]:
        """Greedy decoding; for more than one, then the best of a prefix beam search."""
        log_probs = self._log_probs(samples)
        best = tuple(greedy_decode(log_probs, BLANK))
        if num_best <= 1:
            return [Heard(self._symbols(best), 1.0)]
        score = float(ctc_scores(log_probs, [best])[0])
        found = {best: score}
        for one in PrefixBeamSearch(beam=max(8, num_best), num_tokens=8).search(log_probs):
            found.setdefault(one.tokens, one.log_prob)
        kept = list(found.items())[:num_best]
        top = max(score for _, score in kept)
        shares = [math.exp(score - top) for _, score in kept]
        return [
            Heard(self._symbols(tokens), share / sum(shares))
            for (tokens, _), share in zip(kept, shares, strict=True)
        ]

    def score(self, samples: Tensor, expressions: Sequence[tuple[Form, ...]]) -> tuple[np.ndarray, float]:
        """CTC scores; that of the free decode is the score of the greedy decode."""
        log_probs = self._log_probs(samples)
        labels = [self._labels(forms) for forms in expressions]
        scores = ctc_scores(log_probs, [*labels, greedy_decode(log_probs, BLANK)]).numpy()
        return scores[:-1], float(scores[-1])

    @torch.no_grad()
    def _log_probs(self, samples: Tensor) -> Tensor:
        features = Fbank(self.recognizer.features)(samples)
        return self.recognizer.logits(features).float().log_softmax(-1)

    def _symbols(self, tokens: Sequence[int]) -> tuple[str, ...]:
        return tuple(self.symbols[token - 1] for token in tokens)

    def _labels(self, forms: tuple[Form, ...]) -> list[int]:
        return self.recognizer.tokens.encode(" ".join(forms))
