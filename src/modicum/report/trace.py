"""Trace: which positions of a context a policy kept, and how much of the full cache's attention lies on them.

The context is read under the policy, and once more as a whole by attention of our own, which gives what the
model's own gives and reads the weights of a few queries on the way. No n × n map is made, nothing is patched.
"""

from __future__ import annotations

import math
import os
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedModel

from modicum.errors import ModelError
from modicum.evaluation.allowance import Allowance
from modicum.generation.inputs import Block, encode
from modicum.generation.interrupt import Interrupt
from modicum.generation.reader import Reader
from modicum.kv.attention_override import attention_override
from modicum.kv.budget import Budget
from modicum.kv.cache import BudgetCache
from modicum.kv.observed_attention import observed_attention
from modicum.kv.offload import execution_device
from modicum.kv.policy import Policy
from modicum.kv.registry import parse_policy
from modicum.kv.unwrap import unwrap

_LAST = 32  # rows read where there is no question
_TILE_BYTES = 32 * 2**20


@dataclass(frozen=True)
class Trace:
    """What became of one context under one policy and budget."""

    model: str
    policy: str
    budget: str
    """As asked for."""
    tokens: int
    """n, of the context."""
    rows: int
    """Queries whose attention was read."""
    asked: bool
    """Whether they are a question's; else they are the context's last."""
    kept: tuple[NDArray[np.bool_], ...]
    """Per layer [KV heads, n]: whether the position was kept."""
    mass: tuple[NDArray[np.float32], ...]
    """Per layer [query heads]: of the weight that those queries give to the context with the full cache, the
    share on positions that the head's KV head kept. NaN in sliding-window layers, which the budget does not
    rule."""
    task: str = ""
    """Where the context is from, if from an evaluation."""
    sample: int = 0

    @property
    def key(self) -> tuple[str, str, str, str, int]:
        """What tells it from others; of two that share it the newer counts."""
        return self.model, self.policy, self.budget, self.task, self.sample

    @property
    def kept_share(self) -> float:
        """0 to 1, over layers that the budget rules, their KV heads and positions."""
        ruled = [k for k, m in zip(self.kept, self.mass, strict=True) if not np.isnan(m).all()]
        return float(np.mean([layer.mean() for layer in ruled])) if ruled else 1.0

    @property
    def mean_mass(self) -> float:
        """0 to 1, over layers that the budget rules and their query heads."""
        found = np.concatenate([m[~np.isnan(m)] for m in self.mass])
        return float(found.mean()) if found.size else 1.0


def trace(
    model: PreTrainedModel,
    tokenizer: Any,
    context: str,
    *,
    policy: str | Policy,
    budget: int | str | Budget,
    question: str | None = None,
    chunk: int | None = 512,
    n_sink: int = 4,
    recent: int = 32,
    evict_every: int = 1,
    positions: str = "original",
    store: str = "model",
) -> Trace:
    """Read a context under a policy, and see what of the full cache's attention it kept.

    Args:
        budget: tokens per KV head, a size, a share of the context ("25%"), "full", or a `Budget`.
        question: whose tokens' attention to the context counts; it comes after the context was compressed.
            Without one, that of the context's last 32 tokens.
        chunk: tokens taken in at a time; None for all at once.

    Raises:
        InputError: no tokens in the context or the question.
        ModelError: the model's attention does not go through transformers' attention interface.
        BudgetError, PolicyError: as `BudgetCache`.
    """
    model = unwrap(model)
    size = int(model.get_input_embeddings().weight.shape[0])
    ids = encode(tokenizer, [context], "context", special=True, vocabulary=size)[0]
    asked: list[int] = []
    if question is not None:
        asked = encode(tokenizer, [question], "question", special=False, vocabulary=size)[0]
    n = len(ids)
    chosen = parse_policy(policy)
    if not isinstance(budget, Budget):
        settings = {"n_sink": n_sink, "recent": recent, "evict_every": evict_every}
        allowance = Allowance.parse(budget)
        text, made = allowance.text, allowance.budget(chosen, n, n, chunk=chunk or n, **settings)
    else:
        text = str(budget.tokens if budget.tokens is not None else f"{budget.nbytes}B")
        made = budget
    cache = BudgetCache(model, chosen, made, positions=positions, store=store, length=n)
    Reader(model, cache, 1, 0).take(Block.of([ids], 0), Interrupt(), lambda _: None)
    kept = [_mask(cache.positions(i)[0], n) for i in range(len(cache.layers))]
    rows, device = len(asked) or min(_LAST, n), execution_device(model)
    reading = _Reading(n, rows, [k.to(device) for k in kept])
    whole = torch.tensor([ids + asked], device=device)
    attention = partial(_attention, reading=reading)
    with attention_override(model, attention, "traced"), torch.no_grad():
        # The body without its head: no logits over the vocabulary.
        model.base_model(input_ids=whole, use_cache=False)
    ruled = set(cache.shape.full)
    missing = ruled - set(reading.mass)
    if missing:
        raise ModelError(f"{type(model).__name__} showed no attention in layer {min(missing)}")
    heads = [layer.kv_heads * layer.group for layer in cache.shape.layers]
    name = str(getattr(model.config, "_name_or_path", "") or model.config.model_type)
    return Trace(
        model=os.path.basename(name) if os.path.isabs(name) else name,
        policy=str(chosen),
        budget=text,
        tokens=n,
        rows=rows,
        asked=bool(asked),
        kept=tuple(k.numpy() for k in kept),
        mass=tuple(
            reading.mass[i].cpu().numpy().astype(np.float32)
            if i in ruled
            else np.full(heads[i], np.nan, np.float32)
            for i in range(len(heads))
        ),
    )


def _mask(positions: Tensor, n: int) -> Tensor:
    """positions [H, N], -1 for none -> [H, n] bool."""
    # One place more, for the empty slots to fall into.
    mask = torch.zeros(positions.shape[0], n + 1, dtype=torch.bool)
    mask.scatter_(1, torch.where(positions < 0, n, positions.cpu()), True)
    return mask[:, :n]


@dataclass
class _Reading:
    n: int
    rows: int
    """How many of the last queries count."""
    kept: list[Tensor]
    mass: dict[int, Tensor] = field(default_factory=dict)
    """Layer -> [Hq]."""


def _attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *args: Any,
    reading: _Reading,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Causal attention as transformers calls it; query [1, Hq, n, D], key and value [1, H, n, D]."""
    layer = getattr(module, "layer_idx", None)
    if layer is not None and kwargs.get("sliding_window") is None:
        scaling = args[1] if len(args) > 1 else kwargs.get("scaling")
        reading.mass[layer] = _mass(
            query[0],
            key[0],
            reading.kept[layer],
            reading.rows,
            query.shape[-1] ** -0.5 if scaling is None else scaling,
            kwargs.get("softcap"),
        )
    return observed_attention(module, query, key, value, *args, **kwargs)


def _mass(
    query: Tensor, key: Tensor, kept: Tensor, rows: int, scaling: float, softcap: float | None
) -> Tensor:
    """[Hq] shares. query [Hq, m, D], key [H, m, D], kept [H, n] bool, n <= m; of the last `rows` queries."""
    m, h, n = key.shape[1], key.shape[0], kept.shape[1]
    g = query.shape[0] // h
    q = torch.unflatten(query[:, -rows:].float(), 0, (h, g))
    k = key.float().transpose(-1, -2)[:, None]
    at = torch.arange(m, device=key.device)
    sums = q.new_zeros(2, h, g, dtype=torch.float64)
    tile = max(1, _TILE_BYTES // (4 * h * g * m))
    for first in range(0, rows, tile):
        part = q[:, :, first : first + tile]
        z = part @ k * scaling  # [H, G, t, m]
        if softcap is not None:
            z = softcap * torch.tanh(z / softcap)
        here = torch.arange(m - rows + first, m - rows + first + part.shape[2], device=key.device)
        weights = z.masked_fill_(at > here[:, None], -math.inf).softmax(-1)[..., :n].double()
        sums[0] += (weights * kept[:, None, None]).sum((-1, -2))
        sums[1] += weights.sum((-1, -2))
    shares: Tensor = sums[0] / sums[1]
    return shares.flatten()
