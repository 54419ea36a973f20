"""Scoring: error rates of transcripts, with intervals."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from modicum.errors import InputError
from modicum.packages import import_package

_RESAMPLES = 1000


@dataclass(frozen=True)
class Rate:
    """A rate over utterances, with a 95 % bootstrap interval.

    The interval is that of Bisani and Ney 2004 ("Bootstrap estimates for confidence intervals in ASR
    performance evaluation"): utterances are drawn with replacement 1,000 times, and the 2.5th and 97.5th
    percentile of the rate taken.
    """

    value: float
    low: float
    high: float
    count: int
    """Errors, or right frames."""
    total: int
    """Reference words, characters, phones or frames."""

    @classmethod
    def of(cls, counts: Sequence[int], totals: Sequence[int], seed: int = 0) -> Rate:
        """From the counts and totals of each utterance.

        Raises:
            InputError: there is nothing in all.
        """
        total = sum(totals)
        if not total:
            raise InputError("the references hold no words: give transcripts that are not empty")
        errors, sizes = np.asarray(counts, dtype=np.int64), np.asarray(totals, dtype=np.int64)
        generator = np.random.default_rng(seed)
        rates = []
        for _ in range(_RESAMPLES):
            drawn = generator.integers(len(errors), size=len(errors))
            if size := int(sizes[drawn].sum()):
                rates.append(int(errors[drawn].sum()) / size)
        low, high = np.percentile(rates, [2.5, 97.5])
        return cls(sum(counts) / total, float(low), float(high), sum(counts), total)


def word_error_rate(references: Sequence[str], hypotheses: Sequence[str]) -> Rate:
    """Substituted, deleted and inserted words by words of the references, aligned by jiwer.

    Raises:
        InputError: there are not as many hypotheses as references, or the references hold no word.
    """
    jiwer = import_package("jiwer", "speech")
    _check(references, hypotheses)
    pairs = [(" ".join(r.split()), " ".join(h.split())) for r, h in zip(references, hypotheses, strict=True)]
    errors = [_errors(jiwer.process_words(r, h)) if r else len(h.split()) for r, h in pairs]
    return Rate.of(errors, [len(reference.split()) for reference, _ in pairs])


def character_error_rate(references: Sequence[str], hypotheses: Sequence[str]) -> Rate:
    """Substituted, deleted and inserted characters, spaces among them, by those of the references.

    Raises:
        InputError: as `word_error_rate`.
    """
    jiwer = import_package("jiwer", "speech")
    _check(references, hypotheses)
    pairs = [(" ".join(r.split()), " ".join(h.split())) for r, h in zip(references, hypotheses, strict=True)]
    errors = [_errors(jiwer.process_characters(r, h)) if r else len(h) for r, h in pairs]
    return Rate.of(errors, [len(reference) for reference, _ in pairs])


def _check(references: Sequence[str], hypotheses: Sequence[str]) -> None:
    if len(references) != len(hypotheses):
        raise InputError(
            f"there are {len(references)} references and {len(hypotheses)} hypotheses: give one for each"
        )


def _errors(alignment: object) -> int:
    names = ("substitutions", "deletions", "insertions")
    return sum(int(getattr(alignment, name)) for name in names)
