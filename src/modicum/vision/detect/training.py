"""Training: a detector learns from images with boxes, and from a teacher where one is given."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from modicum.distill.checkpoint import Progressed, TrainingCheckpoint
from modicum.errors import InputError, ModelError
from modicum.vision.detect.augment import augmented
from modicum.vision.detect.guidance import Guide
from modicum.vision.detect.loaded_images import Progress, TrainingImage
from modicum.vision.detect.multibox_loss import Targets, make_targets, mined_anchors, multibox_loss
from modicum.vision.detect.recipe import Recipe
from modicum.vision.detect.ssd import SSD


class _LossError(ModelError):
    """The loss is not a number: what the training has made of the network is worth nothing."""


@dataclass
class DetectorTraining:
    """The steps of a training.

    Attributes:
        network: trained in place.
        images: to learn from.
        recipe: how.
        guide: a teacher; None for none.
        checkpoint: a file from which a stopped training goes on; None for none.
        doing: what progress is told.
    """

    network: SSD
    images: Sequence[TrainingImage]
    recipe: Recipe
    guide: Guide | None = None
    checkpoint: TrainingCheckpoint | None = None
    doing: str = "training"

    def run(self, progress: Progress | None = None) -> list[float]:
        """Train; the loss of each step. A run that goes on from a checkpoint gives what it would have given
        without a stop, bit for bit on one machine with one number of threads.

        Raises:
            InputError: there is no image, or the checkpoint is of another training.
            ModelError: the loss is not a number, or a checkpoint cannot be written.
        """
        if not self.images:
            raise InputError("there is no image to learn from: give some")
        model = nn.ModuleDict({"network": self.network})
        if self.guide is not None:
            model["guide"] = self.guide
        optimizer = torch.optim.Adam(model.parameters(), lr=self.recipe.learning_rate)
        progressed = Progressed() if self.checkpoint is None else self.checkpoint.load(model, optimizer)
        total, saved = self.recipe.schedule.num_steps(len(self.images)), progressed.step
        tell = progress or (lambda *_: None)
        tell(self.doing, progressed.step, total)
        is_whole = True  # but while weights move
        try:
            while progressed.step < total:
                statistics = [buffer.clone() for buffer in model.buffers()]
                loss = self._backward(progressed.step)
                torch.nn.utils.clip_grad_norm_(model.parameters(), self.recipe.max_norm)
                for group in optimizer.param_groups:
                    group["lr"] = self.recipe.schedule.rate(progressed.step, total)
                is_whole = False
                optimizer.step()
                optimizer.zero_grad()
                progressed.step += 1
                progressed.losses.append(loss)
                statistics = [buffer.clone() for buffer in model.buffers()]
                is_whole = True
                if self.checkpoint is not None and progressed.step - saved >= self.recipe.save_every:
                    self.checkpoint.save(model, optimizer, progressed)
                    saved = progressed.step
                tell(self.doing, progressed.step, total)
        except BaseException as error:
            if self.checkpoint is not None and isinstance(error, _LossError):
                self.checkpoint.remove()
            elif self.checkpoint is not None and is_whole and progressed.step > saved:
                # A forward pass that no step followed has changed the norms' running statistics.
                for buffer, value in zip(model.buffers(), statistics, strict=True):
                    buffer.copy_(value)
                self.checkpoint.save(model, optimizer, progressed)
            raise
        if self.checkpoint is not None and progressed.step > saved:
            self.checkpoint.save(model, optimizer, progressed)
        self.network.eval()
        return progressed.losses

    def _backward(self, step: int) -> float:
        """Make the gradients of a step; its loss."""
        images, targets = self.batch(step)
        # A norm that is given a single value has no variance to divide by: then those that it has kept serve.
        self.network.train(len(images) * min(rows * columns for rows, columns in self.network.map_sizes) > 1)
        outputs = self.network(images)
        mined = mined_anchors(outputs.logits, targets)
        loss = multibox_loss(outputs.logits, outputs.offsets, targets, mined)
        if self.guide is not None:
            loss = loss + self.guide.loss(images, outputs, targets, mined)
        torch.autograd.backward(loss)
        value = float(loss.detach())
        if not math.isfinite(value):
            raise _LossError(
                f"the loss of step {step + 1} is {value}: give a lower learning rate than "
                f"{self.recipe.learning_rate:g}"
            )
        return value

    def batch(self, step: int) -> tuple[Tensor, Targets]:
        """Images [B, 3, H, W] of a step, and what they should give."""
        generator = self.recipe.step_generator(step)
        settings = self.network.settings
        target = (settings.height, settings.width)
        rows = self.recipe.schedule.rows(step, len(self.images)).tolist()
        made = [augmented(self.images[row], target, self.recipe.augment, generator) for row in rows]
        pixels, boxes, labels = ([one[part] for one in made] for part in range(3))
        return torch.stack(pixels), make_targets(boxes, labels, self.network.anchors)


def new_network(settings: Any, seed: int) -> SSD:
    """A network of a record, with weights that depend on the seed only."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return SSD(settings)


def training_checkpoint(path: Path, *basis: Any) -> TrainingCheckpoint:
    """A checkpoint of a training that depends on `basis`, values as JSON takes them."""
    text = json.dumps(basis, sort_keys=True, default=str)
    return TrainingCheckpoint(path, hashlib.sha256(text.encode()).hexdigest()[:16])
