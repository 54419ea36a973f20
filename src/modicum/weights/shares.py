"""Shares: what each decoder block of a model loses, by looking at it."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import PreTrainedModel

from modicum.errors import InputError
from modicum.weights import layers
from modicum.weights.blocks import Block, Passes
from modicum.weights.perplexity import perplexity
from modicum.weights.plan import Plan
from modicum.weights.progress import Progress
from modicum.weights.scores import wanda
from modicum.weights.walk import gather, walk

OUTLIER = 5.0
"""m of OWL: a score is an outlier above so many times the mean."""


def shares_of(
    model: PreTrainedModel, blocks: list[Block], ids: Tensor, how: Plan, tell: Progress
) -> list[float]:
    """What each block loses."""
    sparsity = how.pattern.sparsity
    if how.layers == "uniform":
        return [sparsity] * len(blocks)
    sizes = [sum(m.weight.numel() for m in block.matrices) for block in blocks]
    if how.layers == "owl":
        passes, outliers = Passes(model, blocks, ids), []
        for number, block in enumerate(blocks):
            tell("looking at blocks", number, len(blocks))
            gathered = gather(passes, number, block, Plan(how.pattern))
            scores = [wanda(m.weight, gathered[m.name]).flatten() for m in block.matrices]
            every = torch.cat(scores)
            outliers.append(float((every > OUTLIER * every.mean()).double().mean()))
            passes.hidden = passes.through(number)
        return layers.spread(layers.owl(outliers, sparsity), sizes, sparsity)
    return _by_perplexity(model, blocks, ids, how, sizes, tell)


def _by_perplexity(
    model: PreTrainedModel,
    blocks: list[Block],
    ids: Tensor,
    how: Plan,
    sizes: list[int],
    tell: Progress,
) -> list[float]:
    """ATP: the slope whose model reads best a slice of the calibration text that it was not pruned on."""
    if len(ids) < 4:
        raise InputError(
            f"layers='atp' tunes on one calibration sequence in 4, and there are {len(ids)}: give at least "
            'sequences=4, or layers="uniform"'
        )
    sparsity = how.pattern.sparsity
    held, rest = ids[: len(ids) // 4], ids[len(ids) // 4 :]
    dense = {m.name: m.weight.clone() for block in blocks for m in block.matrices}
    bias = {m.name: m.bias.data.clone() for block in blocks for m in block.matrices if m.bias is not None}
    best: tuple[float, list[float]] | None = None
    tries = layers.slopes(len(blocks), sparsity)
    for number, slope in enumerate(tries):
        tell("trying slopes", number, len(tries))
        shares = layers.spread(layers.atp(len(blocks), sparsity, slope), sizes, sparsity)
        try:
            for _ in walk(model, blocks, rest, how, shares):
                pass
            found = perplexity(model, held)
        finally:
            for block in blocks:
                for m in block.matrices:
                    m.weight.copy_(dense[m.name])
                    if m.bias is not None:
                        m.bias.data.copy_(bias[m.name])
        if best is None or found < best[0]:
            best = found, shares
    assert best is not None
    return best[1]
