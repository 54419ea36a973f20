"""ALiBi: how far back a head with a linear bias looks at all (RazorAttention, arXiv 2407.15891)."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from modicum.errors import InputError


def alibi_reach(
    w_q: Tensor,
    w_k: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor | None,
    slope: float,
    eps: float = 1e-3,
) -> float:
    """L_h = [2 ‖W_Q W_K‖₂ (‖γ‖² + ‖b‖²) - ln ε] / l: how far back a head's weights exceed about ε.

    w_q, w_k: [head dimension, hidden], the head's rows of the projections; norm_weight γ and norm_bias b
    (None: 0, as in RMSNorm) [hidden] of the norm before them; slope l > 0. The paper's form, a heuristic: it
    takes inputs of the norm as unit vectors, leaves 1/√d out, and a strict bound would double its first term.
    """
    _check(slope, eps)
    # ‖W_Qᵀ W_K‖₂ of a hidden × hidden product, from the small triangular factors.
    r_q = torch.linalg.qr(w_q.double().T, mode="r").R
    r_k = torch.linalg.qr(w_k.double().T, mode="r").R
    spectral = float(torch.linalg.matrix_norm(r_q @ r_k.T, 2))
    bias = 0.0 if norm_bias is None else float(norm_bias.double().square().sum())
    power = float(norm_weight.double().square().sum()) + bias
    return (2 * spectral * power - math.log(eps)) / slope


def alibi_reach_empirical(max_qk: float, slope: float, eps: float = 1e-3) -> float:
    """(2 max |q·k| - ln ε) / l: the same from the largest |logit before the bias| seen on data.

    A true bound where no logit exceeds max_qk: a weight is at most exp(q·k_n - q·k_m - l (m - n)), m the
    query's own token.
    """
    _check(slope, eps)
    if not max_qk >= 0:
        raise InputError(f"max_qk is {max_qk}; it is the largest |q·k|, so at least 0")
    return (2 * max_qk - math.log(eps)) / slope


def _check(slope: float, eps: float) -> None:
    if not slope > 0:
        raise InputError(f"the slope is {slope}; ALiBi's slopes are greater than 0")
    if not 0 < eps < 1:
        raise InputError(f"eps is {eps}; it is a share of attention, between 0 and 1")
