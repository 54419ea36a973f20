"""Entry: a manifest in, a folder with a recognizer out, with or without teachers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, get_args

from modicum.distill.rule import parse_rule
from modicum.distill.targets import SparseTargets, TargetsStatistics
from modicum.errors import InputError, ModelError
from modicum.speech.corpus import CorpusSettings, FeatureCorpus, Progress, build_corpus
from modicum.speech.faults import is_full
from modicum.speech.manifest import Utterance, read_manifest
from modicum.speech.recipe import Recipe
from modicum.speech.recognizer import Recognizer
from modicum.speech.teaching import TeachingSettings, check_alike, record_targets
from modicum.speech.tokens import TokenSet
from modicum.speech.training import TrainingResult, train
from modicum.weights.new_folder import STATE, check_new, check_places

Units = Literal["graphemes", "phones"]
"""Classes of a CTC model; those of a frames model are thirds of phones."""


def check_units(units: str) -> Units:
    """Raise unless it is one of the two.

    Raises:
        InputError: it is not.
    """
    for known in get_args(Units):
        if units == known:
            return known  # type: ignore[no-any-return]  # get_args has no types
    raise InputError(f"units are {units!r}; choose one of {', '.join(get_args(Units))}")


@dataclass(frozen=True)
class TrainSettings:
    """What `train_recognizer` does.

    Attributes:
        recipe: of the training.
        corpus: of the features; with teachers the features are theirs.
        teaching: what is recorded of the teachers.
        units: classes of a CTC model; with teachers they are theirs.
        features: a folder for the features, kept for other trainings; None for one that is removed.
        targets: a folder for the teachers' targets, kept for other students; None likewise.

    Raises:
        InputError: the units are not known.
    """

    recipe: Recipe = field(default_factory=Recipe)
    corpus: CorpusSettings = field(default_factory=CorpusSettings)
    teaching: TeachingSettings = field(default_factory=TeachingSettings)
    units: Units = "graphemes"
    features: Path | None = None
    targets: Path | None = None

    def __post_init__(self) -> None:
        check_units(self.units)


@dataclass(frozen=True)
class TrainReport:
    """What was done."""

    result: TrainingResult
    num_utterances: int
    """Learned from."""
    num_skipped: int
    """Files that were left out."""
    audio_seconds: float
    """Of the features, all copies together."""
    targets: TargetsStatistics | None
    """Of the teachers' targets."""

    def to_dict(self) -> dict[str, Any]:
        """As JSON takes it."""
        recognizer = self.result.recognizer
        return {
            "about": dict(recognizer.about),
            "num_parameters": recognizer.model.num_parameters,
            "num_classes": recognizer.tokens.num_classes,
            "num_utterances": self.num_utterances,
            "num_skipped": self.num_skipped,
            "audio_seconds": self.audio_seconds,
            "targets": None if self.targets is None else vars(self.targets),
            "steps": len(self.result.losses),
            "loss_first": self.result.losses[0],
            "loss_last": self.result.losses[-1],
            "seconds": self.result.seconds,
        }


def train_recognizer(
    manifest: str | Path,
    out: str | Path,
    settings: TrainSettings | None = None,
    teachers: Sequence[str | Path] = (),
    progress: Progress | None = None,
) -> TrainReport:
    """Train a recognizer on the utterances of a manifest and write it to a folder.

    With teachers, their targets for the manifest are recorded first, and the recognizer learns from them and
    from the correct labels. A run that was stopped goes on if it is started again with the same `out`.

    Args:
        manifest: as `read_manifest` takes it.
        out: a new or empty folder.
        settings: how.
        teachers: folders of recognizers with the same tokens, features and frame rate.
        progress: called with what is done ("features", "recording", "training"), how much of it, and of how
            much.

    Raises:
        InputError: the manifest or a setting cannot be used, or the folder is of another run.
        ModelError: a teacher cannot be read or does not fit, or a file cannot be written.
        TargetsError: the targets in the folder are of other teachers or data, or are damaged; the disk is
            full.
    """
    settings, out = settings or TrainSettings(), Path(out)
    check_new(out)
    check_places(out, {"features": settings.features, "targets": settings.targets})
    utterances = read_manifest(manifest)
    loaded = [Recognizer.load(teacher) for teacher in teachers]
    if loaded:
        _check_student(loaded, teachers, settings)
        settings = replace(settings, corpus=replace(settings.corpus, features=loaded[0].features))
    tokens = loaded[0].tokens if loaded else _tokens(utterances, settings)
    _make_state(out)
    corpus = build_corpus(
        utterances, settings.features or out / STATE / "features", settings.corpus, progress
    )
    targets = _targets(loaded, corpus, settings.targets or out / STATE / "targets", settings, progress)
    statistics = None if targets is None else targets.statistics
    result = train(settings.recipe, corpus, tokens, out=out, targets=targets, progress=progress)
    return TrainReport(result, result.num_utterances, corpus.num_skipped, corpus.seconds, statistics)


def _make_state(out: Path) -> None:
    """Make the folder of what a stopped run goes on from, before there is anything to lose."""
    try:
        (out / STATE).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        remedy = "make room" if is_full(error) else "give a folder that can be written"
        raise InputError(f"cannot write to {out}: {error.strerror or error}; {remedy}") from error


def _targets(
    teachers: Sequence[Recognizer],
    corpus: FeatureCorpus,
    folder: Path,
    settings: TrainSettings,
    progress: Progress | None,
) -> SparseTargets | None:
    if not teachers:
        return None
    return record_targets(teachers, corpus, folder, settings.teaching, progress)


def _tokens(utterances: Sequence[Utterance], settings: TrainSettings) -> TokenSet:
    if settings.recipe.model.criterion == "frames":
        return TokenSet.of_phones([utterance.phones for utterance in utterances], thirds=True)
    if settings.units == "phones":
        return TokenSet.of_phones([utterance.phones for utterance in utterances])
    return TokenSet.of_texts(utterance.text for utterance in utterances)


def _check_student(
    teachers: Sequence[Recognizer], names: Sequence[str | Path], settings: TrainSettings
) -> None:
    """Raise before anything is recorded that the student could not learn from."""
    check_alike(teachers)
    first, student = teachers[0], settings.recipe.model
    if first.model.criterion != student.criterion:
        raise ModelError(
            f"teacher {names[0]} is trained by {first.model.criterion}, the student ({student.name}) by "
            f"{student.criterion}: give a student of the teacher's kind"
        )
    if first.model.subsampling != student.subsampling:
        rate = first.features.frames_per_second / student.subsampling
        raise ModelError(
            f"teacher {names[0]} has a frame rate of {first.frame_rate:g} per second, the student of "
            f"{rate:g} per second: give a student with subsampling {first.model.subsampling}"
        )
    parse_rule(settings.teaching.keep).check(first.tokens.num_classes)
