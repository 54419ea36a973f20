"""Random layers as calibration sees them: inputs correlated, unevenly scaled, with means; error bounds."""

from __future__ import annotations

import torch
from torch import Tensor

from modicum.weights.statistics import Statistics
from tests.bounds import quadratic_bound, solve_bound


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


def loss_bound(weight: Tensor, sparse: Tensor, matrix: Tensor) -> Tensor:
    """[out] how far `loss` may be from the exact loss: `loss` is computed in float64."""
    return quadratic_bound(weight.double() - sparse.double(), matrix, torch.float64)


def assert_no_worse(
    weight: Tensor, sparse: Tensor, other: Tensor, matrix: Tensor, moved: float | Tensor = 0.0
) -> None:
    """Each output's loss under `sparse` is at most that under `other`, but for rounding.

    moved: the bound of an error in `sparse` itself [out] or for all, as of a solution of equations.
    """
    slack = loss_bound(weight, sparse, matrix) + loss_bound(weight, other, matrix) + moved
    assert bool((loss(weight, sparse, matrix) <= loss(weight, other, matrix) + slack).all())


def solved_bound(weight: Tensor, matrix: Tensor) -> Tensor:
    """[out, 1] the error of a row of weights solved for in float64 with `matrix`.

    Three times the bound of one solution: the inverse, its factor, and the elimination with it (SparseGPT),
    of which a fixed-support solution needs one alone. The size of a solution in the matrix' own norm is at
    most the weight's, so in the 2-norm it is at most √κ times as large.
    """
    condition = float(torch.linalg.cond(matrix))
    share = 3 * solve_bound(matrix.shape[0], torch.float64, condition)
    return share * condition**0.5 * weight.double().norm(dim=1, keepdim=True)
