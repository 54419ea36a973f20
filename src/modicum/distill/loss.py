"""Loss: cross-entropy against hard labels and an essence together, with its exact gradient.

With hard weight λ, temperature τ, logits z, label y and target q (Hinton et al. 2015, arXiv 1503.02531; Yang
et al. 2019, arXiv 1906.10834, whose own weights we could not read):

    L = λ · CE(y, softmax(z)) + (1 - λ) · τ² · CE(q, softmax(z / τ))

At τ = 1 this is the cross-entropy against one mixed target r = λ · onehot(y) + (1 - λ) · q, and its gradient
by z is softmax(z) - r for a q that sums to 1. With all classes kept it is Hinton's loss, up to the entropy of
q, which no gradient sees. With one class kept, renormalised, and λ = 0 it is training on the teacher's
choice.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from modicum.distill.essence import SoftTarget
from modicum.errors import InputError

Reduction = Literal["mean", "sum", "none"]


def essence_loss(
    logits: Tensor,
    target: SoftTarget,
    labels: Tensor | None = None,
    *,
    hard_weight: float = 0.5,
    temperature: float = 1.0,
    reduction: Reduction = "mean",
) -> Tensor:
    """The loss of frames or tokens, in nats.

    A target with a tail bin adds - tail · log(Σ of the student's probabilities of all classes not kept) to
    the second cross-entropy. Its gradient is that of a target that divides the tail among those classes as
    the student itself does.

    Args:
        logits: [N, C], or [..., C] with N frames in all; computed in float32, or in float64 where they are.
        target: of N frames and C classes, from `Essence.target`; recorded at the same temperature.
        labels: the correct classes, [N] or [...] int64; may be None where hard_weight is 0.
        hard_weight: λ, 0 to 1.
        temperature: τ.
        reduction: "none" gives the frames' losses [N].

    Raises:
        InputError: shapes or classes do not fit, labels are missing, or a number is out of range.
    """
    flat = logits.flatten(0, -2)
    check_loss(hard_weight, temperature)
    if flat.shape != (len(target.classes), target.num_classes):
        raise InputError(
            f"logits are of {flat.shape[0]:,} frames and {flat.shape[1]:,} classes, the target of "
            f"{len(target.classes):,} and {target.num_classes:,}: give the logits of the frames that were "
            "recorded"
        )
    if labels is None and hard_weight > 0:
        raise InputError(
            f"hard_weight is {hard_weight} and there are no labels: give labels, or hard_weight=0"
        )
    if labels is not None and labels.numel() != len(flat):
        raise InputError(f"there are {labels.numel():,} labels for {len(flat):,} frames: give one for each")
    target = target.to(flat.device)
    flat_labels = None if labels is None or not hard_weight else labels.flatten().to(flat.device)
    mixed: Any = _MixedCrossEntropy  # its apply has no types
    losses: Tensor = mixed.apply(flat, target, flat_labels, float(hard_weight), float(temperature))
    if reduction == "none":
        return losses
    return losses.sum() if reduction == "sum" else losses.mean()


def check_loss(hard_weight: float, temperature: float) -> None:
    """Raise if one of them is out of range.

    Raises:
        InputError: it is.
    """
    if not 0 <= hard_weight <= 1:
        raise InputError(f"hard_weight is {hard_weight}: give a share from 0 to 1")
    if not 0 < temperature < float("inf"):
        raise InputError(f"the temperature is {temperature}: give a number above 0")


class _MixedCrossEntropy(torch.autograd.Function):
    """Losses [N] of logits [N, C]. Written by hand so that the backward pass makes one tensor of the logits'
    size, where autograd holds a log-softmax for each of the two terms from the forward pass on.
    """

    @staticmethod
    def forward(
        ctx: Any,
        logits: Tensor,
        target: SoftTarget,
        labels: Tensor | None,
        hard_weight: float,
        temperature: float,
    ) -> Tensor:
        ctx.save_for_backward(logits)
        ctx.settings = target, labels, hard_weight, temperature
        z = logits.to(torch.promote_types(logits.dtype, torch.float32))
        losses = z.new_zeros(len(z))
        if labels is not None and hard_weight:
            losses += hard_weight * (z.logsumexp(-1) - z.gather(1, labels[:, None])[:, 0])
        if hard_weight < 1:
            z = z / temperature
            q = target.probabilities.to(z.dtype)
            # Per class, as the sum of many small terms would lose digits in (Σ q) · lse - Σ q · z.
            each = q * (z.logsumexp(-1, keepdim=True) - z.gather(1, target.classes))
            soft = each.sum(-1)
            if target.tail is not None:
                rest = _others(z, target).logsumexp(-1)
                soft += torch.where(rest.isfinite(), target.tail.to(z.dtype) * (z.logsumexp(-1) - rest), 0.0)
            losses += (1 - hard_weight) * temperature**2 * soft
        return losses

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, outer: Tensor) -> tuple[Tensor, None, None, None, None]:
        (logits,) = ctx.saved_tensors
        target, labels, hard_weight, temperature = ctx.settings
        z = logits.to(torch.promote_types(logits.dtype, torch.float32))
        gradient = torch.zeros_like(z)
        if labels is not None and hard_weight:
            gradient = z.softmax(-1).mul_(hard_weight)
            hard = z.new_full((len(z), 1), -hard_weight)
            gradient.scatter_add_(1, labels[:, None], hard)
        if hard_weight < 1:
            z = z / temperature
            q = target.probabilities.to(z.dtype)
            weight = (1 - hard_weight) * temperature  # τ² of the loss, 1/τ of the inner derivative
            total = q.sum(-1)
            if target.tail is not None:
                tail = target.tail.to(z.dtype)
                others = _others(z, target)
                is_some = others.logsumexp(-1).isfinite()
                total = total + torch.where(is_some, tail, 0.0)
                share = torch.where(is_some[:, None], others.softmax(-1), 0.0)
                gradient -= weight * tail[:, None] * share
            gradient += z.softmax(-1).mul_(weight * total[:, None])
            gradient.scatter_add_(1, target.classes, -weight * q)
        return (gradient * outer[:, None]).to(logits.dtype), None, None, None, None


def _others(z: Tensor, target: SoftTarget) -> Tensor:
    """The logits [N, C] of the classes that are not kept; -inf for those that are."""
    return z.scatter(1, target.classes, float("-inf"))
