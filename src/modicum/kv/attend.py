"""Attention over an arena and a chunk: fused kernels on each, joined by their log-sum-exp."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

_TILE_BYTES = 64 * 2**20  # logits made at a time where no fused kernel serves


def decode(query: Tensor, keys: Tensor, values: Tensor, scaling: float, valid: Tensor | None) -> Tensor:
    """One new token against what is held: query [B, H, G, Dk], keys [B, H, N, Dk] -> [B, H, G, Dv].

    The group's query heads stand where a kernel expects query tokens: nothing is repeated.
    valid: [B, 1|H, N] bool, or None.
    """
    mask = None if valid is None else valid[:, :1, None, :]
    return F.scaled_dot_product_attention(query, keys, values, attn_mask=mask, scale=scaling)


def with_lse(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    scaling: float,
    causal: bool = False,
    mask: Tensor | None = None,
    softcap: float | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention and its log-sum-exp: query [B, H, M, Dk], keys [B, H, N, Dk] -> ([B, H, M, Dv], [B, H, M]).

    causal: query i sees keys 0 … i (M = N). mask: [B, 1, M|1, N] bool, True where seen; a row that sees
    nothing gives zeros and -inf.
    """
    same = keys.shape[-1] == values.shape[-1]
    if softcap is None and same and query.device.type == "cpu":
        bias = None
        if mask is not None:
            bias = torch.zeros(mask.shape, dtype=query.dtype).masked_fill_(~mask, -math.inf)
            bias = bias.expand(-1, -1, query.shape[2], -1)
        out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            query, keys, values, 0.0, causal, attn_mask=bias, scale=scaling
        )
        if mask is not None:  # the kernel answers 0 for a row that sees nothing
            lse = lse.masked_fill(~mask.any(-1).expand(lse.shape), -math.inf)
        return out, lse
    if softcap is None and same and mask is None and query.is_cuda:
        q, k, v = query.contiguous(), keys, values
        if query.dtype in (torch.float16, torch.bfloat16) and query.shape[-1] <= 256:
            out, lse = torch.ops.aten._scaled_dot_product_flash_attention(
                q, k, v, 0.0, causal, scale=scaling
            )[:2]
        else:
            out, lse = torch.ops.aten._scaled_dot_product_efficient_attention(
                q, k, v, None, True, 0.0, causal, scale=scaling
            )[:2]
        return out, lse[:, :, : query.shape[2]]
    return _plain(query, keys, values, scaling, causal, mask, softcap)


def _plain(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    scaling: float,
    causal: bool,
    mask: Tensor | None,
    softcap: float | None,
) -> tuple[Tensor, Tensor]:
    """The same in plain operations, by tiles of queries: for soft-capped logits, masks on a GPU, unequal
    widths.
    """
    b, h, m, _ = query.shape
    n = keys.shape[2]
    wide = torch.float64 if query.dtype == torch.float64 else torch.float32
    out = query.new_empty(b, h, m, values.shape[-1])
    lse = torch.empty(b, h, m, dtype=wide, device=query.device)
    tile = max(1, _TILE_BYTES // (4 * b * h * n))
    k, v = keys.to(wide).transpose(-1, -2), values.to(wide)
    for first in range(0, m, tile):
        last = min(m, first + tile)
        z = (query[:, :, first:last].to(wide) @ k) * scaling
        if softcap is not None:
            z = softcap * torch.tanh(z / softcap)
        if causal:
            later = torch.arange(n, device=z.device) > torch.arange(first, last, device=z.device)[:, None]
            z = z.masked_fill(later, -math.inf)
        if mask is not None:
            z = z.masked_fill(~(mask if mask.shape[2] == 1 else mask[:, :, first:last]), -math.inf)
        lse[:, :, first:last] = torch.logsumexp(z, -1)
        weights = torch.softmax(z, -1).nan_to_num(0.0)
        out[:, :, first:last] = (weights @ v).to(out.dtype)
    return out, lse


def chunk(
    query: Tensor,
    held: tuple[Tensor, Tensor] | None,
    held_valid: Tensor | None,
    key: Tensor,
    value: Tensor,
    valid: Tensor | None,
    scaling: float,
    softcap: float | None,
) -> tuple[Tensor, Tensor]:
    """A chunk of m tokens against the tokens held (all of them earlier) and itself (causally).

    query [B, H, G, t, Dk] of the chunk's last t tokens, usually all; held keys [B, H, N, Dk] and values;
    held_valid [B, H, N]; key [B, H, m, Dk], value; valid [B, m] bool. Returns ([B, H, G, t, Dv], log-sum-exp
    [B, H, G, t]). No keys or values are copied; the outputs of pads mean nothing.
    """
    b, h, g, t, _ = query.shape
    m = key.shape[2]
    causal, mask = True, None
    if valid is not None or t < m:
        j = torch.arange(m, device=query.device)
        i = j[m - t :, None]
        mask = (j <= i)[None]  # [1, t, m]
        if valid is not None:
            # A pad sees itself, so that its row has a softmax; nobody else sees it.
            mask = (mask & valid[:, None]) | (j == i)  # [B, t, m]
        causal, mask = False, mask[:, None]
    parts = [with_lse(query[:, :, j], key, value, scaling, causal, mask, softcap) for j in range(g)]
    out, lse = (
        parts[0] if g == 1 else (torch.stack([o for o, _ in parts], 2), torch.stack([s for _, s in parts], 2))
    )
    out, lse = out.reshape(b, h, g, t, -1), lse.reshape(b, h, g, t)
    if held is None:
        return out, lse
    seen = None if held_valid is None else held_valid[:, :1, None, :]
    old, old_lse = with_lse(query.reshape(b, h, g * t, -1), *held, scaling, False, seen, softcap)
    return merge(out, lse, old.view(out.shape), old_lse.reshape(lse.shape))


def with_sinks(out: Tensor, lse: Tensor, sinks: Tensor) -> Tensor:
    """Attention whose softmax also has a learned logit per query head, which stands for no token.

    The share of all tokens in that softmax is exp(lse) / (exp(lse) + exp(sink)). out [B, H, G, m, Dv], lse
    [B, H, G, m], sinks [H, G] -> [B, H, G, m, Dv]. Source: gpt-oss (arXiv 2508.10925), section 2.
    """
    share = torch.sigmoid(lse - sinks.to(lse.dtype)[:, :, None])
    return (out.to(share.dtype) * share[..., None]).to(out.dtype)


def merge(a: Tensor, a_lse: Tensor, b: Tensor, b_lse: Tensor) -> tuple[Tensor, Tensor]:
    """Attention over the union of two disjoint sets, from that over each: outputs [..., Dv], log-sum-exps
    [...].
    """
    share = torch.sigmoid(b_lse - a_lse)  # of b in the softmax over both
    out = torch.lerp(a.to(share.dtype), b.to(share.dtype), share[..., None])
    return out.to(a.dtype), torch.logaddexp(a_lse, b_lse)
