"""What a budget cache holds, read off its live storage."""

from __future__ import annotations

from typing import Any

from torch import Tensor

import modicum


def measure(cache: modicum.BudgetCache, chunk: int) -> dict[str, Any]:
    """Bytes by kind, slots per layer and head, and the high-water mark in chunks of one layer.

    Raises:
        CacheError: the cache's own checks fail.
        AssertionError: the storage found here is not what the cache says it holds.
    """
    cache.check_integrity()
    layers = cache.layers
    kinds = {"keys and values": 0, "positions": 0, "policy state": 0}
    for layer in layers:
        for bank in layer.banks:
            stored = bank.arena.tensors
            kinds["keys and values"] += _nbytes(stored["keys"], stored["values"])
            kinds["positions"] += _nbytes(stored["positions"])
            kinds["policy state"] += _nbytes(stored["state"], bank.arena.sums, bank.arena.tally)
            if bank.virtual is not None:
                kinds["policy state"] += _nbytes(*bank.virtual.tensors.values())
        if layer.ring is not None:
            kinds["policy state"] += _nbytes(layer.ring.queries, layer.ring.positions)
    total = sum(kinds.values())
    assert total == cache.nbytes, f"{total} bytes found, the cache says {cache.nbytes}"
    shape = cache.shape.layers[0]
    slot = (shape.key_dim + shape.value_dim) * cache.shape.dtype.itemsize
    heads = sum(layer.kv_heads for layer in cache.shape.layers) * cache.batch_size
    held = [int(n) for layer in cache.held for n in layer.flatten()]
    return {
        "bytes": kinds,
        "nbytes": total,
        "budget_nbytes": cache.budget_nbytes,
        "full_nbytes": cache.full_nbytes,
        "slots": kinds["keys and values"] / slot / heads,
        "slots_worth": total / slot / heads,
        "held": {"mean": sum(held) / len(held), "min": min(held), "max": max(held)},
        "chunks_above": (cache.peak_nbytes - total) / (chunk * shape.kv_heads * slot * cache.batch_size),
    }


def _nbytes(*tensors: Tensor) -> int:
    return sum(t.nbytes for t in tensors)  # layers lie side by side in one storage
