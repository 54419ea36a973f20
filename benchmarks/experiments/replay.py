"""Replay: a model's own queries, keys and values, recorded once with the full cache and fed to any policy.

So every policy chooses from identical inputs, layer by layer, and what differs in the output is its choice
alone; in a whole model the error of one layer changes the inputs of the next.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface

from modicum import BudgetCache
from modicum.kv.call import cuts

_NAME = "experiment_recording"


@dataclass
class Recorded:
    """One layer's inputs, [B, Hq, n, D] and [B, H, n, D], and its output with all of them, [B, n, Hq, Dv]."""

    query: Tensor
    key: Tensor
    value: Tensor
    out: Tensor
    scaling: float


@dataclass
class Tape:
    """What a model's layers were given."""

    layers: list[Recorded] = field(default_factory=list)

    def part(self, start: int, stop: int) -> Tape:
        """Tokens start:stop."""
        return Tape(
            [
                Recorded(
                    r.query[:, :, start:stop],
                    r.key[:, :, start:stop],
                    r.value[:, :, start:stop],
                    r.out[:, start:stop],
                    r.scaling,
                )
                for r in self.layers
            ]
        )


@torch.no_grad()
def record(model: Any, ids: Tensor) -> Tape:
    """Run ids [B, n] with nothing evicted."""
    tape = Tape()
    with _attending(model, tape):
        model.base_model(input_ids=ids, use_cache=False)
    return tape


@torch.no_grad()
def feed(model: Any, cache: BudgetCache, tape: Tape) -> list[Tensor]:
    """Each layer's output [B, n, Hq, Dv] where the cache's policy decides what the recorded queries see."""
    outs = []
    for index, (layer, r) in enumerate(zip(model.base_model.layers, tape.layers, strict=True)):
        cache.update(r.key, r.value, index)
        outs.append(cache.layers[index].attend(layer.self_attn, r.query, None, r.scaling, None))
    return outs


def first_loss(length: int, chunk: int, slots: int) -> int:
    """The first position whose query has lost something, where so many tokens are read in chunks."""
    return next(stop for _, stop in cuts(length, chunk) if stop > slots)


def relative(out: Tensor, full: Tensor) -> Tensor:
    """Relative L2 error per row of the batch, [B]: out and full [B, ...]."""
    out, full = out.flatten(1), full.flatten(1)
    return torch.linalg.vector_norm(out - full, dim=1) / torch.linalg.vector_norm(full, dim=1)


@contextmanager
def _attending(model: Any, tape: Tape) -> Iterator[None]:
    def attention(
        module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, scaling: float, **_: Any
    ) -> tuple[Tensor, None]:
        out = F.scaled_dot_product_attention(
            query, key, value, is_causal=True, scale=scaling, enable_gqa=True
        ).transpose(1, 2)
        tape.layers.append(Recorded(query, key, value, out, scaling))
        return out.contiguous(), None

    AttentionInterface.register(_NAME, attention)
    AttentionMaskInterface.register(_NAME, lambda **_: None)
    before = model.config._attn_implementation
    model.set_attn_implementation(_NAME)
    try:
        yield
    finally:
        model.set_attn_implementation(before)
