"""Training: a recognizer learns from a corpus, and from an ensemble's targets where they are given."""

from __future__ import annotations

import hashlib
import json
import math
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from modicum.distill.checkpoint import Progressed, TrainingCheckpoint
from modicum.distill.targets import SparseTargets
from modicum.errors import ModelError
from modicum.speech.acoustic_model import AcousticModel
from modicum.speech.augment import spec_augmented
from modicum.speech.batches import BatchPlan
from modicum.speech.corpus import FeatureCorpus, Progress
from modicum.speech.examples import Batch, Examples, FrameRate, collate
from modicum.speech.recipe import Recipe
from modicum.speech.recognizer import Recognizer
from modicum.speech.teaching import check_targets
from modicum.speech.tokens import TokenSet
from modicum.speech.training_loss import batch_loss
from modicum.weights.new_folder import STATE, check_new

_SEED = 1_000_003


@dataclass(frozen=True)
class TrainingResult:
    """What a training gave."""

    recognizer: Recognizer
    losses: list[float] = field(repr=False)
    """Of each step, in nats."""
    seconds: float
    """Of this run."""
    num_utterances: int
    """Of which at least one copy was learned from."""


def train(
    recipe: Recipe,
    corpus: FeatureCorpus,
    tokens: TokenSet,
    *,
    out: str | Path | None = None,
    targets: SparseTargets | None = None,
    progress: Progress | None = None,
) -> TrainingResult:
    """Train a recognizer on a corpus.

    A run that was stopped goes on if it is started again with the same `out`, and gives what it would have
    given without a stop, bit for bit (on one machine, with one number of threads).

    Args:
        recipe: how.
        corpus: features and texts.
        tokens: graphemes or phones for a CTC model, thirds of phones for a frames model.
        out: a new or empty folder, which gets the recognizer, and until then a checkpoint in its folder
            state; None to keep it in memory only.
        targets: of an ensemble for this corpus, as `record_targets` gives them.
        progress: called with "training", steps done, and in all.

    Raises:
        InputError: no utterance can be learned from, `out` is not empty, or its checkpoint is of another
            training.
        TargetsError: the targets are of other data, tokens or another frame rate.
        ModelError: the loss is not a number, or a file cannot be written.
    """
    started = time.perf_counter()
    folder = None if out is None else Path(out)
    if folder is not None:
        check_new(folder)
    examples = Examples(corpus, tokens, FrameRate(recipe.model.criterion, recipe.model.subsampling))
    if targets is not None:
        check_targets(targets, examples)
    with _seeded(recipe.seed * _SEED - 1):
        model = recipe.model.build(corpus.settings.features.num_mels, tokens.num_classes)
    checkpoint = None
    if folder is not None:
        digest = _digest(recipe, examples, targets)
        checkpoint = TrainingCheckpoint(folder / STATE / "training.safetensors", digest)
    losses = TrainingLoop(model, examples, recipe, targets, checkpoint).run(progress or (lambda *_: None))
    seconds = time.perf_counter() - started
    about: dict[str, Any] = {
        "recipe": recipe.to_dict(),
        "data": {"digest": corpus.digest, "rows": len(examples.rows), "seconds": corpus.seconds},
        "targets": None if targets is None else {**targets.header.about, "rule": targets.header.rule},
        "steps": len(losses),
        "loss_first": losses[0],
        "loss_last": losses[-1],
    }
    recognizer = Recognizer(model.eval(), tokens, corpus.settings.features, about)
    if folder is not None:
        recognizer.save(folder)
        shutil.rmtree(folder / STATE, ignore_errors=True)
    num_utterances = len({row // corpus.settings.copies for row in examples.rows})
    return TrainingResult(recognizer, losses, seconds, num_utterances)


class _LossError(ModelError):
    """The loss is not a number: what the training has made of the model is worth nothing."""


@dataclass
class TrainingLoop:
    """The steps of a training."""

    model: AcousticModel
    examples: Examples
    recipe: Recipe
    targets: SparseTargets | None
    checkpoint: TrainingCheckpoint | None
    doing: ClassVar[str] = "training"
    """What progress is told."""

    def begin(self, step: int, num_steps: int) -> None:
        """Called once, when the model is as the last run left it, before a step of so many."""

    def before_step(self, step: int, num_steps: int) -> None:
        """Called before the gradients of a step are made; must change nothing if it is called once more."""

    def after_step(self) -> None:
        """Called when the weights have moved."""

    def loss(self, batch: Batch) -> Tensor:
        """Of a batch, a scalar with a gradient."""
        logits = self.model(batch.features, batch.lengths)
        return batch_loss(logits, batch, self.examples, self.recipe, self.targets)

    def run(self, tell: Progress) -> list[float]:
        """Train the model in place; the loss of each step."""
        optimizer = torch.optim.Adam(self.model.parameters(), lr=self.recipe.learning_rate, fused=True)
        progressed = Progressed() if self.checkpoint is None else self.checkpoint.load(self.model, optimizer)
        batches = self._batches()
        self.begin(progressed.step, len(batches))
        saved = progressed.step
        is_whole = True  # but while the optimizer moves weights
        statistics = [buffer.clone() for buffer in self.model.buffers()]
        tell(self.doing, progressed.step, len(batches))
        try:
            while progressed.step < len(batches):
                self.before_step(progressed.step, len(batches))
                loss = self._backward(batches[progressed.step], progressed.step)
                for group in optimizer.param_groups:
                    group["lr"] = self.recipe.schedule.rate(progressed.step, len(batches))
                is_whole = False
                optimizer.step()
                optimizer.zero_grad()
                self.after_step()
                progressed.step += 1
                progressed.losses.append(loss)
                statistics = [buffer.clone() for buffer in self.model.buffers()]
                is_whole = True
                if self.checkpoint is not None and progressed.step - saved >= self.recipe.save_every:
                    self.checkpoint.save(self.model, optimizer, progressed)
                    saved = progressed.step
                tell(self.doing, progressed.step, len(batches))
        except BaseException as error:
            if self.checkpoint is not None and isinstance(error, _LossError):
                self.checkpoint.remove()
            elif self.checkpoint is not None and is_whole and progressed.step > saved:
                # A forward pass that no step followed has changed the norms' running statistics.
                for buffer, value in zip(self.model.buffers(), statistics, strict=True):
                    buffer.copy_(value)
                self.checkpoint.save(self.model, optimizer, progressed)
            raise
        if self.checkpoint is not None and progressed.step > saved:
            self.checkpoint.save(self.model, optimizer, progressed)
        return progressed.losses

    def _batches(self) -> list[list[int]]:
        """Of all epochs."""
        corpus = self.examples.corpus
        plan = BatchPlan(
            [corpus.num_frames(row) for row in range(len(corpus))],
            corpus.settings.copies,
            int(self.recipe.batch_seconds * corpus.settings.features.frames_per_second),
            self.recipe.seed,
        )
        epochs = range(self.recipe.epochs)
        return [batch for epoch in epochs for batch in plan.epoch(self.examples.rows, epoch)]

    def _backward(self, rows: list[int], step: int) -> float:
        """Make the gradients of a step; its loss."""
        # What is random in a step depends on its number only, so that a resumed run repeats it.
        with _seeded(self.recipe.seed * _SEED + step) as generator:
            batch = collate(self.examples, rows, [self._features(row, generator) for row in rows])
            self.model.train()
            loss = self.loss(batch)
            torch.autograd.backward(loss)
        value = float(loss.detach())
        if not math.isfinite(value):
            raise _LossError(
                f"the loss of step {step + 1} is {value}: give a lower learning rate than "
                f"{self.recipe.learning_rate:g}"
            )
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.recipe.max_norm)
        return value

    def _features(self, row: int, generator: torch.Generator) -> Tensor:
        features = self.examples.corpus.features(row)
        if not self.recipe.spec_augment:
            return features
        return spec_augmented(features, self.examples.corpus.settings.features, generator)


@contextmanager
def _seeded(seed: int) -> Iterator[torch.Generator]:
    """torch's global generator with a seed, and as it was afterwards; gives one more of the same seed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed % 2**63)
        yield torch.Generator().manual_seed(seed % 2**63)


def _digest(recipe: Recipe, examples: Examples, targets: SparseTargets | None) -> str:
    basis = [
        recipe.to_dict(),
        examples.corpus.digest,
        examples.tokens.to_json(),
        None if targets is None else targets.header.digest,
    ]
    return hashlib.sha256(json.dumps(basis, sort_keys=True).encode()).hexdigest()[:16]
