"""Evaluation: how well a recognizer, or an ensemble of several, recognises a corpus."""

from __future__ import annotations

import time
import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from modicum.distill.ensemble import Ensemble
from modicum.errors import InputError
from modicum.speech.corpus import FeatureCorpus, Progress
from modicum.speech.decoding import Decoder, GreedyDecoder
from modicum.speech.examples import reference_text
from modicum.speech.recognizer import Recognizer, recognize
from modicum.speech.scoring import Rate, character_error_rate, word_error_rate
from modicum.speech.sequence_ensemble import SequenceEnsemble
from modicum.speech.teaching import check_teachers
from modicum.speech.tokens import TokenSet, normalize_text

_UNKNOWN = -1
"""The label of frames of phones that the model did not learn: no class is right for them."""

_LEAST = 1e-30
"""Added to probabilities before their logarithm."""


@dataclass(frozen=True)
class Evaluation:
    """What was measured; rates that the tokens do not have are None."""

    num_utterances: int
    num_skipped: int
    """Files that were left out."""
    audio_seconds: float
    seconds: float
    """That the models and the decoder took."""
    num_parameters: int
    """Of all members."""
    word_error_rate: Rate | None
    character_error_rate: Rate | None
    phone_error_rate: Rate | None
    frame_accuracy: Rate | None
    """Share of frames whose most probable class is right."""
    hypotheses: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """As JSON takes it, without the hypotheses."""
        return {name: value for name, value in asdict(self).items() if name != "hypotheses"}


def evaluate(
    recognizers: Sequence[Recognizer],
    corpus: FeatureCorpus,
    *,
    decoder: Decoder | None = None,
    progress: Progress | None = None,
) -> Evaluation:
    """Recognise each row of a corpus and compare with its text, or its phones.

    Of several frames models the probabilities of each frame are averaged. Several CTC models decide by the
    mean of the probabilities that they give to whole token sequences (see `SequenceEnsemble`).

    Frames of phones that a frames model did not learn count as wrong. Rows without phones have no part in
    rates of phones and frames. Both are told in a warning.

    Args:
        recognizers: of the same tokens, features and frame rate.
        corpus: with the recognizers' features.
        decoder: of CTC models; greedy by default.
        progress: called with "recognising", rows done, and in all.

    Raises:
        ModelError: recognizers differ from each other or from the corpus' features.
        InputError: the references are empty, or there are no phones to compare with.
    """
    check_teachers(recognizers, corpus)
    tell = progress or (lambda *_: None)
    tokens = recognizers[0].tokens
    has_reference = [tokens.kind == "graphemes" or bool(one.phones) for one in corpus.utterances]
    _check_references(has_reference, tokens)
    started = time.perf_counter()
    references, hypotheses, right, totals, unknown = [], [], [], [], 0
    for row, utterance in enumerate(corpus.utterances):
        tell("recognising", row, len(corpus))
        classes, text = _recognize(recognizers, corpus.features(row), decoder)
        hypotheses.append(text)
        reference = reference_text(utterance, tokens)
        references.append(normalize_text(reference) if tokens.kind == "graphemes" else reference)
        if tokens.kind == "thirds" and utterance.phones:
            labels = _frame_labels(corpus, row, tokens, recognizers[0].model.subsampling)
            unknown += int((labels == _UNKNOWN).sum())
            right.append(int((torch.tensor(classes) == labels).sum()))
            totals.append(len(labels))
    tell("recognising", len(corpus), len(corpus))
    seconds = time.perf_counter() - started
    if unknown:
        warnings.warn(
            f"{unknown:,} of {sum(totals):,} frames are of phones that the model did not learn: they count "
            "as wrong",
            stacklevel=2,
        )
    is_text = tokens.kind == "graphemes"
    return Evaluation(
        num_utterances=len(corpus),
        num_skipped=corpus.num_skipped,
        audio_seconds=corpus.seconds,
        seconds=seconds,
        num_parameters=sum(recognizer.model.num_parameters for recognizer in recognizers),
        word_error_rate=word_error_rate(references, hypotheses) if is_text else None,
        character_error_rate=character_error_rate(references, hypotheses) if is_text else None,
        phone_error_rate=None if is_text else _phone_error_rate(references, hypotheses, has_reference),
        frame_accuracy=Rate.of(right, totals) if tokens.kind == "thirds" else None,
        hypotheses=tuple(hypotheses),
    )


def _check_references(has_reference: Sequence[bool], tokens: TokenSet) -> None:
    """Raise if no row, and warn if not every row, has what the tokens are compared with."""
    if not any(has_reference):
        raise InputError(
            f'no utterance has phones, and the classes are {tokens.kind}: give a manifest with "phones", or '
            "a model of graphemes"
        )
    if not all(has_reference):
        warnings.warn(
            f"{has_reference.count(False):,} of {len(has_reference):,} utterances have no phones: they have "
            "no part in the rates",
            stacklevel=3,
        )


def _phone_error_rate(
    references: Sequence[str], hypotheses: Sequence[str], has_reference: Sequence[bool]
) -> Rate:
    pairs = zip(references, hypotheses, has_reference, strict=True)
    kept = [(reference, hypothesis) for reference, hypothesis, is_kept in pairs if is_kept]
    return word_error_rate([reference for reference, _ in kept], [hypothesis for _, hypothesis in kept])


def _recognize(
    recognizers: Sequence[Recognizer], features: Tensor, decoder: Decoder | None
) -> tuple[list[int], str]:
    """Tokens, or the class of each frame, and the text, for the features [T, F] of one utterance."""
    tokens = recognizers[0].tokens
    if len(recognizers) == 1 or tokens.kind == "thirds":
        ensemble = Ensemble.of([recognizer.logits for recognizer in recognizers])
        (probabilities,) = ensemble.probabilities([features])
        return recognize((probabilities + _LEAST).log(), tokens, decoder)
    log_probs = [recognizer.logits(features).log_softmax(-1) for recognizer in recognizers]
    classes = SequenceEnsemble(decoder or GreedyDecoder())(log_probs)
    return classes, tokens.decode(classes)


def _frame_labels(corpus: FeatureCorpus, row: int, tokens: TokenSet, subsampling: int) -> Tensor:
    shift = 1 / corpus.settings.features.frames_per_second
    phones = corpus.utterances[row].phones
    return tokens.frame_labels(phones, corpus.num_frames(row), shift, _UNKNOWN)[::subsampling]
