"""Observed attention: a model's exact attention, whose weights are shown to an observer on the way."""

from __future__ import annotations

import math
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

_TILE_BYTES = 64 * 2**20  # attention rows made at a time


class Observer(Protocol):
    """Reads attention weights of layers with full attention."""

    @property
    def first(self) -> int:
        """Position of the first query whose weights it wants."""

    def observe(self, layer: int, weights: Tensor, first: int) -> None:
        """Read weights [H, G, t, n] fp32 of t queries, the first of which is at position `first`; n counts
        the tokens up to the last of these queries.
        """

    def skip(self, layer: int) -> None:
        """Take note of a layer without full attention, whose weights are not shown."""


def observed_attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None = None,
    scaling: float | None = None,
    dropout: float = 0.0,
    *,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    observer: Observer | None = None,
    **_: object,
) -> tuple[Tensor, None]:
    """Causal attention in tiles of queries (no n x n map), with the signature of transformers' functions.

    query [1, Hq, n, Dk], key [1, H, n, Dk], value [1, H, n, Dv] -> [1, n, Hq, Dv]. softcap bounds the logits
    (Gemma 2); s_aux [Hq] are logits of learned sinks (gpt-oss). Queries that the observer does not want go
    through torch's own attention where it can compute them.
    """
    b, h, n, _dim = key.shape
    g = query.shape[1] // h
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    layer = getattr(module, "layer_idx", None)
    if layer is None:
        observer = None
    elif observer is not None and sliding_window is not None:
        observer.skip(layer)
        observer = None
    q = torch.unflatten(query, 1, (h, g))
    out = query.new_empty(b, h, g, n, value.shape[-1])
    start = 0
    if sliding_window is None and softcap is None and s_aux is None:
        start = n if observer is None else min(n, observer.first)
    if start:
        q_head, k_head, v_head = (x[:, :, :start] for x in (query, key, value))
        part = F.scaled_dot_product_attention(
            q_head, k_head, v_head, is_causal=True, scale=scaling, enable_gqa=g > 1
        )
        out[:, :, :, :start] = torch.unflatten(part, 1, (h, g))
    k, v = key.float().transpose(-1, -2), value.float()
    tile = max(1, _TILE_BYTES // (4 * b * h * g * n))
    column = torch.arange(n, device=query.device)
    for first in range(start, n, tile):
        last = min(n, first + tile)
        at = column[first:last, None]
        z = q[:, :, :, first:last].float().flatten(2, 3) @ k[..., :last] * scaling  # [B, H, G*t, last]
        z = torch.unflatten(z, 2, (g, -1))
        if softcap is not None:
            z = softcap * torch.tanh(z / softcap)
        unseen = column[:last] > at
        if sliding_window is not None:
            unseen |= column[:last] <= at - sliding_window
        z = z.masked_fill_(unseen, -math.inf)
        lse = torch.logsumexp(z, -1, keepdim=True)
        if s_aux is not None:
            lse = torch.logaddexp(lse, s_aux.float().view(1, h, g, 1, 1))
        weights = z.sub_(lse).exp_()
        part = weights.flatten(2, 3) @ v[:, :, :last]
        out[:, :, :, first:last] = torch.unflatten(part, 2, (g, -1)).to(out.dtype)
        if observer is not None and layer is not None and last > observer.first:
            observer.observe(layer, weights[0], first)
    return out.flatten(1, 2).transpose(1, 2).contiguous(), None
