"""Prune: a model's linear layers to a budget."""

from __future__ import annotations

import resource
import time
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from modicum.float32_products import float32_products
from modicum.weights.blocks import blocks_of, one_by_one
from modicum.weights.layer import Layer
from modicum.weights.plain_model import plain_model
from modicum.weights.plan import Plan
from modicum.weights.progress import Progress
from modicum.weights.shares import shares_of
from modicum.weights.state import State
from modicum.weights.walk import walk


@dataclass
class PruneReport:
    """What was done to a model."""

    method: str
    refine: str | None
    update: str
    pattern: str
    layers: str
    sparsity: float
    """Asked for; the share of prunable weights removed."""
    shares: list[float]
    """Of each block."""
    table: list[Layer] = field(default_factory=list)
    tokens: int = 0
    seconds: float = 0.0
    peak_bytes: int = 0
    """Of the process, as the system counts."""
    masks: dict[str, Tensor] = field(default_factory=dict, repr=False)
    """By the parameters' names, True where kept."""

    @property
    def achieved(self) -> float:
        """The share of prunable weights that is gone."""
        total = sum(x.rows * x.width for x in self.table)
        return 1 - sum(x.kept for x in self.table) / total if total else 0.0

    @property
    def error(self) -> float | None:
        """Mean of the layers' errors."""
        errors = [x.error_after for x in self.table if x.error_after is not None]
        return sum(errors) / len(errors) if errors else None

    def to_dict(self) -> dict[str, Any]:
        """As JSON takes it; masks left out."""
        found = {name: value for name, value in asdict(self).items() if name != "masks"}
        return found | {"achieved": self.achieved, "error": self.error}


def prune(
    model: PreTrainedModel,
    ids: Tensor,
    how: Plan,
    *,
    state: State | None = None,
    progress: Progress | None = None,
) -> PruneReport:
    """Prune the model in place.

    Args:
        ids: [n, T] calibration tokens, no pads.
        state: where each block's outcome is kept, so that a run that was stopped goes on.

    Raises:
        InputError: the pattern does not divide a layer, or its inputs are not finite (by the layer's name).
        ModelError: the model cannot be pruned.
    """
    started = time.perf_counter()
    model = plain_model(model)
    blocks = blocks_of(model)
    training = model.training
    model.train(False)
    tell = progress or (lambda *_: None)
    try:
        # A compiled graph does not call hooks that are added after it was made.
        with (
            torch.no_grad(),
            torch.compiler.set_stance("force_eager"),
            one_by_one(model, blocks),
            float32_products(model.dtype),
        ):
            how.pattern.check(
                {m.name: (m.weight.shape[0], m.weight.shape[1]) for b in blocks for m in b.matrices}
            )
            shares = shares_of(model, blocks, ids, how, tell)
            report = PruneReport(
                method=how.method,
                refine=None if how.refine is None else repr(how.refine),
                update=how.update,
                pattern=str(how.pattern),
                layers=how.layers,
                sparsity=how.pattern.sparsity,
                shares=shares,
                tokens=ids.numel(),
            )
            tell("pruning", 0, len(blocks))
            for number, done in enumerate(walk(model, blocks, ids, how, shares, state)):
                tell("pruning", number + 1, len(blocks))
                for row, mask in done:
                    report.table.append(row)
                    report.masks[row.name] = mask
    finally:
        model.train(training)
    report.masks = by_parameter(report.masks)
    report.seconds = time.perf_counter() - started
    report.peak_bytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return report


def by_parameter(masks: dict[str, Tensor]) -> dict[str, Tensor]:
    """Experts' masks stacked under the name of the parameter that holds them."""
    found: dict[str, Tensor] = {}
    groups: dict[str, list[Tensor]] = {}
    for name, mask in masks.items():
        if name.endswith("]"):
            groups.setdefault(name[: name.rindex("[")], []).append(mask)
        else:
            found[name] = mask
    return found | {name: torch.stack(parts) for name, parts in groups.items()}
