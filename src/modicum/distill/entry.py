"""Entry: teachers and text in, a student that has learned from them out."""

from __future__ import annotations

import hashlib
import json
import shutil
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from modicum.distill import sequences
from modicum.distill.checkpoint import TrainingCheckpoint
from modicum.distill.header import TargetsHeader
from modicum.distill.model_digest import model_digest
from modicum.distill.recording import record
from modicum.distill.rule import parse_rule
from modicum.distill.sequences import Questions, Sequences
from modicum.distill.student import Student
from modicum.distill.targets import SparseTargets, TargetsStatistics
from modicum.distill.teachers import about, open_teachers
from modicum.distill.training import TrainingSettings, train
from modicum.distill.writer import TargetsWriter
from modicum.errors import InputError, ModelError
from modicum.weights.calibration import length_for
from modicum.weights.new_folder import STATE, check_new, check_places
from modicum.weights.perplexity import perplexity
from modicum.weights.progress import Progress

LENGTH = 512


@dataclass(frozen=True)
class DistillSettings:
    """How a student is distilled.

    Attributes:
        keep: which classes of each token are recorded: "topk=16", "threshold=0.01" or "mass=0.95".
        bits: of a recorded probability, 8 or 16.
        temperature: τ, by which teacher's and student's logits are divided.
        sequences: to learn from; None for all that the text has but a ninth, which is held back.
        length: tokens of each; None for 512, or the student's context if that is shorter.
        tasks: generated questions to mix in, such as "niah_single_2,vt" (see `modicum.tasks`); "" for none.
        task_share: share of the sequences that are questions.
        seed: which sequences, and their order.
        targets: a folder for the targets, kept for other students, and not in that of the student; None for
            one that is removed at the end.
        device: of teachers and student.
        training: of the student.
    """

    keep: str = "topk=16"
    bits: int = 16
    temperature: float = 1.0
    sequences: int | None = None
    length: int | None = None
    tasks: str = ""
    task_share: float = 0.5
    seed: int = 0
    targets: Path | None = None
    device: str = "auto"
    training: TrainingSettings = field(default_factory=TrainingSettings)

    @property
    def questions(self) -> Questions | None:
        """To mix in.

        Raises:
            InputError: their share is out of range.
        """
        return Questions(self.tasks, self.task_share, self.seed) if self.tasks else None


@dataclass
class DistillReport:
    """What was done."""

    settings: DistillSettings
    teachers: tuple[str, ...]
    student: str
    num_sequences: int
    length: int
    num_questions: int
    """Sequences that are questions."""
    sparsity: float
    """The share of the masked weights that is removed, before and after."""
    perplexity_before: float
    """Of text that was held back."""
    perplexity_after: float
    targets: TargetsStatistics
    losses: list[float] = field(repr=False)
    """Of each step, nats per token."""
    seconds: float
    """Of this run."""
    format: str
    file_bytes: int = 0

    def to_dict(self) -> dict[str, Any]:
        """As JSON takes it; of the losses the first and the last."""
        found = {name: value for name, value in asdict(self).items() if name != "losses"}
        first, last = (self.losses[0], self.losses[-1]) if self.losses else (None, None)
        return found | {"steps": len(self.losses), "loss_first": first, "loss_last": last}


def distill(
    student: str | Path,
    teachers: Sequence[str],
    texts: Sequence[str],
    out: str | Path,
    settings: DistillSettings | None = None,
    *,
    progress: Progress | None = None,
) -> DistillReport:
    """Distil teachers into a student and write it to a folder, in the format that it came in.

    The teachers' targets are recorded first, then the student is trained on them. Weights that are removed
    stay removed: exactly the masks of a packed file, or the zeros of a dense checkpoint. A run that was
    stopped goes on if it is started again with the same `out`.

    Args:
        student: the folder of a model, such as `modicum prune --out` writes it.
        teachers: names as `modicum.load` takes them; of several the probabilities are averaged.
        texts: to learn from.
        out: a new or empty folder.
        progress: called with what is done ("answering", "recording", "training"), how much of it, and of how
        much.

    Raises:
        InputError: a setting or the text cannot be used, the targets are to lie in `out`, or that is of
            another run.
        ModelError: a model cannot be loaded, a teacher has another vocabulary, or a file cannot be written.
        TargetsError: the targets in the folder are of another teacher or text, or are damaged; the disk is
        full.
    """
    started = time.perf_counter()
    settings, out = settings or DistillSettings(), Path(out)
    tell = progress or (lambda *_: None)
    if not teachers:
        raise InputError("there is no teacher: give the name of at least one")
    rule = parse_rule(settings.keep)
    settings = replace(settings, keep=str(rule))
    check_new(out)
    check_places(out, {"targets": settings.targets})
    learner = Student.load(student, settings.device)
    rule.check(learner.num_classes)
    text, held = _windows(learner, texts, settings)
    found, targets = _recorded(learner, teachers, text, out, settings, tell)
    before = perplexity(learner.model, held)
    basis = [model_digest(learner.model, learner.masks), targets.header.digest, asdict(settings.training)]
    told = hashlib.sha256(json.dumps(basis).encode()).hexdigest()[:16]
    losses = train(
        learner,
        found.ids,
        targets,
        settings.training,
        answers=found.answers,
        checkpoint=TrainingCheckpoint(out / STATE / "training.safetensors", told),
        progress=lambda done, total: tell("training", done, total),
    )
    learner.round()
    report = DistillReport(
        settings=settings,
        teachers=tuple(map(str, teachers)),
        student=str(student),
        num_sequences=len(found.ids),
        length=found.ids.shape[1],
        num_questions=int((found.answers > 0).sum()),
        sparsity=learner.sparsity,
        perplexity_before=before,
        perplexity_after=perplexity(learner.model, held),
        targets=targets.statistics,
        losses=losses,
        seconds=time.perf_counter() - started,
        format=learner.format,
    )
    report.file_bytes = learner.save(out, report.to_dict())
    shutil.rmtree(out / STATE, ignore_errors=True)
    return report


def _recorded(
    student: Student,
    teachers: Sequence[str],
    text: Tensor,
    out: Path,
    settings: DistillSettings,
    progress: Progress,
) -> tuple[Sequences, SparseTargets]:
    """Sequences of text and questions, and the teachers' targets for them, recorded now or before.

    When this returns the teachers are out of memory.
    """
    checked = open_teachers(
        teachers, student.tokenizer, text, temperature=settings.temperature, device=settings.device
    )
    if checked.num_classes != student.num_classes:
        raise ModelError(
            f"teacher {teachers[0]} gives logits for {checked.num_classes:,} tokens, the student for "
            f"{student.num_classes:,}: give a student of the teacher's vocabulary"
        )
    found = Sequences(text, torch.zeros(len(text), dtype=torch.int64))
    if settings.questions is not None:
        found = sequences.with_questions(
            text,
            student.tokenizer,
            settings.questions,
            checked.answer,
            lambda done, total: progress("answering", done, total),
        )
    header = TargetsHeader(
        student.num_classes, settings.keep, settings.bits, settings.temperature, about(checked, found.ids)
    )
    folder = settings.targets or out / STATE / "targets"
    with TargetsWriter(folder, header) as writer:
        record(checked.ensemble, found.ids, writer, lambda done, total: progress("recording", done, total))
    return found, SparseTargets(folder)


def _windows(student: Student, texts: Sequence[str], settings: DistillSettings) -> tuple[Tensor, Tensor]:
    """To learn from [n, T], and held back."""
    length = min(LENGTH, length_for(student.model)) if settings.length is None else settings.length
    if not 2 <= length <= length_for(student.model):
        raise InputError(
            f"length is {length}, and the student takes 2 to {length_for(student.model):,} tokens: give a "
            "length between them"
        )
    if settings.questions is not None:
        settings.questions.parse()  # before a teacher is loaded
    if settings.sequences is not None and settings.sequences < 1:
        raise InputError(f"sequences is {settings.sequences}: give 1 or more")
    return sequences.split(texts, student.tokenizer, settings.sequences, length, settings.seed)
