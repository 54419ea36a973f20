"""RSQ training of a recognizer: fake-quantised weights learn from the labels and from the float model."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from modicum.quant.loss import RSQLossSettings, recorded_outputs, rsq_loss
from modicum.speech.acoustic_model import AcousticModel, inside
from modicum.speech.examples import Batch
from modicum.speech.training import TrainingLoop
from modicum.speech.training_loss import batch_loss


@dataclass
class RSQTraining(TrainingLoop):
    """A `TrainingLoop` with the loss of `modicum.quant.rsq_loss`.

    The task is CTC on the labels. Noise of layers and divergence of logits are of valid frames only, so that
    padding does not matter. `targets` are not used.

    Attributes:
        teacher: the float model in evaluation mode; each of its Conv1d layers is a layer of the same name in
            the student, quantised (or float, for a comparison).
        weights: of the parts of the loss.
    """

    teacher: AcousticModel
    weights: RSQLossSettings = field(default_factory=RSQLossSettings)

    def loss(self, batch: Batch) -> Tensor:
        names = [name for name, layer in self.teacher.named_modules() if isinstance(layer, nn.Conv1d)]
        with recorded_outputs(self.model, names) as found:
            logits = self.model(batch.features, batch.lengths)
        with torch.no_grad(), recorded_outputs(self.teacher, names) as exact:
            expected = self.teacher(batch.features, batch.lengths)
        is_inside = inside(self.model.output_lengths(batch.lengths), logits.shape[1])
        task = batch_loss(logits, batch, self.examples, self.recipe, None)
        layers = tuple(
            {name: out * is_inside[:, None] for name, out in each.items()} for each in (found, exact)
        )
        return rsq_loss(task, (layers[0], layers[1]), (logits[is_inside], expected[is_inside]), self.weights)
