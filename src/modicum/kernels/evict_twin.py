"""Eviction in plain torch: what `evict` computes where Triton does not serve. Nothing waits for a device."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

_MOVE = 256  # slots looked at together: moving needs a copy of that many, not of an arena


def worst(
    score: Tensor,
    positions: Tensor,
    limit: Tensor,
    sinks: int,
    count: Tensor | None = None,
    factor: Tensor | None = None,
) -> Tensor:
    """[B, H] int64: see `evict.worst`."""
    if factor is not None:
        score = score * factor
    guarded = (positions >= limit[:, None, None]) | (positions < sinks)
    score = score.masked_fill(guarded, math.inf)
    age = positions.long()
    if count is not None:
        empty = torch.arange(score.shape[-1], device=score.device) >= _each(count, score)[..., None]
        score = score.masked_fill(empty, math.inf)
        age = age.masked_fill(empty, torch.iinfo(torch.int64).max)  # protected tokens go before empty slots
    lowest = score == score.amin(-1, keepdim=True)
    return torch.where(lowest, age, torch.iinfo(torch.int64).max).argmin(-1)


def best(score: Tensor, positions: Tensor, goal: Tensor) -> Tensor:
    """[B, H, N] bool: see `evict.best`."""
    newest = positions.argsort(dim=-1, descending=True)
    order = score.gather(-1, newest).argsort(dim=-1, descending=True, stable=True)
    order = newest.gather(-1, order)
    taken = torch.arange(score.shape[-1], device=score.device) < _each(goal, score)[..., None]
    return torch.zeros_like(order, dtype=torch.bool).scatter_(-1, order, taken.expand(order.shape))


def move(keep: Tensor, live: Tensor, stores: Sequence[Tensor], fresh: Sequence[Tensor] | None) -> None:
    """In place: see `evict.move`."""
    b, h, entries = keep.shape
    m = 0 if fresh is None else fresh[0].shape[2]
    held = entries - m
    slots = min(stores[0].shape[2], entries)
    entry = torch.arange(entries, device=keep.device)
    goal = live[:, None, None]
    moving = keep & ((entry >= goal) | (entry >= held))  # newcomers move whatever their number
    stays = torch.zeros(b, h, slots, dtype=torch.bool, device=keep.device)
    inside = min(held, slots)
    stays[:, :, :inside] = keep[:, :, :inside]
    hole = (entry[:slots] < goal) & ~stays
    # The i-th mover in order is the source of the i-th hole; what does not move goes to a place nobody reads.
    place = torch.where(moving, moving.cumsum(-1) - 1, entries)
    source = torch.zeros(b, h, entries + 1, dtype=torch.int64, device=keep.device)
    source.scatter_(-1, place, entry.expand(b, h, -1))
    source = source.gather(-1, (hole.cumsum(-1) - 1).clamp_min(0))  # [B, H, slots]
    for first in range(0, slots, _MOVE):
        some = slice(first, first + _MOVE)
        wanted, is_hole = source[:, :, some], hole[:, :, some]
        for i, store in enumerate(stores):
            if not store.numel():
                continue
            target = store[:, :, :slots][:, :, some]
            value = target
            if held:
                value = _pick(store, wanted.clamp_max(held - 1))
            if fresh is not None and m:
                new = _pick(fresh[i].expand(b, h, *fresh[i].shape[2:]), (wanted - held).clamp_min(0))
                value = torch.where(_spread(wanted < held, new), value, new.to(store.dtype))
            # Sources lie at `live` and beyond, holes below it: no tile reads what another wrote.
            target.copy_(torch.where(_spread(is_hole, target), value, target))


def _each(x: Tensor, like: Tensor) -> Tensor:
    """[B] or [B, H|1] -> [B, H|1]."""
    return x.reshape(like.shape[0], -1)


def _spread(x: Tensor, like: Tensor) -> Tensor:
    """[B, H, n] with the trailing dimensions of `like`."""
    return x.view(*x.shape, *([1] * (like.dim() - 3)))


def _pick(x: Tensor, index: Tensor) -> Tensor:
    """x [B, H, S, ...] at index [B, H, n] -> [B, H, n, ...]."""
    return x.gather(2, _spread(index, x).expand(*index.shape, *x.shape[3:]))
