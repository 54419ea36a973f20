"""Training: a student learns from recorded targets and its text."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from modicum.distill.checkpoint import Progressed, TrainingCheckpoint
from modicum.distill.essence import Tail, check_tail
from modicum.distill.loss import check_loss, essence_loss
from modicum.distill.student import Student
from modicum.distill.targets import SparseTargets
from modicum.errors import InputError, ModelError, TargetsError

_HIGHEST = 1e30
"""Far above any rate that learns; a step of Adam must be a number of float32."""

_MOST_SEEDS = 2**63
"""What torch's generators take."""


@dataclass(frozen=True)
class TrainingSettings:
    """How a student is trained: Adam, a rate that rises linearly and falls with a cosine, gradients clipped.

    Attributes:
        epochs: how often each sequence is learned from.
        batch: sequences of a step.
        learning_rate: the highest.
        warmup: share of the steps in which the rate rises.
        max_norm: gradients whose norm over all weights is larger are scaled to it.
        hard_weight: λ, the weight of the text's own tokens beside the teacher's (see `essence_loss`).
        tail: what becomes of probability that was not kept (see `Tail`). "renormalize" teaches a student
            to be surer than its teacher where much was not kept, as with 16 tokens of a vocabulary.
        answer_weight: of the mean loss of an answer's tokens, which is added to the mean loss of its
            sequence: an answer has a few tokens of some hundred.
        save_every: steps between checkpoints.
        seed: of the order of sequences.

    Raises:
        InputError: a value is out of range.
    """

    epochs: int = 1
    batch: int = 8
    learning_rate: float = 1e-4
    warmup: float = 0.1
    max_norm: float = 1.0
    hard_weight: float = 0.25
    tail: Tail = "bin"
    answer_weight: float = 1.0
    save_every: int = 100
    seed: int = 0

    def __post_init__(self) -> None:
        check_loss(self.hard_weight, 1.0)
        check_tail(self.tail)
        for name in ("epochs", "batch", "save_every"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} is {getattr(self, name)}: give 1 or more")
        for name in ("learning_rate", "max_norm"):
            if not 0 < getattr(self, name) <= _HIGHEST:
                value = getattr(self, name)
                raise InputError(f"{name} is {value}: give a number above 0 and at most {_HIGHEST:g}")
        if not 0 <= self.answer_weight <= _HIGHEST:
            raise InputError(f"answer_weight is {self.answer_weight}: give 0 or more")
        if not 0 <= self.seed < _MOST_SEEDS:
            raise InputError(f"seed is {self.seed}: give a whole number from 0 to {_MOST_SEEDS - 1:,}")
        if not 0 <= self.warmup <= 1:
            raise InputError(f"warmup is {self.warmup}: give a share from 0 to 1")

    @classmethod
    def of(cls, recipe: Any) -> TrainingSettings:
        """The settings that another training's dataclass shares by name; the others are defaults.

        Raises:
            InputError: a value is out of range.
        """
        return cls(
            **{one.name: getattr(recipe, one.name) for one in fields(cls) if hasattr(recipe, one.name)}
        )

    def num_steps(self, num_sequences: int) -> int:
        """Steps in all; an epoch's last batch may be smaller."""
        return self.epochs * math.ceil(num_sequences / self.batch)

    def rate(self, step: int, num_steps: int) -> float:
        """The learning rate of a step, counted from 0."""
        rising = max(1, round(self.warmup * num_steps))
        if step < rising:
            return self.learning_rate * (step + 1) / rising
        done = (step - rising) / max(1, num_steps - rising)
        return self.learning_rate * (1 + math.cos(math.pi * done)) / 2

    def rows(self, step: int, num_sequences: int) -> Tensor:
        """The sequences [b] of a step: each epoch has them in an order of its own."""
        steps = math.ceil(num_sequences / self.batch)
        epoch, number = divmod(step, steps)
        order = torch.randperm(num_sequences, generator=generator(self.seed, epoch))
        return order[number * self.batch : (number + 1) * self.batch]


def generator(seed: int, number: int) -> torch.Generator:
    """Of one epoch or step: what is random there depends on the seed and its number only."""
    return torch.Generator().manual_seed((seed * 1_000_003 + number) % _MOST_SEEDS)


class _LossError(ModelError):
    """The loss is not a number: what the training has made of the student is worth nothing."""


def train(
    student: Student,
    ids: Tensor,
    targets: SparseTargets,
    settings: TrainingSettings,
    *,
    answers: Tensor | None = None,
    checkpoint: TrainingCheckpoint | None = None,
    progress: Callable[[int, int], object] | None = None,
) -> list[float]:
    """Train a student in place; its removed weights stay exactly 0.

    Gradients of removed weights are set to 0 before they are clipped and before Adam sees them, so that its
    moments and its steps for them are 0.

    Args:
        ids: [n, T] int64, the sequences that were recorded.
        targets: of their n·(T - 1) tokens but the first of each.
        answers: [n] int64, how many tokens at the end of each sequence are an answer; None for text alone.
        checkpoint: written every so many steps, and on an error or Ctrl-C; a training that has one goes on
            from there, and gives what it would have given without a stop.
        progress: called with steps done, and in all.

    Returns:
        The loss of each step, in nats per token.

    Raises:
        TargetsError: the targets are of other sequences.
        ModelError: the loss is not a number, or a checkpoint cannot be written.
        InputError: the checkpoint is of another training.
    """
    frames = ids.shape[1] - 1
    if len(targets) != len(ids) * frames:
        raise TargetsError(
            f"{targets.folder} holds targets of {len(targets):,} tokens, and {len(ids):,} sequences have "
            f"{len(ids) * frames:,}: record targets of these sequences"
        )
    model, removed = student.model, student.removed()
    optimizer = torch.optim.Adam(model.parameters(), lr=settings.learning_rate)
    progressed = Progressed() if checkpoint is None else checkpoint.load(model, optimizer)
    total = settings.num_steps(len(ids))
    tell = progress or (lambda *_: None)
    tell(progressed.step, total)
    is_whole = True  # but while the optimizer moves weights
    saved = progressed.step
    try:
        while progressed.step < total:
            rows = settings.rows(progressed.step, len(ids))
            loss = _backward(student, ids[rows], rows, targets, settings, answers)
            if not math.isfinite(loss):
                raise _LossError(
                    f"the loss of step {progressed.step + 1} is {loss}: give a lower learning rate than "
                    f"{settings.learning_rate:g}"
                )
            for parameter, is_removed in removed:
                if parameter.grad is not None:
                    parameter.grad.masked_fill_(is_removed, 0.0)
            torch.nn.utils.clip_grad_norm_(model.parameters(), settings.max_norm)
            for group in optimizer.param_groups:
                group["lr"] = settings.rate(progressed.step, total)
            is_whole = False
            optimizer.step()
            optimizer.zero_grad()
            progressed.step += 1
            progressed.losses.append(loss)
            is_whole = True
            if checkpoint is not None and progressed.step - saved >= settings.save_every:
                checkpoint.save(model, optimizer, progressed)
                saved = progressed.step
            tell(progressed.step, total)
    except BaseException as error:
        if checkpoint is not None and isinstance(error, _LossError):
            checkpoint.remove()
        elif checkpoint is not None and is_whole and progressed.step > saved:
            checkpoint.save(model, optimizer, progressed)
        raise
    if checkpoint is not None and progressed.step > saved:  # where the student cannot be written, this stays
        checkpoint.save(model, optimizer, progressed)
    return progressed.losses


def _backward(
    student: Student,
    ids: Tensor,
    rows: Tensor,
    targets: SparseTargets,
    settings: TrainingSettings,
    answers: Tensor | None,
) -> float:
    """Add the gradients of a batch, ids [b, T]; its loss."""
    frames = ids.shape[1] - 1
    device = next(student.model.parameters()).device
    ids = ids.to(device)
    logits = student.model(ids, use_cache=False).logits[:, :-1]
    loss = logits.new_zeros(())
    for row, one, labels in zip(rows.tolist(), logits, ids[:, 1:], strict=True):
        target = targets.read(row * frames, (row + 1) * frames).target(settings.tail)
        losses = essence_loss(
            one,
            target,
            labels,
            hard_weight=settings.hard_weight,
            temperature=targets.header.temperature,
            reduction="none",
        )
        loss = loss + losses.mean() / len(rows)
        num = 0 if answers is None else int(answers[row])
        if num:
            loss = loss + settings.answer_weight * losses[-num:].mean() / len(rows)
    loss.backward()
    return float(loss.detach())
