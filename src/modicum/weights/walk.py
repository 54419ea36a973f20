"""Walk: decoder block by decoder block, each pruned on what those before it now give."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch
from torch import Tensor
from transformers import PreTrainedModel

from modicum.weights import dsnot, packed, swap
from modicum.weights.alps import alps
from modicum.weights.blocks import Block, Inputs, Matrix, Passes
from modicum.weights.dsnot import DSnoT
from modicum.weights.layer import Layer
from modicum.weights.pattern import Blocks, Pattern
from modicum.weights.plan import Plan
from modicum.weights.scores import SQUARED, score
from modicum.weights.solve import least_squares, sweep
from modicum.weights.state import State
from modicum.weights.statistics import WIDE, Statistics
from modicum.weights.swap import Swap


def walk(
    model: PreTrainedModel,
    blocks: list[Block],
    ids: Tensor,
    how: Plan,
    shares: Sequence[float],
    state: State | None = None,
) -> Iterator[list[tuple[Layer, Tensor]]]:
    """Prune block after block in place; yields what was done to each, with the masks. What goes into a block
    comes from those before it as they are by then.
    """
    passes = Passes(model, blocks, ids)
    for number, block in enumerate(blocks):
        if number:
            passes.hidden = passes.through(number - 1)
        done = None if state is None else state.load(number, block.matrices)
        if done is None:
            gathered = gather(passes, number, block, how)
            pattern = how.at(shares[number])
            done = [prune_matrix(m, gathered[m.name], how, pattern, number) for m in block.matrices]
            if state is not None:
                state.save(number, block.matrices, done)
        yield done


def gather(passes: Passes, number: int, block: Block, how: Plan) -> dict[str, Statistics]:
    """Statistics of the inputs of each matrix of a block; those with one input share a set."""
    found: dict[str, Statistics] = {}
    leaders: dict[str, str] = {}

    def heard(matrix: Matrix, inputs: Tensor, again: str | None) -> None:
        leader = leaders.setdefault(matrix.name, again or matrix.name)
        if leader != matrix.name:
            return
        width = matrix.weight.shape[1]
        if matrix.name not in found:
            found[matrix.name] = Statistics(width, how.needs_gram or width <= WIDE, matrix.name)
        found[matrix.name].add(inputs)

    passes.through(number, Inputs(block.matrices, heard))
    out = {}
    for matrix in block.matrices:
        none = Statistics(matrix.weight.shape[1], True, matrix.name)
        out[matrix.name] = found.get(leaders.get(matrix.name, matrix.name), none)
    return out


def prune_matrix(
    matrix: Matrix, inputs: Statistics, how: Plan, pattern: Pattern, block: int
) -> tuple[Layer, Tensor]:
    """Prune one weight in place: its row of the report, and its mask."""
    started = time.perf_counter()
    weight = matrix.weight
    known = inputs.tokens > 0
    refine = how.refine if known and (how.where == "all" or matrix.of_attention) else None
    found = _at_once(weight, inputs, how, pattern) if known and refine is None else None
    moved: Tensor | None = None
    if found is None:
        start = score(how.method, weight, inputs)
        if isinstance(pattern, Blocks) and how.method in SQUARED:
            start = start.square()
        first = alps(weight, inputs, pattern)[1] if how.method == "alps" and known else pattern.select(start)
        mask, capped = _refine(weight, first, inputs, start, how, pattern, refine)
    else:
        moved, first = found
        mask, capped = first, 0
    if how.update == "none" or not known:
        moved = torch.where(mask, weight.double(), 0.0)
    elif moved is None:
        obs = how.update == "obs"
        moved = sweep(weight, inputs, pattern, mask)[0] if obs else least_squares(weight, inputs, mask)
    # What came in 16 bits, though held in 32, stays so: the file is to be smaller than the model's own.
    moved = moved.to(packed.narrow(weight)).double()
    before, refined, after = (
        relative_error(weight, sparse, inputs)
        for sparse in (torch.where(first, weight, 0.0), torch.where(mask, weight, 0.0), moved)
    )
    if how.bias_correct and matrix.bias is not None and known:
        lost = (weight.double() - moved.to(weight.device)) @ inputs.mean.to(weight.device)
        matrix.bias.data += lost.to(matrix.bias.dtype)
    weight.copy_(torch.where(mask, moved.to(weight.device), 0.0))
    row = Layer(
        name=matrix.name,
        block=block,
        rows=weight.shape[0],
        width=weight.shape[1],
        kept=int(mask.sum()),
        sparsity=1 - float(mask.float().mean()),
        tokens=inputs.tokens,
        error_before=before,
        error_refined=refined,
        error_after=after,
        changed=int((mask & ~first).sum()),
        capped=capped,
        seconds=time.perf_counter() - started,
    )
    return row, mask


def _at_once(
    weight: Tensor, inputs: Statistics, how: Plan, pattern: Pattern
) -> tuple[Tensor | None, Tensor] | None:
    """Weights and mask of a method that finds them together, the weights only where they are its update's;
    None where the mask is chosen by a score.
    """
    if how.method == "alps":
        moved, mask = alps(weight, inputs, pattern)
        return moved if how.update == "lsq" else None, mask
    if how.method == "sparsegpt" and how.update != "none" and not isinstance(pattern, Blocks):
        moved, mask = sweep(weight, inputs, pattern)
        return moved if how.update == "obs" else None, mask
    return None


def _refine(
    weight: Tensor,
    mask: Tensor,
    inputs: Statistics,
    start: Tensor,
    how: Plan,
    pattern: Pattern,
    refine: DSnoT | Swap | None,
) -> tuple[Tensor, int]:
    """The better mask, and the number of rows at which it might have gone on. start: the mask's scores."""
    if isinstance(refine, DSnoT):
        return dsnot.refine(refine, weight, mask, inputs, start, pattern), 0
    if isinstance(refine, Swap):
        found = swap.refine(replace(refine, centred=how.bias_correct), weight, mask, inputs, pattern)
        return found.mask, found.capped
    return mask, 0


def relative_error(weight: Tensor, sparse: Tensor, inputs: Statistics) -> float | None:
    """Σ e G eᵀ / Σ W G Wᵀ; None where the Gram matrix was not gathered or no token came by."""
    if inputs.tokens == 0 or not inputs.gram:
        return None
    matrix = inputs.matrix.to(weight.device, torch.float64)
    w, e = weight.double(), weight.double() - sparse.to(weight.device, torch.float64)
    whole = float(((w @ matrix) * w).sum())
    return float(((e @ matrix) * e).sum()) / whole if whole > 0 else 0.0
