"""Entry: `modicum.prune`, and a budget in bytes turned into a sparsity."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import PreTrainedModel

from modicum.errors import InputError
from modicum.kv.budget import format_size, parse_size
from modicum.weights import calibration as calibrate
from modicum.weights import packed
from modicum.weights.blocks import blocks_of
from modicum.weights.dsnot import DSnoT
from modicum.weights.layers import MOST
from modicum.weights.pattern import Rows
from modicum.weights.plain_model import plain_model
from modicum.weights.plan import plan
from modicum.weights.progress import Progress
from modicum.weights.prune import PruneReport
from modicum.weights.prune import prune as run
from modicum.weights.state import State
from modicum.weights.swap import Swap

_SLACK = 1024  # bytes: a header's numbers may have a digit more


def prune(
    model: PreTrainedModel,
    calibration: Tensor | str | Sequence[str],
    *,
    tokenizer: Any = None,
    method: str = "wanda",
    refine: str | DSnoT | Swap | None = "dsnot",
    sparsity: float | None = None,
    pattern: str | None = None,
    budget: str | int | None = None,
    layers: str = "uniform",
    update: str | None = None,
    where: Literal["all", "attention"] = "all",
    bias_correct: bool = False,
    scope: Literal["row", "layer"] = "row",
    sequences: int = calibrate.SEQUENCES,
    length: int | None = None,
    seed: int = 0,
    resume: str | Path | None = None,
    progress: Progress | None = None,
) -> PruneReport:
    """Prunes a model's linear layers in place, without training: a score, a mask, and the mask refined.

    Args:
        model: a decoder of transformers whose blocks hold plain linear layers (or experts).
        calibration: token ids [n, T] without pads, or text, which needs the tokenizer.
        method: how weights are scored: "magnitude", "wanda", "ria" or "sparsegpt"; or "alps", which finds
            mask and weights together (refine=None leaves them as it finds them).
        refine: how the mask is improved: "dsnot", "dsnot-guarded", "dsnot-paper", "swap" or None; or a
            `DSnoT` or `Swap` with settings of your own.
        sparsity: the share of each row that goes, above 0 and below 1.
        pattern: "2:4" keeps 2 of each 4 inputs; "16x4" removes blocks, and needs a sparsity.
        budget: in place of a sparsity, a size such as "120MiB" that the packed file must not pass.
        layers: how decoder blocks share it: "uniform", "owl" or "atp".
        update: whether kept weights are moved to make up for what went: "none", "obs" (SparseGPT's sweep) or
            "lsq" (least squares on the mask). By default "obs" with method "sparsegpt", "lsq" with "alps",
            else "none".
        where: which layers are refined: "all", or "attention" only.
        bias_correct: let biases take over the expected error.
        scope: "row" takes the sparsity from each row, "layer" from each layer as a whole, as some tools do.
        sequences, length, seed: which windows of the text are looked at; 128 of 2,048 tokens, or of the
            model's context if that is shorter.
        resume: a folder in which each block's outcome is kept; a run that was stopped goes on from there.
        progress: called with what is done, how many blocks are done, and of how many.

    Returns:
        What was done, layer by layer, with the masks: `modicum.weights.save` writes the model to a folder.

    Raises:
        InputError: a setting or the calibration cannot be used; the message says which, and the layer's name.
        ModelError: the model cannot be pruned.
    """
    model = plain_model(model)
    if sum(x is not None for x in (sparsity, budget)) > 1:
        raise InputError("give a sparsity or a budget in bytes, not both")
    if isinstance(calibration, Tensor):
        ids = calibration
        if ids.dim() != 2 or not len(ids) or ids.is_floating_point():
            raise InputError(
                f"calibration is {tuple(ids.shape)} {ids.dtype}; token ids are whole numbers [n, T]"
            )
    else:
        if tokenizer is None:
            raise InputError("calibration is text: give the tokenizer as well, tokenizer=...")
        ids = calibrate.tokens(calibration, tokenizer, sequences, length or calibrate.length_for(model), seed)
    if budget is not None:
        sparsity = sparsity_for(model, budget)
        if layers != "uniform" or pattern is not None or scope != "row":
            raise InputError("a budget in bytes goes with layers='uniform', scope='row' and no pattern")
    how = plan(method, refine, sparsity, pattern, update, layers, where, bias_correct, scope)
    state = None
    if resume is not None:
        about = {"plan": repr(how), "ids": hash(tuple(ids.flatten().tolist())), "model": _told(model)}
        state = State(Path(resume), about)
    return run(model, ids, how, state=state, progress=progress)


def sparsity_for(model: PreTrainedModel, budget: str | int) -> float:
    """The least sparsity at which the packed file is within the budget, by bisection.

    Raises:
        InputError: it does not fit even where 98 % go.
    """
    most = parse_size(budget) if isinstance(budget, str) else budget
    if packed_bytes(model, MOST) > most:
        raise InputError(
            f"the budget of {format_size(most)} is below {format_size(packed_bytes(model, MOST))}, what the "
            f"model takes with {MOST:.0%} of its linear layers gone: give more, or a smaller model"
        )
    low, high = 1e-4, MOST
    for _ in range(40):
        middle = (low + high) / 2
        if packed_bytes(model, middle) > most:
            low = middle
        else:
            high = middle
    return high


def packed_bytes(model: PreTrainedModel, sparsity: float) -> int:
    """Bytes of the packed file at a sparsity; the header's length is bounded."""
    pattern = Rows(sparsity)
    kept: dict[str, int] = {}
    for block in blocks_of(model):
        for matrix in block.matrices:
            name = matrix.name.partition("[")[0]
            rows, width = matrix.weight.shape
            kept[name] = kept.get(name, 0) + rows * (width - pattern.removed(width))
    entries: dict[str, tuple[tuple[int, ...], str, int]] = {}
    told = 0
    for name, value in packed.untied(model):
        if name in kept:
            shape = (*value.shape[:-1], -(-value.shape[-1] // 8))
            entries[f"{name}.mask"] = shape, "U8", torch.Size(shape).numel()
            entries[f"{name}.values"] = (kept[name],), "BF16", kept[name] * packed.narrow(value).itemsize
            told += len(name) + 40
        else:
            entries[name] = tuple(value.shape), "BF16", value.numel() * packed.narrow(value).itemsize
        told += len(name) + 20
    return sum(size for *_, size in entries.values()) + packed.header_bytes(entries, "") + told + _SLACK


def _told(model: PreTrainedModel) -> str:
    """What tells a model from another: its configuration, and the sum of its first block's weights."""
    first = blocks_of(model)[0].matrices[0].weight
    return f"{model.config.to_json_string()} {float(first.double().sum())}"
