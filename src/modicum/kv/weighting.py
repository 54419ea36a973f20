"""Scores of a base policy as weights: what wrappers that weigh values by attention make of any score."""

from __future__ import annotations

import math

import torch
from torch import Tensor

_MOST = 1e30  # above any real score, and sums of it stay finite


def lifted(scores: Tensor, counted: Tensor) -> Tensor:
    """Scores raised so that the lowest counted one is 0, or as they are where none is negative.

    scores [B, H, ..., N], counted [B, H, ..., N] bool (broadcast). Attention weights pass unchanged; scores
    of another nature (KeyDiff's cosines, Knorm's norms) keep their order and their differences. A softmax
    would depend on their unit: one-hot for norms in the tens, uniform for cosines.
    """
    scores = scores.float().clamp(-_MOST, _MOST)
    lowest = scores.masked_fill(~counted, math.inf).amin(-1, keepdim=True)
    return scores - lowest.clamp_max(0.0)


def normalised(scores: Tensor, counted: Tensor) -> Tensor:
    """Lifted scores over their sum, which is that of the counted; 0 elsewhere, equal where all are 0."""
    weights = lifted(scores, counted).masked_fill(~counted, 0.0)
    total = weights.sum(-1, keepdim=True)
    equal = counted / counted.sum(-1, keepdim=True).clamp_min(1)
    return torch.where(total > 0, weights / total, equal)
