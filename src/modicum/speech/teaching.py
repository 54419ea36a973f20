"""Teaching: the soft targets of an ensemble of recognizers for a corpus, recorded once."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from modicum.distill.code import ProbabilityCode
from modicum.distill.ensemble import Ensemble
from modicum.distill.header import TargetsHeader
from modicum.distill.loss import check_loss
from modicum.distill.rule import parse_rule
from modicum.distill.targets import SparseTargets
from modicum.distill.writer import TargetsWriter
from modicum.errors import InputError, ModelError, TargetsError
from modicum.speech.corpus import FeatureCorpus, Progress
from modicum.speech.examples import Examples
from modicum.speech.recognizer import Recognizer


@dataclass(frozen=True)
class TeachingSettings:
    """What is recorded of the teachers' outputs.

    Attributes:
        keep: classes of each frame: "topk=10", "threshold=0.01" or "mass=0.95".
        bits: of a probability, 8 or 16.
        temperature: τ, by which logits are divided.

    Raises:
        InputError: the rule is not known, or a number is out of range.
    """

    keep: str = "topk=10"
    bits: int = 8
    temperature: float = 1.0

    def __post_init__(self) -> None:
        parse_rule(self.keep)
        ProbabilityCode(self.bits)
        check_loss(0.0, self.temperature)


def record_targets(
    teachers: Sequence[Recognizer],
    corpus: FeatureCorpus,
    folder: str | Path,
    settings: TeachingSettings | None = None,
    progress: Progress | None = None,
) -> SparseTargets:
    """Record the mean probabilities of recognizers for each output frame of a corpus, row after row.

    The teachers see features without SpecAugment. A recording that was stopped goes on; a finished one is
    read.

    Args:
        teachers: of the same tokens, features and frame rate, in any order.
        corpus: also its copies are recorded.
        folder: new, or of the same recording.
        settings: what is kept.
        progress: called with "recording", rows done, and in all.

    Raises:
        ModelError: teachers differ in tokens, features or frame rate, or from the corpus' features.
        InputError: k is over the number of classes, or another setting is out of range.
        TargetsError: the folder is of other teachers or data, or the disk is full.
    """
    settings = settings or TeachingSettings()
    check_teachers(teachers, corpus)
    # Their mean has no order. Sorted, another order makes no difference, not even in the last bit.
    teachers = sorted(teachers, key=lambda teacher: teacher.digest)
    first = teachers[0]
    rule = parse_rule(settings.keep)
    rule.check(first.tokens.num_classes)
    about = _about(corpus, first) | {"teacher": "+".join(teacher.digest for teacher in teachers)}
    header = TargetsHeader(first.tokens.num_classes, str(rule), settings.bits, settings.temperature, about)
    ensemble = Ensemble.of([_classifier(teacher) for teacher in teachers], settings.temperature)
    tell = progress or (lambda *_: None)
    with TargetsWriter(folder, header) as writer:
        if not writer.is_complete:
            _record(ensemble, corpus, first.model.subsampling, writer, tell)
    return SparseTargets(folder)


def _record(
    ensemble: Ensemble, corpus: FeatureCorpus, subsampling: int, writer: TargetsWriter, tell: Progress
) -> None:
    done = 0
    for row in range(len(corpus)):
        tell("recording", row, len(corpus))
        num_frames = -(-corpus.num_frames(row) // subsampling)
        recorded = min(num_frames, max(0, writer.num_frames - done))
        if recorded < num_frames:
            (probabilities,) = ensemble.probabilities([corpus.features(row)])
            writer.append(probabilities[recorded:])
        done += num_frames
    tell("recording", len(corpus), len(corpus))
    writer.finish()


def check_teachers(teachers: Sequence[Recognizer], corpus: FeatureCorpus) -> None:
    """Raise unless recognizers have the same classes and frames, and read this corpus.

    Raises:
        InputError: there is none.
        ModelError: they differ.
    """
    if not teachers:
        raise InputError("there is no teacher: give at least one recognizer")
    check_alike(teachers)
    if teachers[0].features != corpus.settings.features:
        raise ModelError(
            f"the recognizers read other features ({teachers[0].features}) than the data's "
            f"({corpus.settings.features}): make the features with the recognizers' settings"
        )


def check_alike(recognizers: Sequence[Recognizer]) -> None:
    """Raise unless recognizers have the same tokens, features and frame rate.

    Raises:
        ModelError: they differ.
    """
    first = recognizers[0]
    for number, other in enumerate(recognizers[1:], 2):
        if other.tokens != first.tokens:
            ours, theirs = set(first.tokens.symbols), set(other.tokens.symbols)
            differing = ", ".join(sorted(ours ^ theirs)[:3]) or "their kind or order"
            raise ModelError(
                f"recognizers 1 and {number} have different token sets ({first.tokens.num_classes} and "
                f"{other.tokens.num_classes} classes; {differing}): give recognizers of one token set"
            )
        if other.frame_rate != first.frame_rate:
            raise ModelError(
                f"recognizers 1 and {number} have different frame rates ({first.frame_rate:g} and "
                f"{other.frame_rate:g} per second): give recognizers of one frame rate"
            )
        if other.features != first.features:
            raise ModelError(
                f"recognizers 1 and {number} read different features ({first.features}; {other.features}): "
                "give recognizers of the same features"
            )


def check_targets(targets: SparseTargets, examples: Examples) -> None:
    """Raise unless targets are of the examples' data, tokens and frame rate.

    Raises:
        TargetsError: they are of others; the message says which.
    """
    corpus, header = examples.corpus, targets.header
    rate = corpus.settings.features.frames_per_second / examples.rate.subsampling
    wanted = _keys(corpus, tokens_digest(examples), rate)
    for name, value in wanted.items():
        if header.about.get(name) != value:
            raise TargetsError(
                f"{targets.folder} holds targets with another {name}, {header.about.get(name)} and not "
                f"{value}: record the targets again, with these data and teachers like the student"
            )
    if len(targets) != examples.num_frames or header.num_classes != examples.tokens.num_classes:
        raise TargetsError(
            f"{targets.folder} holds targets of {len(targets):,} frames and {header.num_classes} classes, "
            f"and the student has {examples.num_frames:,} and {examples.tokens.num_classes}: record the "
            "targets again"
        )


def tokens_digest(source: Examples | Recognizer) -> str:
    """16 hex digits that stand for a token set."""
    return hashlib.sha256(json.dumps(source.tokens.to_json()).encode()).hexdigest()[:16]


def _about(corpus: FeatureCorpus, teacher: Recognizer) -> dict[str, str]:
    return _keys(corpus, tokens_digest(teacher), teacher.frame_rate)


def _keys(corpus: FeatureCorpus, tokens: str, frame_rate: float) -> dict[str, str]:
    """What targets are of, under the names that errors use."""
    return {"data": corpus.digest, "token set": tokens, "frame rate": f"{frame_rate:g} per second"}


def _classifier(recognizer: Recognizer) -> Callable[[Tensor], Tensor]:
    return recognizer.logits
