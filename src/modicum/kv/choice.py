"""Choosing from scores: the best to keep, or the one to let go. Ties keep the more recent token."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from modicum.kernels import dispatch as kernels

_LAST = torch.tensor(torch.iinfo(torch.int32).max, dtype=torch.int32)


def best(score: Tensor, positions: Tensor, count: Tensor) -> Tensor:
    """[B, H, N] bool: the `count` highest of each head.

    score: [B, H, N] fp32, -inf where there is no token; positions: [B, H, N]; count: [B, 1] or [B, H]
    whole numbers.
    """
    if kernels.on(score.device):
        return kernels.best(score, positions, count)
    if count.numel() == 1:
        # All heads keep as many: the lowest kept score says it all, unless others equal it.
        number = int(count)
        if 0 < number < score.shape[-1] and not score.is_cuda:
            least = score.kthvalue(score.shape[-1] - number + 1, dim=-1, keepdim=True).values
            keep = score >= least
            if int(keep.sum()) == number * keep[..., 0].numel():
                return keep
    newest = positions.argsort(dim=-1, descending=True)
    order = score.gather(-1, newest).argsort(dim=-1, descending=True, stable=True)
    order = newest.gather(-1, order)
    taken = torch.arange(score.shape[-1], device=score.device) < count.unsqueeze(-1)  # [B, H|1, N]
    return torch.zeros_like(order, dtype=torch.bool).scatter_(-1, order, taken.expand(order.shape))


def gaps(keep: Tensor, live: Tensor) -> tuple[Tensor, Tensor]:
    """Where what is kept is to move, so that the first `live` slots hold it.

    keep: [B, H, N] bool; live: [B, 1, 1], of each row as many as its heads keep. Returns [K, 3] row, head and
    slot, twice: every free slot below the new length, and the kept tokens from above it, as many of each.
    """
    index = torch.arange(keep.shape[2], device=keep.device)
    return ((index < live) & ~keep).nonzero(), ((index >= live) & keep).nonzero()


def worst(score: Tensor, positions: Tensor) -> Tensor:
    """[B, H]: index of the lowest score of each head, the oldest among equals."""
    lowest = score == score.amin(-1, keepdim=True)
    return torch.where(lowest, positions, _LAST).argmin(-1)


def compete(scores: list[Tensor], positions: list[Tensor], total: int, sure: int) -> list[Tensor]:
    """Heads of one row compete for `total` slots (Ada-KV, arXiv 2407.11550, in kvpress's form).

    scores: one [N_h] per head, +inf for protected tokens, -inf where there is none. Each head keeps its
    `sure` best (and all that is protected); the rest goes to the highest scores of all heads. Returns one
    bool [N_h] per head, `total` of them True in all if there are that many tokens.
    """
    ranked = []
    for score, position in zip(scores, positions, strict=True):
        first = best(score[None, None], position[None, None], torch.tensor([[sure]], device=score.device))[
            0, 0
        ]
        ranked.append(torch.where(first & (score > -math.inf), math.inf, score))
    every, where = torch.cat(ranked)[None, None], torch.cat(positions)[None, None]
    there = int((every > -math.inf).sum())
    keep = best(every, where, torch.tensor([[min(total, there)]], device=every.device))[0, 0]
    return list(torch.split(keep, [len(s) for s in scores]))
