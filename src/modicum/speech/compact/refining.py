"""Refining: a trained recognizer is trained on while its weights become sparse and are rounded.

The order is that of the page from which we work, share, train, prune, quantise; layers were shared when the
recognizer was first trained. Training sees the weights as they will be stored: w ⊙ mask, rounded to few bits
with straight-through gradients (see `modicum.quant.FakeQuant`). Activations stay in floating point. Shares of
the steps, rates and the loss are ours.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from modicum.distill.checkpoint import Progressed, TrainingCheckpoint
from modicum.distill.targets import SparseTargets
from modicum.errors import InputError, ModelError
from modicum.quant.fake_quant import FakeQuant
from modicum.speech.acoustic_model import AcousticModel
from modicum.speech.augment import spec_augmented
from modicum.speech.batches import BatchPlan
from modicum.speech.compact.compressed import BITS, matrices, quantizer
from modicum.speech.compact.pruning import (
    PruningSettings,
    apply_masks,
    expand_blocks,
    is_prunable,
    kept_blocks,
    make_masks,
)
from modicum.speech.corpus import Progress
from modicum.speech.examples import Examples, collate
from modicum.speech.recipe import Recipe
from modicum.speech.training_loss import batch_loss

_SEED = 1_000_003


@dataclass(frozen=True)
class RefiningRecipe:
    """How a recognizer becomes compact.

    Attributes:
        training: epochs, rates, loss and seed; its model is not read.
        pruning: sparsity and schedule.
        bits: of a weight, 4 or 8.
        quantize_from: share of the steps after which weights are rounded in training.

    Raises:
        InputError: a value is out of range.
    """

    training: Recipe = field(default_factory=lambda: Recipe(epochs=4, learning_rate=1e-3))
    pruning: PruningSettings = field(default_factory=PruningSettings)
    bits: int = 8
    quantize_from: float = 0.6

    def __post_init__(self) -> None:
        if self.bits not in BITS:
            raise InputError(f"weights have {self.bits} bits: give one of {', '.join(map(str, BITS))}")
        if not 0 <= self.quantize_from <= 1:
            raise InputError(
                f"weights are rounded from {self.quantize_from} of the steps: give a share from 0 to 1"
            )

    def digest(self, model: AcousticModel, examples: Examples, targets: SparseTargets | None) -> str:
        """16 hex digits that stand for all that a refining depends on."""
        basis: list[Any] = [
            replace(self.training, model=model.settings).to_dict(),
            asdict(self.pruning),
            [self.bits, self.quantize_from],
            examples.corpus.digest,
            examples.tokens.to_json(),
            None if targets is None else targets.header.digest,
        ]
        sha = hashlib.sha256(json.dumps(basis, sort_keys=True).encode())
        for value in model.state_dict().values():
            sha.update(value.detach().contiguous().numpy().tobytes())
        return sha.hexdigest()[:16]


def refine(
    model: AcousticModel,
    examples: Examples,
    recipe: RefiningRecipe,
    *,
    targets: SparseTargets | None = None,
    checkpoint: TrainingCheckpoint | None = None,
    progress: Progress | None = None,
) -> list[float]:
    """Train a model in place until its weights are sparse and bear rounding; the loss of each step.

    The weights are not rounded in the end, and where they were pruned they are 0: see
    `modicum.speech.compact.compressed.compress_weights`. A run that was stopped goes on from its checkpoint,
    and gives what it would have given.

    Raises:
        ModelError: the loss is not a number, or the checkpoint cannot be written.
        InputError: the checkpoint is of another refining.
    """
    losses = _Refining(model, examples, recipe, targets, checkpoint).run(progress or (lambda *_: None))
    model.eval()
    return losses


@dataclass
class _Refining:
    model: AcousticModel
    examples: Examples
    recipe: RefiningRecipe
    targets: SparseTargets | None
    checkpoint: TrainingCheckpoint | None

    def __post_init__(self) -> None:
        self._weights = matrices(self.model)
        self._roundings: dict[str, FakeQuant] = {
            name: quantizer(weight, self.recipe.bits, name) for name, weight in self._weights.items()
        }
        self._masks: dict[str, Tensor] = {}

    def run(self, tell: Progress) -> list[float]:
        training = self.recipe.training
        optimizer = torch.optim.Adam(self.model.parameters(), lr=training.learning_rate)
        progressed = Progressed() if self.checkpoint is None else self.checkpoint.load(self.model, optimizer)
        batches = self._batches()
        self._masks = self._masks_so_far()
        saved = progressed.step
        tell("refining", progressed.step, len(batches))
        while progressed.step < len(batches):
            step = progressed.step
            if self.recipe.pruning.is_due(step, len(batches)):
                sparsity = self.recipe.pruning.sparsity_at(step, len(batches))
                self._masks = make_masks(self.model, sparsity, self.recipe.pruning)
                apply_masks(self.model, self._masks)
            progressed.losses.append(self._backward(batches[step], step, len(batches)))
            for group in optimizer.param_groups:
                group["lr"] = training.schedule.rate(step, len(batches))
            optimizer.step()
            optimizer.zero_grad()
            apply_masks(self.model, self._masks)
            progressed.step += 1
            if self.checkpoint is not None and progressed.step - saved >= training.save_every:
                self.checkpoint.save(self.model, optimizer, progressed)
                saved = progressed.step
            tell("refining", progressed.step, len(batches))
        if self.recipe.pruning.sparsity:  # also where the schedule ends with the last step
            self._masks = make_masks(self.model, self.recipe.pruning.sparsity, self.recipe.pruning)
            apply_masks(self.model, self._masks)
        return progressed.losses

    def _masks_so_far(self) -> dict[str, Tensor]:
        """Of a model that was pruned before: its zeros."""
        block = self.recipe.pruning.block
        return {
            name: expand_blocks(kept_blocks(weight, block), weight.shape, block)
            for name, weight in self._weights.items()
            if is_prunable(weight)
        }

    def _batches(self) -> list[list[int]]:
        corpus, training = self.examples.corpus, self.recipe.training
        plan = BatchPlan(
            [corpus.num_frames(row) for row in range(len(corpus))],
            corpus.settings.copies,
            int(training.batch_seconds * corpus.settings.features.frames_per_second),
            training.seed,
        )
        return [batch for epoch in range(training.epochs) for batch in plan.epoch(self.examples.rows, epoch)]

    def _backward(self, rows: list[int], step: int, num_steps: int) -> float:
        training = self.recipe.training
        with _seeded(training.seed * _SEED + step) as generator:
            batch = collate(self.examples, rows, [self._features(row, generator) for row in rows])
            self.model.train()
            weights = self._rounded() if step >= self.recipe.quantize_from * num_steps else {}
            logits = torch.func.functional_call(self.model, weights, (batch.features, batch.lengths))
            loss = batch_loss(logits, batch, self.examples, training, self.targets)
            torch.autograd.backward(loss)
        value = float(loss.detach())
        if not math.isfinite(value):
            raise ModelError(
                f"the loss of step {step + 1} is {value}: give a lower learning rate than "
                f"{training.learning_rate:g}"
            )
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), training.max_norm)
        return value

    def _rounded(self) -> dict[str, Tensor]:
        """The matrices as they will be stored; gradients go to those that are trained."""
        rounded: dict[str, Tensor] = {}
        for name, weight in self._weights.items():
            self._roundings[name].observe(weight)
            rounded[name] = self._roundings[name](weight)
        return rounded

    def _features(self, row: int, generator: torch.Generator) -> Tensor:
        features = self.examples.corpus.features(row)
        if not self.recipe.training.spec_augment:
            return features
        return spec_augmented(features, self.examples.corpus.settings.features, generator)


@contextmanager
def _seeded(seed: int) -> Iterator[torch.Generator]:
    """torch's global generator with a seed, and as it was afterwards; gives one more of the same seed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed % 2**63)
        yield torch.Generator().manual_seed(seed % 2**63)
