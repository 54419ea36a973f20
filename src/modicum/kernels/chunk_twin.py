"""Attention of a chunk in plain torch: what `chunk` computes where Triton does not serve."""

from __future__ import annotations

import math

import torch
from torch import Tensor

_ROW_BYTES = 32 * 2**20  # logits made at a time


def chunk(
    query: Tensor,
    held: tuple[Tensor, Tensor] | None,
    held_count: Tensor | None,
    key: Tensor,
    value: Tensor,
    valid: Tensor | None,
    scaling: float,
    softcap: float | None = None,
) -> tuple[Tensor, Tensor]:
    """([B, H, G, m, Dv], [B, H, G, m]): see `chunk.chunk`."""
    b, h, g, m, dim = query.shape
    wide = torch.float64 if query.dtype == torch.float64 else torch.float32
    parts = [(key, value)] if held is None else [held, (key, value)]
    n = 0 if held is None else held[0].shape[2]
    slot, index = torch.arange(n, device=query.device), torch.arange(m, device=query.device)
    there = (slot < (n if held_count is None else held_count[:, None])).expand(b, n)
    out = query.new_empty(b, h, g, m, value.shape[-1])
    lse = torch.empty(b, h, g, m, dtype=wide, device=query.device)
    tile = max(1, _ROW_BYTES // (4 * b * h * g * (n + m)))
    for first in range(0, m, tile):
        some = slice(first, first + tile)
        rows = index[some, None]
        itself = index == rows  # a pad sees itself, so that its row has a softmax
        earlier = index <= rows
        fresh = (earlier | itself).expand(b, -1, -1) if valid is None else (earlier & valid[:, None]) | itself
        seen = torch.cat([there[:, None].expand(-1, len(rows), -1), fresh], -1)  # [B, r, N]
        q = query[:, :, :, some].to(wide).reshape(b, h, -1, dim)
        z = torch.cat([q @ k.to(wide).transpose(-1, -2) for k, _ in parts], -1) * scaling
        if softcap is not None:
            z = softcap * torch.tanh(z / softcap)
        z = z.view(b, h, g, -1, n + m).masked_fill(~seen[:, None, None], -math.inf)
        lse[:, :, :, some] = torch.logsumexp(z, -1)
        weights = torch.softmax(z, -1).view(b, h, -1, n + m)
        shares = torch.split(weights, [k.shape[2] for k, _ in parts], -1)
        total = sum((w @ v.to(wide) for w, (_, v) in zip(shares, parts, strict=True)), q.new_zeros(()))
        out[:, :, :, some] = total.view(b, h, g, -1, value.shape[-1]).to(out.dtype)
    return out, lse
