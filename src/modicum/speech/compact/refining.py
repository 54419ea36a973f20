"""Refining: a trained recognizer is trained on while its weights become sparse and are rounded.

The order is that of the page from which we work, share, train, prune, quantise; layers were shared when the
recognizer was first trained. Training sees the weights as they will be stored: w ⊙ mask, rounded to few bits
with straight-through gradients (see `modicum.quant.FakeQuant`). Activations stay in floating point. Shares of
the steps, rates and the loss are ours.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, field, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from modicum.distill.checkpoint import TrainingCheckpoint
from modicum.distill.targets import SparseTargets
from modicum.errors import InputError
from modicum.quant.fake_quant import FakeQuant
from modicum.speech.acoustic_model import AcousticModel
from modicum.speech.compact.compressed import BITS, matrices, quantizer
from modicum.speech.compact.pruning import (
    PruningSettings,
    apply_masks,
    expand_blocks,
    is_prunable,
    kept_blocks,
    make_masks,
    stored_mask,
)
from modicum.speech.corpus import Progress
from modicum.speech.examples import Batch, Examples
from modicum.speech.recipe import Recipe
from modicum.speech.training import TrainingLoop
from modicum.speech.training_loss import batch_loss


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
    loop = _Refining(model, examples, recipe.training, targets, checkpoint, recipe)
    losses = loop.run(progress or (lambda *_: None))
    loop.finish()
    model.eval()
    return losses


@dataclass
class _Refining(TrainingLoop):
    refining: RefiningRecipe
    doing: ClassVar[str] = "refining"

    def __post_init__(self) -> None:
        self._weights = matrices(self.model)
        self._roundings: dict[str, FakeQuant] = {
            name: quantizer(weight, self.refining.bits, name) for name, weight in self._weights.items()
        }
        self._masks: dict[str, Tensor] = {}
        self._is_rounded = False

    def begin(self, step: int, num_steps: int) -> None:
        pruning = self.refining.pruning
        was_pruned = any(pruning.prunes_at(earlier, num_steps) for earlier in range(step))
        self._masks = self._zeros() if was_pruned else self._stored_masks()

    def before_step(self, step: int, num_steps: int) -> None:
        pruning = self.refining.pruning
        if pruning.prunes_at(step, num_steps):
            self._prune(pruning.sparsity_at(step, num_steps))
        self._is_rounded = step >= self.refining.quantize_from * num_steps

    def after_step(self) -> None:
        apply_masks(self.model, self._masks)

    def finish(self) -> None:
        """Prune to the end of the schedule, also where that ends with the last step."""
        if self.refining.pruning.sparsity:
            self._prune(self.refining.pruning.sparsity)

    def loss(self, batch: Batch) -> Tensor:
        weights = self._rounded() if self._is_rounded else {}
        logits = torch.func.functional_call(self.model, weights, (batch.features, batch.lengths))
        return batch_loss(logits, batch, self.examples, self.recipe, self.targets)

    def _prune(self, sparsity: float) -> None:
        apply_masks(self.model, make_masks(self.model, sparsity, self.refining.pruning))
        self._masks = self._zeros()

    def _zeros(self) -> dict[str, Tensor]:
        """The masks of a model that was pruned: all its zeros, so those of before stay where it had more."""
        block = self.refining.pruning.block
        return {
            name: expand_blocks(kept_blocks(weight, block), weight.shape, block)
            for name, weight in self._weights.items()
            if is_prunable(weight)
        }

    def _stored_masks(self) -> dict[str, Tensor]:
        """The masks that a model was given with; zeros of rounding are none, and learn."""
        block, bits = self.refining.pruning.block, self.refining.bits
        return {
            name: expand_blocks(kept, weight.shape, block)
            for name, weight in self._weights.items()
            if (kept := stored_mask(weight, bits, block)) is not None
        }

    def _rounded(self) -> dict[str, Tensor]:
        """The matrices as they will be stored; gradients go to those that are trained."""
        rounded: dict[str, Tensor] = {}
        for name, weight in self._weights.items():
            self._roundings[name].observe(weight)
            rounded[name] = self._roundings[name](weight)
        return rounded
