"""TriAttention (2026): how much queries before RoPE are expected to look at a key, over future distances."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from modicum.errors import PolicyError
from modicum.kv.policy import ALL, Policy, check_choice, check_positive, reduce_group
from modicum.kv.registry import register
from modicum.kv.turning import Rotary
from modicum.kv.view import View

_OFFSETS = tuple(2**i for i in range(17))
"""Distances from the newest token at which future queries are asked: 1, 2, 4, …, 65,536."""


@register
@dataclass(frozen=True)
class TriAttention(Policy):
    """s_j = mean_δ Σ_f γ²|μ_f||k_jf| cos(ω_f(t - p_j + δ) + φ_jf) + Σ_f γ²(m_f - |μ_f|)|k_jf|, standardised.

    Rotary pairs f as complex numbers, queries q and keys k before RoPE: μ_f = mean q_f and m_f = mean |q_f|
    over every query that the row has read, φ_jf = arg(μ_f · conj k_jf); ω the rotary speeds, γ the factor of
    turned vectors (yarn's), t the newest position, p_j the token's, δ in 1, 2, 4, …, 65,536. Per query head,
    standardised over the tokens held; the group by its largest or its mean.

    The authors take μ and m from a file made for each model; here they are gathered on the way. As a
    cached key is turned by ω_f p_j already, the first sum is its product with the mean of μ turned to t + δ.

    Source: arXiv 2604.04921; github.com/WeianMao/triattention, triattention/methods/pruning_utils.py.
    """

    name: ClassVar[str] = "triattention"
    title: ClassVar[str] = "TriAttention"
    paper: ClassVar[str] = "https://arxiv.org/abs/2604.04921"
    summary: ClassVar[str] = "Keeps the keys that the mean query before RoPE favours at future distances."

    window: int = 128
    group: Literal["max", "mean"] = "max"

    def __post_init__(self) -> None:
        check_positive(self, window=self.window)
        check_choice(self, "group", self.group, ("max", "mean"))

    @property
    def layerwise(self) -> bool:
        return False

    @property
    def query_rows(self) -> int:
        return ALL

    @property
    def needs_rotary(self) -> bool:
        return True

    @property
    def accumulates(self) -> bool:
        return True

    def tally_width(self, group: int, key_dim: int) -> int:
        """How many queries, and per query head and pair the sums of q's two parts and of |q|."""
        return 1 + group * 3 * (key_dim // 2)

    def observe(self, view: View) -> Tensor | None:
        tally, rotary = _needed(view)
        queries, at = view.asked
        b, h, d = queries.shape[0], queries.shape[1], queries.shape[-1]
        there = at >= 0
        if view.renumbered:
            assert view.plain_queries is not None
            x, y = _pairs(view.plain_queries.float(), rotary)  # [B, H, G, R, P]
        else:
            x, y = _pairs(queries.float(), rotary)
            speed, scale = _turns(rotary, d, tally)
            angle = at[:, None, None, :, None].clamp_min(0) * speed
            cos, sin = ((part / scale).float() for part in (angle.cos(), angle.sin()))
            x, y = x * cos + y * sin, y * cos - x * sin
        parts = torch.stack([x, y, torch.hypot(x, y)], dim=-2)  # [B, H, G, R, 3, P]
        parts = parts.masked_fill(~there[:, None, None, :, None, None], 0.0)
        tally[..., 1:].add_(parts.sum(3, dtype=tally.dtype).reshape(b, h, -1))
        tally[..., 0].add_(there.sum(-1, keepdim=True))
        return view.state

    def head_scores(self, view: View) -> Tensor:
        tally, rotary = _needed(view)
        d = view.parts[0][0].shape[-1]
        means = tally[..., 1:] / tally[..., :1].clamp_min(1)
        x, y, size = torch.unflatten(means, -1, (-1, 3, d // 2)).unbind(-2)  # [B, H, G, P]
        speed, scale = _turns(rotary, d, tally)
        now = view.count - 1 if view.renumbered else view.seen[:, None] - 1  # [B, H|1]
        later = now.to(tally.dtype)[..., None] + torch.tensor(_OFFSETS, device=tally.device)
        angle = later[..., None] * speed  # [B, H|1, 17, P]
        cos, sin = angle.cos().mean(2)[:, :, None], angle.sin().mean(2)[:, :, None]
        turned = _vector(scale * (x * cos - y * sin), scale * (x * sin + y * cos), rotary)
        spread = (scale * (size - torch.hypot(x, y)).clamp_min(0.0)).float()

        def sizes(keys: Tensor) -> Tensor:
            return torch.hypot(*_pairs(keys, rotary)) @ spread.transpose(-1, -2)  # [B, H, n, G]

        score = view.dot_keys(turned.float()) + view.per_key(sizes).transpose(-1, -2)
        return _standard(score, view)

    def score(self, view: View) -> Tensor:
        return reduce_group(self.head_scores(view), self.group)


def _needed(view: View) -> tuple[Tensor, Rotary]:
    if view.tally is None or view.rotary is None:
        raise PolicyError("triattention: the view has no tally or no rotary embedding to undo")
    return view.tally, view.rotary


def _turns(rotary: Rotary, dim: int, like: Tensor) -> tuple[Tensor, Tensor]:
    """Speed and factor of each pair of `dim` numbers, [P]; those beyond the turned ones stand still."""
    speed = rotary.speed.to(device=like.device, dtype=like.dtype)
    rest = dim // 2 - len(speed)
    scale = torch.full_like(speed, rotary.scale)
    return torch.cat([speed, speed.new_zeros(rest)]), torch.cat([scale, scale.new_ones(rest)])


def _pairs(x: Tensor, rotary: Rotary) -> tuple[Tensor, Tensor]:
    """The two parts of each pair: x [..., D] -> [..., D / 2] each, the turned ones first."""
    size = 2 * len(rotary.speed)
    turned, rest = x[..., :size], torch.unflatten(x[..., size:], -1, (-1, 2))
    if rotary.neighbours:
        first, second = turned[..., 0::2], turned[..., 1::2]
    else:
        first, second = turned.chunk(2, dim=-1)
    return torch.cat([first, rest[..., 0]], dim=-1), torch.cat([second, rest[..., 1]], dim=-1)


def _vector(first: Tensor, second: Tensor, rotary: Rotary) -> Tensor:
    """What `_pairs` takes apart."""
    half = len(rotary.speed)
    a, b = first[..., :half], second[..., :half]
    turned = torch.stack([a, b], dim=-1).flatten(-2) if rotary.neighbours else torch.cat([a, b], dim=-1)
    rest = torch.stack([first[..., half:], second[..., half:]], dim=-1).flatten(-2)
    return torch.cat([turned, rest], dim=-1)


def _standard(score: Tensor, view: View) -> Tensor:
    """(s - mean) / standard deviation over the tokens there are, per query head: score [B, H, G, N]."""
    there = None if view.valid is None else view.valid[:, :, None]
    number = view.count[:, :, None, None].clamp_min(1)
    mean = _only(score, there).sum(-1, keepdim=True) / number
    apart = _only(score - mean, there)
    deviation = (apart.square().sum(-1, keepdim=True) / (number - 1).clamp_min(1)).sqrt()
    return apart / deviation.clamp_min(1e-6)


def _only(x: Tensor, there: Tensor | None) -> Tensor:
    return x if there is None else x.masked_fill(~there, 0.0)
