"""CTC: an essence loss on the frames at which a teacher's CTC outputs say something.

A model trained with CTC gives blank at most frames and each label at few, its spikes, and two models spike at
different frames. The mean of several members' outputs at one frame then mixes one's spike with another's
blank, and frames at which all give blank teach little but blank. So the soft labels are used at frames whose
most probable class is not blank, or at those and their neighbours on both sides. This remedy is of a review
of distillation for CTC (arXiv 2506.01503); Yang et al. 2019 (arXiv 1906.10834) have, as we read them, labels
for each frame.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from modicum.distill.essence import SoftTarget
from modicum.distill.loss import check_loss, essence_loss
from modicum.errors import InputError


@dataclass(frozen=True)
class CTCBatch:
    """Lengths and labels of N utterances.

    Attributes:
        lengths: frames of each, [N] int64.
        labels: their label sequences, [N, L] int64 without blanks; None where hard_weight is 0.
        label_lengths: labels of each, [N] int64.
    """

    lengths: Tensor
    labels: Tensor | None = None
    label_lengths: Tensor | None = None


@dataclass(frozen=True)
class CTCFrames:
    """Which frames soft labels are used at: those whose most probable class is not blank, and `neighbours`
    frames before and after each.

    Raises:
        InputError: a number is negative.
    """

    blank: int = 0
    neighbours: int = 0

    def __post_init__(self) -> None:
        if self.blank < 0 or self.neighbours < 0:
            raise InputError(
                f"blank is {self.blank} and neighbours {self.neighbours}: give a class, and 0 or more frames"
            )

    def select(self, best: Tensor, lengths: Tensor) -> Tensor:
        """[N, T] bool, False past an utterance's length.

        Args:
            best: the teacher's most probable class of each frame, [N, T] int64.
            lengths: [N] int64.
        """
        is_inside = torch.arange(best.shape[1], device=best.device) < lengths.to(best.device)[:, None]
        is_spike = ((best != self.blank) & is_inside).float()
        width = 2 * self.neighbours + 1
        near = F.max_pool1d(is_spike[:, None], width, stride=1, padding=self.neighbours)[:, 0]
        return (near > 0) & is_inside


def ctc_essence_loss(
    logits: Tensor,
    target: SoftTarget,
    batch: CTCBatch,
    *,
    frames: CTCFrames,
    hard_weight: float = 0.5,
    temperature: float = 1.0,
) -> Tensor:
    """λ · CTC + (1 - λ) · τ² · mean over the selected frames of CE(q, softmax(z / τ)), a scalar in nats.

    The CTC loss is divided by the label length and averaged over utterances, as `torch.nn.CTCLoss` does.
    Where no frame is selected the second term is 0.

    Args:
        logits: [N, T, C]
        target: of N·T frames, an utterance after the other; frames past an utterance's length are not read.
        frames: which frames are distilled, and which class is blank.
        hard_weight: λ, 0 to 1.
        temperature: τ, at which the target was recorded.

    Raises:
        InputError: shapes do not fit, labels are missing, or a number is out of range.
    """
    check_loss(hard_weight, temperature)
    num, length, classes = logits.shape
    if len(target.classes) != num * length or frames.blank >= classes:
        raise InputError(
            f"logits are of {num} utterances, {length} frames and {classes} classes, the target of "
            f"{len(target.classes)} frames, and blank is {frames.blank}: give the logits of the frames that "
            "were recorded, and a blank that is a class"
        )
    loss = logits.new_zeros((), dtype=torch.promote_types(logits.dtype, torch.float32))
    if hard_weight > 0:
        loss = loss + hard_weight * _ctc(logits, batch, frames.blank)
    if hard_weight < 1:
        chosen = frames.select(target.classes[:, 0].view(num, length), batch.lengths).flatten()
        if bool(chosen.any()):
            tail = None if target.tail is None else target.tail[chosen]
            part = SoftTarget(target.classes[chosen], target.probabilities[chosen], tail, target.num_classes)
            soft = essence_loss(
                logits.flatten(0, 1)[chosen.to(logits.device)], part, hard_weight=0, temperature=temperature
            )
            loss = loss + (1 - hard_weight) * soft
        else:
            loss = loss + 0 * logits.sum()  # a gradient of zeros rather than none
    return loss


def _ctc(logits: Tensor, batch: CTCBatch, blank: int) -> Tensor:
    if batch.labels is None or batch.label_lengths is None:
        raise InputError("hard_weight is above 0 and there are no labels: give labels, or hard_weight=0")
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return F.ctc_loss(
        wide.log_softmax(-1).transpose(0, 1), batch.labels, batch.lengths, batch.label_lengths, blank=blank
    )
