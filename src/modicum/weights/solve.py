"""Solve: weights moved so that those that stay make up for those that go."""

from __future__ import annotations

import torch
from torch import Tensor

from modicum.errors import InputError
from modicum.weights.pattern import Groups, Pattern, Rows, Whole
from modicum.weights.statistics import Statistics

DAMPING = 0.01
_TRIES = 4
_WORK = 32 * 2**20  # bytes of scratch at a time
BLOCK = 128
"""Columns that are settled before the rest is told (SparseGPT's own)."""


def damped(inputs: Statistics, damping: float) -> Tensor:
    """[d, d] H = G + damping · mean(diag G) · I, float64; 1 on the diagonal where all inputs are zero."""
    matrix = inputs.damped(damping).double()
    diagonal = matrix.diagonal()
    diagonal[diagonal == 0] = 1.0
    return matrix


def factor(inputs: Statistics, damping: float = DAMPING) -> Tensor:
    """[d, d] U, upper, with UᵀU = H⁻¹, H = G + damping · mean(diag G) · I; float64.

    Raises:
        InputError: H cannot be factored even with a thousand times the damping.
    """
    for attempt in range(_TRIES):
        lower, failed = torch.linalg.cholesky_ex(damped(inputs, damping * 10**attempt))
        if int(failed):
            continue
        upper, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)
        if not int(failed) and bool(upper.isfinite().all()):
            found: Tensor = upper
            return found
    raise InputError(
        f"{inputs.name}: its inputs' Gram matrix cannot be factored: give more calibration text, or "
        'method="wanda" with update="none"'
    )


def sweep(
    weight: Tensor, inputs: Statistics, pattern: Pattern, mask: Tensor | None = None, block: int = BLOCK
) -> tuple[Tensor, Tensor]:
    """SparseGPT: columns from the left, what a removed weight did taken over by those to its right.

    Args:
        weight: [out, d].
        mask: [out, d] bool, True where kept; None to choose it on the way (not for blocks), of each row
            ⌊b·k/d⌋ - ⌊a·k/d⌋ weights in the columns from a to b, so that each row ends at k.
        block: must be a multiple of M where the pattern is N:M.

    Returns the weights [out, d] float64, zero where removed, and the mask.
    """
    upper = factor(inputs)
    w = weight.to(upper.device, torch.float64).clone()
    d = w.shape[1]
    chosen = torch.ones_like(w, dtype=torch.bool) if mask is None else mask.to(w.device)
    for start in range(0, d, block):
        end = min(start + block, d)
        if mask is None and isinstance(pattern, Rows):
            chosen[:, start:end] = _select(w, upper, pattern, start, end)
        residual = torch.zeros(w.shape[0], end - start, dtype=w.dtype, device=w.device)
        for j in range(start, end):
            if mask is None and isinstance(pattern, Groups) and j % pattern.of == 0:
                stop = j + pattern.of
                chosen[:, j:stop] = pattern.select((w[:, j:stop] / upper.diagonal()[j:stop]).square())
            gone = torch.where(chosen[:, j], 0.0, w[:, j] / upper[j, j])
            w[:, j:end] -= gone[:, None] * upper[j, j:end]
            residual[:, j - start] = gone
        w[:, end:] -= residual @ upper[start:end, end:]
    return torch.where(chosen, w, 0.0), chosen


def _select(w: Tensor, upper: Tensor, pattern: Rows, start: int, end: int) -> Tensor:
    """The mask of columns start:end as the weights now are."""
    d = w.shape[1]
    score = (w[:, start:end] / upper.diagonal()[start:end]).square()
    if isinstance(pattern, Whole):
        rows, k = len(w), pattern.removed(w.numel())
        order = score.flatten().argsort(stable=True)[: end * k // d - start * k // d]
        flat = torch.ones(rows * (end - start), dtype=torch.bool, device=w.device)
        return flat.index_fill_(0, order, False).view(score.shape)
    k = pattern.removed(d)
    order = score.argsort(dim=1, stable=True)[:, : end * k // d - start * k // d]
    return torch.ones_like(score, dtype=torch.bool).scatter_(1, order, False)


def least_squares(weight: Tensor, inputs: Statistics, mask: Tensor) -> Tensor:
    """[out, d] float64: the weights on a mask that make the layer's damped error least, row by row:
    W H_{:,S} (H_SS)⁻¹ (a fixed-support solve, as in ALPS: Meng et al., 2024).
    """
    matrix = damped(inputs, DAMPING)
    return on_support(matrix, weight.to(matrix.device, torch.float64), mask.to(matrix.device))


def on_support(matrix: Tensor, weight: Tensor, mask: Tensor) -> Tensor:
    """The weights [out, d] on a mask that make (weight - found) matrix (weight - found)ᵀ least, row by row;
    matrix [d, d] positive definite, all float64.

    A system as large as what a row keeps, not as its inputs: at 60 % removed a sixteenth of the work.
    """
    most = int(mask.sum(1).max()) if len(mask) else 0
    if most == 0:
        return torch.zeros_like(weight)
    # Rows that keep fewer are filled up with an identity whose right side is zero.
    there, columns = mask.to(torch.uint8).topk(most, dim=1)
    goal = weight @ matrix
    out = torch.zeros_like(weight)
    rows = max(1, _WORK // (8 * most * most))
    for start in range(0, len(weight), rows):
        own, used = columns[start : start + rows], there[start : start + rows].bool()
        system = matrix.take((own * matrix.shape[1]).unsqueeze(2) + own.unsqueeze(1))
        both = used.unsqueeze(2) & used.unsqueeze(1)
        system.masked_fill_(~both, 0.0).diagonal(dim1=1, dim2=2).masked_fill_(~used, 1.0)
        right = goal[start : start + rows].gather(1, own).masked_fill_(~used, 0.0)
        found = torch.cholesky_solve(right.unsqueeze(2), torch.linalg.cholesky(system)).squeeze(2)
        out[start : start + rows].scatter_(1, own, found)
    return out
