"""Pruning: masks of weights by magnitude, and a schedule under which they become sparse.

The schedule is that of Zhu and Gupta 2017 (arXiv 1710.01878, equation 1) from a sparsity of 0, with final
sparsity s_f, first step t0 and duration D:

    s_t = s_f · (1 - (1 - (t - t0) / D)^3)

Masks only grow: what was pruned stays 0, also what was pruned before a model was given.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from modicum.errors import InputError

Scope = Literal["tensor", "global"]
"""The same share of each matrix is pruned; or the lowest scores of all matrices together."""

LEAST_INPUTS = 32
"""Matrices with fewer inputs for each output, such as depthwise taps, stay dense: they are small."""


@dataclass(frozen=True)
class PruningSettings:
    """How weights become sparse.

    Attributes:
        sparsity: s_f, the share of a matrix that is 0 in the end; 0 for none.
        block: weights that are pruned together: 1, or 4 in a row, whose inputs are neighbours.
        scope: see `Scope`.
        start, end: shares of the steps between which the sparsity rises.
        every: steps between two masks.

    Raises:
        InputError: a value is out of range.
    """

    sparsity: float = 0.0
    block: int = 1
    scope: Scope = "tensor"
    start: float = 0.0
    end: float = 0.5
    every: int = 10

    def __post_init__(self) -> None:
        if not 0 <= self.sparsity < 1:
            raise InputError(f"the sparsity is {self.sparsity}: give a share from 0 to below 1")
        if self.block not in (1, 4):
            raise InputError(f"blocks have {self.block} weights: give 1 or 4")
        if self.scope not in get_args(Scope):
            raise InputError(f"the scope is {self.scope!r}: choose one of {', '.join(get_args(Scope))}")
        if not 0 <= self.start <= self.end <= 1:
            raise InputError(
                f"weights are pruned from {self.start} to {self.end} of the steps: give the lower share first"
            )
        if self.every < 1:
            raise InputError(f"masks are made every {self.every} steps: give 1 or more")

    def sparsity_at(self, step: int, num_steps: int) -> float:
        """s_t at a step of so many."""
        first, last = self.start * num_steps, self.end * num_steps
        if step < first:
            return 0.0
        if step >= last:
            return self.sparsity
        return float(self.sparsity * (1 - (1 - (step - first) / (last - first)) ** 3))

    def prunes_at(self, step: int, num_steps: int) -> bool:
        """Whether weights are pruned before a step: every so many, and where the sparsity is reached. Not
        where the schedule begins, as its sparsity is 0 there."""
        first, last = round(self.start * num_steps), round(self.end * num_steps)
        is_due = first <= step <= last and ((step - first) % self.every == 0 or step == last)
        return is_due and self.sparsity_at(step, num_steps) > 0


def is_prunable(weight: Tensor) -> bool:
    """Whether a parameter is a matrix with so many inputs that its zeros are worth a mask."""
    return weight.dim() >= 2 and weight[0].numel() >= LEAST_INPUTS


def num_kept(num: int, sparsity: float) -> int:
    """Of so many weights or blocks, at least 1."""
    return max(1, num - round(sparsity * num))


def num_blocks(shape: tuple[int, ...] | torch.Size, block: int) -> int:
    """Blocks of a matrix: those of a row, the last of which may be shorter, times its rows."""
    inputs = int(torch.Size(shape[1:]).numel())
    return int(shape[0]) * -(-inputs // block)


def values_nbytes(num: int, bits: int) -> int:
    """Bytes of so many stored weights."""
    return -(-num * bits // 8)


def mask_nbytes(blocks: int) -> int:
    """Bytes of the mask of so many blocks."""
    return -(-blocks // 8)


def is_mask_worthwhile(num: int, stored: int, blocks: int, bits: int) -> bool:
    """Whether a matrix of num weights, of which so many are stored, takes fewer bytes with a mask.

    A mask that saves nothing is not stored: zeros are then weights like others. So the zeros to which few
    bits round small weights are not taken for pruning.
    """
    return values_nbytes(stored, bits) + mask_nbytes(blocks) < values_nbytes(num, bits)


def block_scores(weight: Tensor, block: int, num_uses: int = 1) -> Tensor:
    """[outputs, blocks]: Σ|w| of each block, added up over the uses of the matrix."""
    return num_uses * _blocks(weight.detach().abs(), block).sum(-1)


def expand_blocks(is_kept: Tensor, shape: torch.Size, block: int) -> Tensor:
    """The mask of weights of a mask of blocks [outputs, blocks]."""
    inputs = shape[1:].numel()
    return is_kept.repeat_interleave(block, 1)[:, :inputs].reshape(shape)


def kept_blocks(weight: Tensor, block: int) -> Tensor:
    """[outputs, blocks] bool: those that hold a weight other than 0."""
    return (_blocks(weight.detach(), block) != 0).any(-1)


def stored_mask(weight: Tensor, bits: int, block: int) -> Tensor | None:
    """`kept_blocks` of a matrix whose zeros are worth a mask in a file; None for one that is stored whole."""
    if not is_prunable(weight):
        return None
    kept = kept_blocks(weight, block)
    stored = int(expand_blocks(kept, weight.shape, block).sum())
    return kept if is_mask_worthwhile(weight.numel(), stored, kept.numel(), bits) else None


def make_masks(model: nn.Module, sparsity: float, settings: PruningSettings) -> dict[str, Tensor]:
    """The mask, of its shape, of each prunable parameter of a model.

    A block is ranked by Σ|w|, times the number of layers that use its matrix where the scope is "global".
    Blocks that are 0 already have the lowest score. Equal scores are pruned from the front.
    """
    weights = {name: one for name, one in model.named_parameters() if is_prunable(one)}
    uses = parameter_uses(model)
    scores = {name: block_scores(one, settings.block, uses[name]) for name, one in weights.items()}
    if settings.scope == "global" and scores:
        joint = torch.cat([one.flatten() for one in scores.values()])
        chosen = _highest(joint, num_kept(len(joint), sparsity))
        parts = torch.split(chosen, [one.numel() for one in scores.values()])
        kept = {name: part.view_as(scores[name]) for name, part in zip(scores, parts, strict=True)}
    else:
        kept = {
            name: _highest(one.flatten(), num_kept(one.numel(), sparsity)).view_as(one)
            for name, one in scores.items()
        }
    return {name: expand_blocks(kept[name], one.shape, settings.block) for name, one in weights.items()}


def apply_masks(model: nn.Module, masks: Mapping[str, Tensor]) -> None:
    """Set pruned weights to 0."""
    with torch.no_grad():
        for name, mask in masks.items():
            model.get_parameter(name).mul_(mask)


def parameter_uses(model: nn.Module) -> dict[str, int]:
    """How many layers use each parameter: more than 1 in a model that shares them."""
    count = getattr(model, "num_uses", lambda name: 1)
    return {name: int(count(name)) for name, _ in model.named_parameters()}


def _blocks(weight: Tensor, block: int) -> Tensor:
    """[outputs, blocks, block], padded with 0."""
    rows = weight.flatten(1)
    rows = F.pad(rows, (0, -rows.shape[1] % block))
    return rows.view(rows.shape[0], -1, block)


def _highest(scores: Tensor, num: int) -> Tensor:
    """[n] bool: True for so many of the highest; of equal ones the last."""
    chosen = torch.zeros_like(scores, dtype=torch.bool)
    chosen[scores.argsort(stable=True)[len(scores) - num :]] = True
    return chosen
