"""Sums over attention rows in plain torch: what `rows` computes where Triton does not serve."""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

_ROW_BYTES = 32 * 2**20  # attention rows made at a time


def row_sums(
    queries: Tensor,
    query_positions: Tensor,
    parts: tuple[Tensor, ...],
    positions: Tensor,
    scaling: float,
    *,
    softcap: float | None = None,
    gain: Tensor | None = None,
    over: Literal["sum", "max"] = "sum",
    lse: Tensor | None = None,
) -> Tensor:
    """[B, H, G, N] fp32 (float64 if the queries are): see `rows.row_sums`."""
    b, h, g, r, dim = queries.shape
    n = positions.shape[2]
    wide = torch.float64 if queries.dtype == torch.float64 else torch.float32
    total = torch.zeros(b, h, g, n, dtype=wide, device=queries.device)
    at = _per_head(query_positions)
    tile = max(1, _ROW_BYTES // (4 * b * h * g * max(1, n)))
    for first in range(0, r, tile):
        some = slice(first, first + tile)
        q = queries[:, :, :, some].to(wide).reshape(b, h, -1, dim)  # [B, H, G·r, Dk]
        z = torch.cat([q @ k.to(wide).transpose(-1, -2) for k in parts], -1).view(b, h, g, -1, n) * scaling
        if softcap is not None:
            z = softcap * torch.tanh(z / softcap)
        if gain is not None:
            z = z * _per_head(gain)[:, :, None, some, None]
        seen = (positions >= 0)[:, :, None] & (positions[:, :, None] <= at[:, :, some, None])  # [B, H, r, N]
        z = z.masked_fill(~seen[:, :, None], -math.inf)
        norm = torch.logsumexp(z, -1) if lse is None else lse[:, :, :, some].to(wide)
        rows = (z - norm.masked_fill(norm == -math.inf, 0.0)[..., None]).exp()  # blind rows: exp(-inf)
        total = total + rows.sum(3) if over == "sum" else torch.maximum(total, rows.amax(3))
    return total


def _per_head(x: Tensor) -> Tensor:
    """[B, R] or [B, H, R] -> [B, 1|H, R]."""
    return x if x.dim() == 3 else x.unsqueeze(1)
