"""Random layers as calibration sees them: inputs correlated, unevenly scaled, with means."""

from __future__ import annotations

import torch
from torch import Tensor

from modicum.weights.statistics import Statistics


def inputs(width: int, tokens: int = 200, seed: int = 0, spread: float = 1.0) -> Tensor:
    """[n, d] float64."""
    generator = torch.Generator().manual_seed(seed)
    mixed = torch.randn(tokens, width, generator=generator, dtype=torch.float64)
    mixed = mixed @ torch.randn(width, width, generator=generator, dtype=torch.float64) / width**0.5
    scale = torch.exp(spread * torch.randn(width, generator=generator, dtype=torch.float64))
    return (mixed + torch.randn(width, generator=generator, dtype=torch.float64)) * scale


def layer(rows: int, width: int, seed: int = 0, tokens: int = 200) -> tuple[Tensor, Statistics, Tensor]:
    """A weight [out, d] float32, the statistics of its inputs, and those inputs."""
    a = inputs(width, tokens, seed).float().double()
    seen = Statistics(width, gram=True)
    for part in a.split(tokens // 4):
        seen.add(part)
    generator = torch.Generator().manual_seed(seed + 1)
    return torch.randn(rows, width, generator=generator), seen, a


def loss(weight: Tensor, sparse: Tensor, matrix: Tensor) -> Tensor:
    """[out] the mean squared error of each output: e G eᵀ."""
    e = weight.double() - sparse.double()
    return ((e @ matrix.double()) * e).sum(1)
