"""Room: the storage of all layers of a cache, made in one go."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from modicum.kv.arena import Arena
from modicum.kv.bank import Virtual
from modicum.kv.ring import QueryRing
from modicum.kv.stack import Stack

if TYPE_CHECKING:
    from modicum.kv.layer import BudgetLayer


def stacks(
    layers: list[BudgetLayer], rows: int, model: torch.dtype, device: torch.device
) -> dict[tuple[Any, ...], Stack]:
    """Room for all layers at once, by what it is for; none where heads compete, whose arenas change size."""
    first = layers[0]
    policy, shape = first.setting.policy, first.shape
    if first.shared.spread or policy.head_shares() is not None or any(x.shape != shape for x in layers):
        return {}
    dims = shape.key_dim, shape.value_dim
    store = first.store
    columns = store.keys.columns(dims[0]), store.values.columns(shape.stored_value_dim)
    tally = policy.tally_width(shape.group, shape.key_dim)
    extra = policy.state_width(shape.group), policy.sum_width(*dims), tally
    dtype = store.dtype(model)
    number: dict[tuple[int, bool], int] = {}
    for layer in layers:
        for kind in zip(layer.capacities, layer.streaming, strict=True):
            number[kind] = number.get(kind, 0) + rows
    made: dict[tuple[Any, ...], Stack] = {}
    for (capacity, streaming), entries in number.items():
        virtual = streaming and first.compensates
        width = (0, 0, 0) if streaming else extra
        parts = Arena.parts(capacity + 1 - virtual, *columns, *width, dtype, device)
        made["arena", capacity, streaming] = Stack(entries, parts, device)
        if virtual:
            made["virtual", capacity, streaming] = Stack(entries, Virtual.parts(*dims), device)
    if policy.kept_queries > 0:
        parts = QueryRing.parts(shape.group, policy.kept_queries, shape.key_dim, model)
        made["ring", 0, False] = Stack(rows * shape.kv_heads * len(layers), parts, device)
        made["line", 0, False] = Stack(rows * len(layers), QueryRing.line(policy.kept_queries), device)
    return made
