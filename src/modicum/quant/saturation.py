"""Saturation counter: how many values were clipped."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class SaturationCounter(nn.Module):
    """Counts values that were clipped, and all values. Not saved with the model."""

    num_saturated: Tensor
    num_values: Tensor

    def __init__(self) -> None:
        super().__init__()
        for name in ("num_saturated", "num_values"):
            self.register_buffer(name, torch.zeros((), dtype=torch.int64), persistent=False)

    def add(self, is_saturated: Tensor) -> None:
        """Count a mask of any shape."""
        self.num_saturated += is_saturated.sum()
        self.num_values += is_saturated.numel()

    def reset(self) -> None:
        """Begin anew."""
        self.num_saturated.zero_()
        self.num_values.zero_()

    @property
    def rate(self) -> float:
        """Clipped values as a share of all; 0 before the first one."""
        return float(self.num_saturated) / max(int(self.num_values), 1)
