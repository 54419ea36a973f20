"""Dispatch: the one door to the kernels, Triton's where they serve and their twins in plain torch elsewhere.

`on(device)` says whether a device works with these at all; elsewhere the cache keeps to torch's own
operations, which are quicker there. What a kernel does not take (a head size, a dtype) falls back to its
twin, and is told once. Inside a compiled step each is one opaque operator.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from typing import Any, Literal

import torch
from torch import Tensor

from modicum.kernels import chunk_twin, decode_twin, evict_twin, rows_twin
from modicum.kernels.decode_twin import Decoded

_interpreting = False
_told: set[str] = set()


@contextmanager
def interpreted() -> Iterator[None]:
    """Use the kernels on a CPU too, through Triton's interpreter (TRITON_INTERPRET=1): for tests."""
    global _interpreting
    before, _interpreting = _interpreting, True
    try:
        yield
    finally:
        _interpreting = before


def on(device: torch.device) -> bool:
    """Whether tensors on this device go through the kernels."""
    return (device.type == "cuda" or _interpreting) and _module("decode") is not None


@cache
def _module(name: str) -> Any:
    """One of the Triton files; None where Triton is missing."""
    try:
        return __import__(f"modicum.kernels.{name}", fromlist=[name])
    except ImportError:
        return None


def _taken(name: str, reason: str | None) -> bool:
    if reason is None:
        return True
    if name + reason not in _told:
        _told.add(name + reason)
        warnings.warn(
            f"modicum's {name} kernel does not take {reason}: plain torch does it instead", stacklevel=3
        )
    return False


# -- a decode step
# -----------------------------------------------------------------------------------------------------


def decode(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    count: Tensor,
    scaling: float,
    *,
    form: str = "model",
    softcap: float | None = None,
    probe: Tensor | None = None,
    logits: bool = False,
    virtual: decode_twin.Virtual | None = None,
) -> Decoded:
    """One query token per row against the first `count` slots of each head; see `modicum.kernels.decode`."""
    extra = (None, None, None) if virtual is None else virtual
    out, lse, z, dots = torch.ops.modicum.decode(
        query, keys, values, count, scaling, form, softcap, probe, logits, *extra
    )
    return Decoded(out, lse, z if logits else None, None, None if probe is None else dots)


@torch.library.custom_op("modicum::decode", mutates_args=())
def _decode(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    count: Tensor,
    scaling: float,
    form: str,
    softcap: float | None,
    probe: Tensor | None,
    logits: bool,
    virtual_key: Tensor | None,
    virtual_value: Tensor | None,
    virtual_count: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    triton = _module("decode")
    value_dim = values.shape[-1] - (2 if form != "model" else 0)
    virtual = None
    if virtual_key is not None and virtual_value is not None and virtual_count is not None:
        virtual = (virtual_key, virtual_value, virtual_count)
    takes = triton.serves(query.shape[-1], value_dim, query.shape[2], query.dtype, form)
    work = triton.decode if _taken("decode", takes) else decode_twin.decode
    got: Decoded = work(
        query,
        keys,
        values,
        count,
        scaling,
        form=form,
        softcap=softcap,
        probe=probe,
        logits=logits,
        virtual=virtual,
    )
    logits_, dots = (
        query.new_empty(0, dtype=got.lse.dtype) if x is None else x for x in (got.logits, got.dots)
    )
    return got.out, got.lse, logits_, dots


@_decode.register_fake
def _(  # type: ignore[no-untyped-def]  # the arguments are those above
    query,
    keys,
    values,
    count,
    scaling,
    form,
    softcap,
    probe,
    logits,
    virtual_key,
    virtual_value,
    virtual_count,
):
    b, h, g, _ = query.shape
    slots, value_dim = keys.shape[2], values.shape[-1] - (2 if form != "model" else 0)

    wide = torch.promote_types(query.dtype, torch.float32)

    def empty(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=wide, device=query.device)

    return (
        query.new_empty(b, h, g, value_dim),
        empty(b, h, g),
        empty(b, h, g, slots) if logits else empty(0),
        empty(0) if probe is None else empty(b, h, slots),
    )


# -- scores
# ------------------------------------------------------------------------------------------------------------


def row_sums(
    queries: Tensor,
    query_positions: Tensor,
    parts: Sequence[Tensor],
    positions: Tensor,
    scaling: float,
    softcap: float | None,
    gain: Tensor | None,
    over: Literal["sum", "max"],
) -> Tensor:
    """Sums over attention rows, [B, H, G, N]; see `modicum.kernels.rows`."""
    settings = (scaling, softcap, gain, over)
    done: Tensor = torch.ops.modicum.row_sums(queries, query_positions, list(parts), positions, *settings)
    return done


@torch.library.custom_op("modicum::row_sums", mutates_args=())
def _row_sums(
    queries: Tensor,
    query_positions: Tensor,
    parts: list[Tensor],
    positions: Tensor,
    scaling: float,
    softcap: float | None,
    gain: Tensor | None,
    over: str,
) -> Tensor:
    triton = _module("rows")
    takes = triton.serves(queries.shape[-1], queries.dtype, *(part.dtype for part in parts))
    work = triton.row_sums if _taken("row", takes) else rows_twin.row_sums
    settings: dict[str, Any] = {"softcap": softcap, "gain": gain, "over": over}
    done: Tensor = work(queries, query_positions, tuple(parts), positions, scaling, **settings)
    return done


@_row_sums.register_fake
def _(queries, query_positions, parts, positions, scaling, softcap, gain, over):  # type: ignore[no-untyped-def]
    b, h, g = queries.shape[:3]
    return queries.new_empty(b, h, g, positions.shape[2], dtype=torch.float32)


def worst(score: Tensor, positions: Tensor, limit: Tensor, sinks: int, count: Tensor | None) -> Tensor:
    """Who goes: [B, H] indices; see `modicum.kernels.evict`."""
    victim: Tensor = torch.ops.modicum.worst(score, positions, limit, sinks, count)
    return victim


@torch.library.custom_op("modicum::worst", mutates_args=())
def _worst(score: Tensor, positions: Tensor, limit: Tensor, sinks: int, count: Tensor | None) -> Tensor:
    triton = _module("evict")
    work = triton.worst if _taken("eviction", triton.serves(score.dtype)) else evict_twin.worst
    victim: Tensor = work(score, positions, limit, sinks, count)
    return victim


@_worst.register_fake
def _(score, positions, limit, sinks, count):  # type: ignore[no-untyped-def]
    return score.new_empty(score.shape[:2], dtype=torch.int64)


# -- prefill, which is never compiled
# ----------------------------------------------------------------------------------


def best(score: Tensor, positions: Tensor, goal: Tensor) -> Tensor:
    """Who stays: [B, H, N] bool; see `modicum.kernels.evict`."""
    triton = _module("evict")
    takes = triton.serves(score.dtype, score.shape[-1])
    work = triton.best if _taken("choice", takes) else evict_twin.best
    keep: Tensor = work(score, positions, goal)
    return keep


def move(keep: Tensor, live: Tensor, stores: Sequence[Tensor], fresh: Sequence[Tensor] | None) -> None:
    """Newcomers into the slots that became free; see `modicum.kernels.evict`."""
    _module("evict").move(keep, live, stores, fresh)


def chunk(
    query: Tensor,
    held: tuple[Tensor, Tensor] | None,
    held_count: Tensor | None,
    key: Tensor,
    value: Tensor,
    valid: Tensor | None,
    scaling: float,
    softcap: float | None,
) -> tuple[Tensor, Tensor]:
    """A chunk over what is held and itself, with its log-sum-exp; see `modicum.kernels.chunk`."""
    triton = _module("chunk")
    dtypes = [query.dtype, key.dtype, value.dtype, *(x.dtype for x in held or ())]
    takes = triton.serves(query.shape[-1], value.shape[-1], *dtypes)
    work = triton.chunk if _taken("chunk", takes) else chunk_twin.chunk
    done: tuple[Tensor, Tensor] = work(query, held, held_count, key, value, valid, scaling, softcap)
    return done
