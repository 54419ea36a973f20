"""Training loss: of a batch, against its labels and, where there are any, a teacher's targets."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from modicum.distill.ctc import CTCBatch, CTCFrames, ctc_essence_loss
from modicum.distill.essence import SoftTarget, Tail
from modicum.distill.loss import essence_loss
from modicum.distill.targets import SparseTargets
from modicum.speech.examples import NO_LABEL, Batch, Examples
from modicum.speech.recipe import Recipe
from modicum.speech.tokens import BLANK


def batch_loss(
    logits: Tensor, batch: Batch, examples: Examples, recipe: Recipe, targets: SparseTargets | None
) -> Tensor:
    """A scalar in nats: for each token with CTC (averaged over utterances), for each frame else.

    Args:
        logits: [N, T', C] of the batch.
        batch: with labels.
        examples: of the batch.
        recipe: weights of the two parts.
        targets: of all output frames of the examples' corpus; None to train on the labels only.
    """
    if examples.rate.criterion == "frames":
        return _frame_loss(logits, batch, examples, recipe, targets)
    lengths = torch.tensor([examples.rate.num_frames(int(length)) for length in batch.lengths])
    if targets is None or recipe.hard_weight == 1:
        log_probs = _wide(logits).log_softmax(-1).transpose(0, 1)
        return F.ctc_loss(log_probs, batch.labels, lengths, batch.label_lengths, blank=BLANK)
    spans = [examples.span(row) for row in batch.rows]
    target = padded_target(targets, spans, logits.shape[1], recipe.tail)
    return ctc_essence_loss(
        logits,
        target,
        CTCBatch(lengths, batch.labels, batch.label_lengths),
        frames=CTCFrames(BLANK, recipe.neighbours),
        hard_weight=recipe.hard_weight,
        temperature=targets.header.temperature,
    )


def _frame_loss(
    logits: Tensor, batch: Batch, examples: Examples, recipe: Recipe, targets: SparseTargets | None
) -> Tensor:
    is_labelled = batch.labels != NO_LABEL
    chosen, labels = logits[is_labelled], batch.labels[is_labelled]
    if targets is None or recipe.hard_weight == 1:
        return F.cross_entropy(_wide(chosen), labels)
    spans = [examples.span(row) for row in batch.rows]
    target = padded_target(targets, spans, logits.shape[1], recipe.tail)
    index = is_labelled.flatten()
    tail = None if target.tail is None else target.tail[index]
    part = SoftTarget(target.classes[index], target.probabilities[index], tail, target.num_classes)
    return essence_loss(
        chosen, part, labels, hard_weight=recipe.hard_weight, temperature=targets.header.temperature
    )


def _wide(logits: Tensor) -> Tensor:
    """In float32 at least."""
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


def padded_target(
    targets: SparseTargets, spans: Sequence[tuple[int, int]], size: int, tail: Tail
) -> SoftTarget:
    """Targets of N utterances, each padded to `size` frames: N·size rows; those of padding are 0."""
    parts = [targets.read(*span).target(tail) for span in spans]
    width = max(part.classes.shape[1] for part in parts)
    classes, probabilities, tails = [], [], []
    for part in parts:
        num, more = len(part.classes), width - part.classes.shape[1]
        # As in an `Essence`, the first class is repeated with probability 0.
        wide = torch.cat([part.classes, part.classes[:, :1].expand(num, more)], 1)
        classes.append(F.pad(wide, (0, 0, 0, size - num)))
        probabilities.append(F.pad(part.probabilities, (0, more, 0, size - num)))
        if part.tail is not None:
            tails.append(F.pad(part.tail, (0, size - num)))
    return SoftTarget(
        torch.cat(classes),
        torch.cat(probabilities),
        torch.cat(tails) if tails else None,
        targets.header.num_classes,
    )
