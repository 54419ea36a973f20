"""Feeding a model call by call through a cache, and looking at what the cache holds afterwards."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedConfig, PreTrainedModel

from modicum import BudgetCache, Policy
from modicum.compat import cache_kwargs
from modicum.kv.arena import Arena
from modicum.kv.layer import BudgetLayer
from modicum.kv.token_regression import TokenRegression
from modicum.kv.turning import Rotary


def full_cache(model: PreTrainedModel) -> DynamicCache:
    """transformers' own cache for the model, sliding windows included."""
    return DynamicCache(config=model.config)


def pad_left(rows: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Rows of unequal length [n] as one batch: ids [B, N] with 0 for pads, mask [B, N] int64."""
    width = max(len(row) for row in rows)
    ids, mask = (
        torch.zeros(len(rows), width, dtype=torch.int64),
        torch.zeros(len(rows), width, dtype=torch.int64),
    )
    for i, row in enumerate(rows):
        if len(row):
            ids[i, width - len(row) :], mask[i, width - len(row) :] = row, 1
    return ids, mask


@torch.no_grad()
def feed(
    model: PreTrainedModel,
    cache: Any,
    ids: Tensor,
    mask: Tensor | None = None,
    cuts: Sequence[int] = (),
    after: Callable[[], None] | None = None,
    start: int = 0,
) -> Tensor:
    """Give the columns from `start` on to the model, a call for each piece between cuts.

    Returns logits [B, N - start, V].

    mask [B, N], 0 for pads, covers all columns that the cache has seen. `after` runs after each call.
    """
    positions = None if mask is None else (mask.cumsum(1) - 1).clamp_min(0)
    edges = sorted({start, ids.shape[1], *(c for c in cuts if start < c < ids.shape[1])})
    logits = []
    for a, b in pairwise(edges):
        more = {} if mask is None else {"attention_mask": mask[:, :b], "position_ids": positions[:, a:b]}
        logits.append(model(ids[:, a:b], **cache_kwargs(model, cache), use_cache=True, **more).logits)
        if after is not None:
            after()
    return torch.cat(logits, dim=1)


def every(length: int, step: int) -> range:
    """Cuts such that each call but the first is of `step` columns, as modicum cuts a long call."""
    return range(length % step or step, length, step)


def budget_layers(cache: BudgetCache) -> list[tuple[int, BudgetLayer]]:
    """The layers under the budget, and their numbers."""
    return [(i, layer) for i, layer in enumerate(cache.layers) if isinstance(layer, BudgetLayer)]


def kept(cache: BudgetCache, layer: int) -> list[list[set[int]]]:
    """[rows][heads]: the positions that a layer holds."""
    table = cache.positions(layer)
    return [[{p for p in head if p >= 0} for head in row] for row in table.tolist()]


def all_kept(cache: BudgetCache) -> list[list[list[set[int]]]]:
    """`kept` of every layer under the budget."""
    return [kept(cache, i) for i, _ in budget_layers(cache)]


def check_limits(cache: BudgetCache) -> None:
    """Every layer and head within its budget, by what is held and by the bytes of every tensor there is."""
    cache.check_integrity()
    for rank, (i, layer) in enumerate(budget_layers(cache)):
        held, capacities = cache.held[i], torch.tensor(cache.plan.capacities[rank])
        if layer.setting.policy.head_shares() is None:
            assert bool((held <= capacities).all()), (i, held, capacities)
        else:
            assert bool((held.sum(1) <= capacities.sum()).all()), (i, held, capacities)
        virtual = held - (cache.positions(i) >= 0).sum(-1)
        assert bool(((virtual == 0) | (virtual == 1)).all())
        assert layer.compensates or not virtual.any()
    if cache.budget.tokens is not None and cache.plan.capacities:
        slots = sum(map(sum, cache.plan.capacities))
        assert slots <= cache.budget.tokens * sum(map(len, cache.plan.capacities))
    live, aside = storages(cache)
    assert live == cache.nbytes
    assert cache.nbytes <= cache.budget_nbytes
    # Which slot a head writes to: six numbers a head, whatever the budget, and a few more for each row.
    arenas = [bank.arena for _, layer in budget_layers(cache) for bank in layer.banks]
    heads = sum(len(arena.live) * arena.keys.shape[1] for arena in arenas)
    assert aside <= 48 * heads + 64 * max(1, cache.batch_size) + 8 * len(cache.layers)
    if cache.budget.nbytes is not None:
        assert live <= cache.budget.nbytes * max(1, cache.batch_size)
    assert cache.peak_nbytes >= cache.nbytes


_ASIDE = (
    "_first",
    "hole",
    "row",
    "base",
    "first",
    "at",
    "clock",
    "columns",
    "next",
    "_sliding_window_tensor",
)


def storages(cache: BudgetCache) -> tuple[int, int]:
    """Bytes of all tensors reachable from the layers, and of those that only say which slot is next."""
    live: dict[int, int] = {}
    aside: dict[int, int] = {}
    for name, tensor in _tensors(cache.layers, "", set()):
        storage = tensor.untyped_storage()
        counts = name in _ASIDE or (name == "live" and tensor.dtype == torch.int64)
        (aside if counts else live)[storage.data_ptr()] = storage.nbytes()
    return sum(live.values()), sum(aside.values())


def _tensors(x: Any, name: str, known: set[int]) -> Iterator[tuple[str, Tensor]]:
    if isinstance(x, Tensor):
        yield name, x
        return
    of_model = PreTrainedConfig | Policy | Rotary | TokenRegression
    if isinstance(x, of_model | str | int | float | type(None)) or id(x) in known:
        return
    known.add(id(x))
    if isinstance(x, dict):
        inside = list(x.items())
    elif isinstance(x, list | tuple | set | frozenset):
        inside = [(name, item) for item in x]
    else:
        slots = [s for cls in type(x).__mro__ for s in getattr(cls, "__slots__", ())]
        inside = [*getattr(x, "__dict__", {}).items(), *((s, getattr(x, s, None)) for s in slots)]
    for key, item in inside:
        yield from _tensors(item, str(key), known)


def arenas(cache: BudgetCache) -> list[Arena]:
    """Every arena of every layer."""
    return [bank.arena for _, layer in budget_layers(cache) for bank in layer.banks]
