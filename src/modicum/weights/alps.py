"""ALPS: mask and weights found together, by ADMM on the layer's error, from the dense weights.

Meng et al., 2024, "ALPS: Improved Optimization for Highly Sparse One-Shot Pruning for Large Language Models"
(arXiv 2406.07831). X makes the error small, Z is of the pattern, and a growing ρ brings the two together.
"""

from __future__ import annotations

import torch
from torch import Tensor

from modicum.weights.pattern import Blocks, Pattern
from modicum.weights.solve import DAMPING, damped, on_support
from modicum.weights.statistics import Statistics

STEPS = 300
_RHO, _MOST_RHO = 0.1, 1e6
_LOOK = 3
"""Steps after which ρ is looked at."""
_SETTLED, _EARLIEST = 3e-4, 31


def alps(
    weight: Tensor, inputs: Statistics, pattern: Pattern, steps: int = STEPS, damping: float = DAMPING
) -> tuple[Tensor, Tensor]:
    """The weights [out, d] float64, zero where removed, and the mask.

    With H = G + damping · mean(diag G) · I scaled to a unit diagonal, X = (H + ρI)⁻¹(HW - V + ρZ), Z is the
    pattern's best part of X + V/ρ, and V sums up ρ(X - Z). How much of Z's support changed in three steps
    says how fast ρ grows. On the last support the weights are solved for. Never worse than the start, which
    is Wanda's mask by H, solved for.

    Args:
        weight: [out, d].
        steps: at most.
    """
    matrix = damped(inputs, damping).to(weight.device)
    scale = matrix.diagonal().sqrt()
    unit = matrix / torch.outer(scale, scale)
    w = weight.double()
    mask = _mask(_Split(unit, w * scale, pattern), steps)
    start = pattern.select(_by_size(w * scale, pattern))
    best, best_mask, least = None, mask, 0.0
    for each in (start, mask):
        found = on_support(matrix, w, each)
        lost = w - found
        error = float(((lost @ matrix) * lost).sum())
        if best is None or error < least:
            best, best_mask, least = found, each, error
    assert best is not None
    return best, best_mask


class _Split:
    """X, Z and V of a layer whose inputs have unit power."""

    def __init__(self, unit: Tensor, dense: Tensor, pattern: Pattern) -> None:
        self.pattern, self.dense = pattern, dense
        self.values, self.vectors = torch.linalg.eigh(unit)
        self.goal = dense @ unit
        self.begin()

    def begin(self) -> None:
        """From the dense weights."""
        self.kept = self.pattern.select(_by_size(self.dense, self.pattern))
        self.z = torch.where(self.kept, self.dense, 0.0)
        self.v = torch.zeros_like(self.dense)

    def step(self, rho: float) -> None:
        asked = self.goal - self.v + rho * self.z
        x = ((asked @ self.vectors) / (self.values + rho)) @ self.vectors.T
        near = x + self.v / rho
        self.kept = self.pattern.select(_by_size(near, self.pattern))
        self.z = torch.where(self.kept, near, 0.0)
        self.v += rho * (x - self.z)


def _mask(split: _Split, steps: int) -> Tensor:
    rho, raised = _RHO, False
    before = split.kept
    for number in range(1, steps + 1):
        split.step(rho)
        if number % _LOOK:
            continue
        changed = float((split.kept & ~before).sum()) / max(1, int(before.sum()))
        before = split.kept
        if number >= _EARLIEST and changed < _SETTLED:
            break
        if changed == 0 and raised:
            break
        if changed > 0.1:
            rho, raised = rho * 1.3, True
        elif changed > 0.005:
            rho, raised = rho * 1.2, True
        elif raised:
            rho *= 1.1
        else:  # nothing moves yet: from the start, held together less
            rho /= 5
            if changed > 0:
                split.begin()
                before = split.kept
        rho = min(rho, _MOST_RHO)
    return split.kept


def _by_size(x: Tensor, pattern: Pattern) -> Tensor:
    """Scores whose best are to be kept, fp32 as all scores are; of blocks the sum of squares."""
    return (x.square() if isinstance(pattern, Blocks) else x.abs()).float()
