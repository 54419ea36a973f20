"""Noise-to-signal ratio: how far a block's output is from its reference's, channel by channel.

Per-channel mean square error over the channel's variance, its mean over channels: how DONNA (arXiv
2012.08859) measures a block's quality, as recalled of the paper; its text could not be read.
"""

from __future__ import annotations

import torch
from torch import Tensor

_LEAST = 1e-4
"""Channels whose variance is below this share of the mean variance are dead, and left out."""


def channel_last(features: Tensor) -> Tensor:
    """[n, C] of features [B, C, H, W] (images), [B, N, C] (tokens) or [B, C]."""
    return (features.movedim(1, -1) if features.dim() == 4 else features).flatten(0, -2)


def live_channels(variance: Tensor) -> Tensor:
    """Which channels [C] vary enough to be compared."""
    return variance > _LEAST * variance.mean()


def noise_to_signal(found: Tensor, expected: Tensor, variance: Tensor) -> Tensor:
    """(1/C) Σ_c mean((expected_c - found_c)²) / variance_c, over the channels that are alive.

    Args:
        found: a variant's output, [B, C, H, W] or [B, N, C].
        expected: the reference's, of the same shape.
        variance: [C], of the reference's output over the data.

    Returns:
        A scalar with a gradient: 0 for the same output, 1 for the channels' means. 0 if no channel is alive.
    """
    error = channel_last(found - expected).square().mean(0)
    alive = live_channels(variance)
    if not alive.any():
        return error.sum() * 0.0
    return (error[alive] / variance[alive].to(error.dtype)).mean()


class ErrorSums:
    """Noise-to-signal ratio of many batches: sums in float64.

    Args:
        channels: C.
    """

    def __init__(self, channels: int) -> None:
        self.count = 0
        self._error = torch.zeros(channels, dtype=torch.float64)
        self._mean = torch.zeros(channels, dtype=torch.float64)
        self._square = torch.zeros(channels, dtype=torch.float64)

    @torch.no_grad()
    def add(self, expected: Tensor, found: Tensor | None = None) -> None:
        """Add a batch; without `found` for the variance only."""
        rows = channel_last(expected).double().cpu()
        # Sums of squares about the mean so far (Chan et al. 1983): no cancellation.
        count, mean = len(rows), rows.mean(0)
        shift = mean - self._mean
        total = self.count + count
        self._square += (rows - mean).square().sum(0) + shift.square() * (self.count * count / total)
        self._mean += shift * (count / total)
        self.count = total
        if found is not None:
            self._error += (channel_last(found).double().cpu() - rows).square().sum(0)

    @property
    def variance(self) -> Tensor:
        """[C], float64."""
        return self._square / max(1, self.count)

    @property
    def value(self) -> float:
        """The ratio; NaN if an output was not finite."""
        alive = live_channels(self.variance)
        if not alive.any():
            return 0.0
        return float((self._error[alive] / self.count / self.variance[alive]).mean())
