"""DSnoT: a mask refined by growing and pruning weights until each output's expected error is small.

Zhang et al., 2023, "Dynamic Sparse No Training" (arXiv 2310.08915), from the paper's formulas.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from modicum.errors import InputError
from modicum.weights.pattern import Blocks, Groups, Pattern
from modicum.weights.scores import wanda
from modicum.weights.statistics import Statistics

_FLOOR = 1e-12  # of the mean variance: an input that is always the same has none


@dataclass(frozen=True)
class DSnoT:
    """How DSnoT moves. With c_ij = W_ij·μ_j and E_i the sum of the removed c_ij, a move grows the removed
    weight with the largest sign(E_i)·c_ip / v_p^var_power and prunes the kept one of the other sign with the
    lowest score; E_i becomes E_i + c_iu - c_ip. A row stops when |E_i| <= threshold.
    """

    cycles: int | float = 0.012
    """Moves of a row at most: a number, or a share of its inputs. The paper's 50 are 1.2 % of 4,096 inputs;
    on narrow layers 50 would replace half a row.
    """
    threshold: float = 0.1 / 2048
    """ε, of the mean error per token (the paper's 0.1 is of the sum over 2,048 tokens)."""
    var_power: float = 1.0
    """γ in [0, 1]: how much a varying input is shunned."""
    variance: Literal["pooled", "within"] = "pooled"
    """Over all tokens, or over each sequence's by themselves, as the released code has it."""
    overshoot: Literal["refuse", "allow"] = "refuse"
    """Whether a move that does not lower |E_i| is taken. The released code does not look."""
    guarded: bool = False
    """Take a move only if the row's mean squared error falls, whatever |E_i| does; needs the Gram matrix."""
    prune_score: Literal["wanda", "start"] = "wanda"
    sign_stop: bool | None = None
    """Whether a row stops before E_i would change its sign; None: in N:M alone, as in the released code."""
    partner_sign: bool = False
    """In N:M, whether the pruned weight must be of the other sign, as it must elsewhere."""

    def __post_init__(self) -> None:
        c = self.cycles
        if isinstance(c, bool) or not isinstance(c, int | float) or not 0 <= c < math.inf:
            raise InputError(f"dsnot: cycles is {c!r}; a whole number of moves, or a share of a row's inputs")
        if isinstance(c, float) and c > 1:
            raise InputError(
                f"dsnot: cycles is {c}, a share above 1 of a row; give {int(c)} for as many moves"
            )
        if not 0 <= self.var_power <= 1:
            raise InputError(f"dsnot: var_power is {self.var_power}; it must be from 0 to 1")
        if not self.threshold >= 0:
            raise InputError(f"dsnot: threshold is {self.threshold}; it must not be negative")

    @classmethod
    def paper(cls) -> DSnoT:
        """As released: 50 moves, overshoot allowed. (It refines attention alone: `where="attention"`.)"""
        return cls(cycles=50, variance="within", overshoot="allow")

    @classmethod
    def guard(cls) -> DSnoT:
        """Moves that lower the squared error, for up to a quarter of a row."""
        return cls(cycles=0.25, overshoot="allow", guarded=True)

    def moves(self, width: int) -> int:
        """Cycles for rows of so many inputs."""
        if isinstance(self.cycles, int):
            return self.cycles
        return max(1, round(self.cycles * width)) if self.cycles else 0


def refine(
    how: DSnoT, weight: Tensor, mask: Tensor, inputs: Statistics, start: Tensor, pattern: Pattern
) -> Tensor:
    """The refined mask [out, d]; every row, and in N:M every group, keeps as many.

    Args:
        weight: [out, d] dense.
        mask: [out, d] bool, True where kept.
        start: [out, d] the scores by which the mask was chosen.

    Raises:
        InputError: the pattern is of blocks.
    """
    if isinstance(pattern, Blocks):
        raise InputError(f'DSnoT moves single weights, the pattern is {pattern}: give refine="swap"')
    return _Rows(how, weight, mask, inputs, start, pattern).run()


class _Rows:
    """All rows of a layer, in lock-step."""

    def __init__(
        self, how: DSnoT, weight: Tensor, mask: Tensor, inputs: Statistics, start: Tensor, pattern: Pattern
    ) -> None:
        self.how, self.pattern = how, pattern
        self.device, d = weight.device, weight.shape[1]
        self.weight = weight.double()
        self.mask = mask.clone()
        mean = inputs.mean.to(self.device)
        self.change = self.weight * mean  # c
        self.error = torch.where(mask, 0.0, self.change).sum(1)  # E
        variance = inputs.variance if how.variance == "pooled" else inputs.variance_within
        variance = variance.clamp_min(_FLOOR * float(variance.mean())).clamp_min(1e-300).to(self.device)
        self.growth = self.change / variance.pow(how.var_power)
        grouped = isinstance(pattern, Groups)
        by_start = grouped or how.prune_score == "start"
        self.score = (start if by_start else wanda(weight, inputs)).double()
        self.stop_at_sign = grouped if how.sign_stop is None else how.sign_stop
        self.sign = self.error.sign()
        self.to_grow, self.to_prune = ~mask, mask.clone()
        self.active = torch.ones(len(mask), dtype=torch.bool, device=self.device)
        self.matrix = inputs.matrix.to(self.device, torch.float64) if how.guarded else None
        gone = torch.where(mask, 0.0, self.weight)
        self.gradient = None if self.matrix is None else gone @ self.matrix  # g = eG
        self.rows = torch.arange(len(mask), device=self.device)
        self.column = torch.arange(d, device=self.device)

    def run(self) -> Tensor:
        for _ in range(self.how.moves(self.mask.shape[1])):
            if not bool(self.active.any()):
                break
            self._cycle()
        return self.mask

    def _cycle(self) -> None:
        sign = self.error.sign()[:, None]
        growable = self.to_grow & (self.change.sign() == sign) & (sign != 0)
        self.active &= growable.any(1) & (self.error.abs() > self.how.threshold)
        grown = torch.where(growable, sign * self.growth, -math.inf).argmax(1)  # p
        pruned, there = self._partner(grown, sign)
        if not isinstance(self.pattern, Groups):
            self.active &= there
        c_grown, c_pruned = self.change[self.rows, grown], self.change[self.rows, pruned]
        after = self.error + c_pruned - c_grown
        if self.stop_at_sign:
            self.active &= ~there | (after.sign() == self.sign)
        good = there & self._allowed(grown, pruned, after)
        # A pair that is refused uses up the cycle, and its grown weight is not tried again.
        tried = self.rows[self.active]
        self.to_grow[tried, grown[tried]] = False
        moved = self.rows[self.active & good]
        p, u = grown[moved], pruned[moved]
        self.mask[moved, p], self.mask[moved, u] = True, False
        self.to_prune[moved, u] = False
        self.error[moved] = after[moved]
        if self.gradient is not None and self.matrix is not None:
            back, gone = self.weight[moved, p, None], self.weight[moved, u, None]
            self.gradient[moved] += gone * self.matrix[u] - back * self.matrix[p]

    def _partner(self, grown: Tensor, sign: Tensor) -> tuple[Tensor, Tensor]:
        """The weight to prune for each grown one, and whether there is any."""
        other = self.change.sign() == -sign
        if isinstance(self.pattern, Groups):
            size = self.pattern.of
            prunable = self.to_prune & (self.column // size == (grown // size)[:, None])
            if self.how.partner_sign:
                prunable &= other
        else:
            prunable = self.to_prune & other
        return torch.where(prunable, self.score, math.inf).argmin(1), prunable.any(1)

    def _allowed(self, grown: Tensor, pruned: Tensor, after: Tensor) -> Tensor:
        if self.gradient is not None and self.matrix is not None:
            w, x = self.weight[self.rows, grown], self.weight[self.rows, pruned]
            g, h = self.gradient[self.rows, grown], self.gradient[self.rows, pruned]
            m = self.matrix
            change = -2 * w * g + w * w * m[grown, grown] + 2 * x * h + x * x * m[pruned, pruned]
            return change - 2 * w * x * m[grown, pruned] < 0
        if self.how.overshoot == "allow":
            return torch.ones_like(after, dtype=torch.bool)
        return after.abs() < self.error.abs()
