"""Scores: how much each weight of a linear layer matters; the higher, the sooner it is kept."""

from __future__ import annotations

import torch
from torch import Tensor

from modicum.weights.solve import factor
from modicum.weights.statistics import Statistics

SCORES = ("magnitude", "wanda", "ria", "sparsegpt", "alps")
SQUARED = ("magnitude", "wanda", "alps")
"""Whose squares are errors, so that those of a block's weights may be added up."""
RIA_POWER = 0.5


def score(method: str, weight: Tensor, inputs: Statistics) -> Tensor:
    """[out, d] fp32 by one of `SCORES`; magnitude where no token came by, as in an expert never chosen. Of
    ALPS, which chooses by more than a score, that of its start: Wanda's, damped.
    """
    if method == "magnitude" or inputs.tokens == 0:
        return magnitude(weight)
    if method == "wanda":
        return wanda(weight, inputs)
    if method == "ria":
        return ria(weight, inputs)
    if method == "alps":
        return magnitude(weight) * inputs.damped().diagonal().sqrt().to(weight.device, torch.float32)
    return saliency(weight, inputs)


def magnitude(weight: Tensor) -> Tensor:
    """|W_ij|."""
    return weight.float().abs()


def wanda(weight: Tensor, inputs: Statistics) -> Tensor:
    """|W_ij|·√G_jj (Sun et al., 2023, arXiv 2306.11695); its square is what the layer's mean squared error
    would be if that weight alone went.
    """
    return magnitude(weight) * inputs.power.sqrt().to(weight.device, torch.float32)


def ria(weight: Tensor, inputs: Statistics, power: float = RIA_POWER) -> Tensor:
    """(|W_ij| / Σ_i' |W_i'j| + |W_ij| / Σ_j' |W_ij'|)·(√G_jj)^power: relative importance and activation
    (Zhang et al., ICLR 2024). A sum of zero gives zero.
    """
    size = magnitude(weight)
    share = _over(size, size.sum(0, keepdim=True)) + _over(size, size.sum(1, keepdim=True))
    return share * inputs.power.pow(power / 2).to(weight.device, torch.float32)


def saliency(weight: Tensor, inputs: Statistics) -> Tensor:
    """W_ij² / U_jj², U upper with UᵀU = H⁻¹: the error that is left if a weight goes and those to its right
    make up for it (SparseGPT: Frantar and Alistarh, 2023, arXiv 2301.00774). The order of columns matters.
    """
    upper = factor(inputs)
    return (weight.to(upper.device, upper.dtype) / upper.diagonal()).square().to(weight.device, torch.float32)


def _over(a: Tensor, b: Tensor) -> Tensor:
    return torch.where(b > 0, a / b.clamp_min(torch.finfo(b.dtype).tiny), 0.0)
