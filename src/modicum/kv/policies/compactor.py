"""Compactor (Chari and Van Durme, 2025): attention inside a chunk without a mask, and its keys' leverage."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from modicum.errors import PolicyError
from modicum.kv.policy import ALL, Policy, check_between, check_odd, check_positive
from modicum.kv.registry import register
from modicum.kv.view import View

_LEAST_SPREAD = 1e-6  # of a standard deviation: where all are equal, no z-score says anything


@register
@dataclass(frozen=True)
class Compactor(Policy):
    """s_j = z(u)_j + β · z(ℓ)_j, worked out once, when a chunk comes; survivors keep their score.

    u_j = avg3_j(‖v_j‖ · mean over the group of Σ_i softmax_j(q_i·k_j)), i and j in one block of `block` new
    tokens, without 1/√d and without a causal mask; the last block reaches back so as to be as long.
    ℓ_j = x_jᵀ(XᵀX + εI)⁻¹x_j, the leverage of the chunk's keys less their mean, ε = `ridge` · mean of XᵀX's
    diagonal. z(x) = (x - mean) / standard deviation over the chunk, per KV head. β = `blending`, or the share
    that is let go, 1 - min(1, capacity / tokens seen).

    After a call of fewer than `window` tokens (a decode step) the last `window` tokens are one block, scored
    anew by z(u) alone: a token's score is final once it leaves the window, which is protected. That rule is
    ours, as are keys after RoPE in ℓ (the paper's are before) and exact leverage (the paper's is sketched).

    Source: arXiv 2507.08143; github.com/NVIDIA/kvpress, compactor_press.py, non_causal_attention_press.py and
    leverage_press.py.
    """

    name: ClassVar[str] = "compactor"
    title: ClassVar[str] = "Compactor"
    paper: ClassVar[str] = "https://arxiv.org/abs/2507.08143"
    summary: ClassVar[str] = (
        "Keeps what a chunk attends to without a causal mask, and keys that stand out in it."
    )

    block: int = 256
    window: int = 32
    kernel: int = 3
    ridge: float = 0.01
    blending: float | None = None

    def __post_init__(self) -> None:
        check_positive(self, block=self.block, window=self.window)
        check_odd(self, kernel=self.kernel)
        check_between(self, 1e-6, 1.0, ridge=self.ridge)
        if self.blending is not None:
            check_between(self, 0.0, 1.0, blending=self.blending)
        if self.window < 2:
            raise PolicyError("compactor: window is 1; a block needs at least 2 tokens to compare")

    @property
    def is_rotation_invariant(self) -> bool:
        return True

    @property
    def layerwise(self) -> bool:
        return False

    @property
    def query_rows(self) -> int:
        return ALL

    @property
    def kept_queries(self) -> int:
        return self.window

    def state_width(self, group: int) -> int:
        """One number per token, its score."""
        return 1

    @property
    def accumulates(self) -> bool:
        return True

    def score(self, view: View) -> Tensor:
        return self._state(view)[..., 0]

    def observe(self, view: View) -> Tensor:
        state = self._state(view)
        if view.newcomers < self.window or view.arrived is None:
            self._note(view, state, slice(None), view.newcomers)
            return state
        for row, count in enumerate(view.arrived.tolist()):  # pads between the rows' tokens: one by one
            self._note(view, state, slice(row, row + 1), count)
        return state

    def _note(self, view: View, state: Tensor, rows: slice, count: int) -> None:
        """Write into the state the scores of some rows, to which `count` tokens have come."""
        if count == 0:
            return
        chunk = _last(view, rows, max(count, self.window))
        score = _standard(self._attention(chunk), chunk.there)
        if count >= self.window:
            leverage = _standard(_leverage(chunk, self.ridge), chunk.there).float()
            score = score + self._blending(view)[rows, None, None] * leverage
        if view.arrived is not None:
            chunk.there &= (view.arrived[rows] > 0)[:, None, None]
        # A slot is written to once at most: what is not there goes into a column of its own.
        line = F.pad(state[rows, :, :, 0], (0, 1))
        index = chunk.slots.masked_fill(~chunk.there, line.shape[-1] - 1)
        state[rows, :, :, 0] = line.scatter(-1, index, score)[..., :-1]

    def _blending(self, view: View) -> Tensor:
        """β, [B] fp32."""
        if self.blending is None:
            return 1 - (view.capacity / view.seen).clamp_max(1.0)
        return torch.full_like(view.seen, self.blending, dtype=torch.float32)

    def _attention(self, chunk: _Chunk) -> Tensor:
        """u, [b, H, c] fp32."""
        c, total = chunk.there.shape[-1], torch.zeros_like(chunk.there, dtype=torch.float32)
        for first in range(0, c, self.block):
            last = min(c, first + self.block)
            first = max(0, last - self.block)
            keys, there = chunk.keys[:, :, first:last], chunk.there[:, :, first:last]
            z = chunk.queries[:, :, :, first:last] @ keys.unsqueeze(2).transpose(-1, -2)  # [b, H, G, i, j]
            z = z.masked_fill(~there[:, :, None, None], torch.finfo(z.dtype).min)
            rows = z.softmax(-1) * chunk.asked[:, None, None, first:last, None]
            total[:, :, first:last] = rows.sum(3).mean(2)
        u = total * torch.linalg.vector_norm(chunk.values, dim=-1)
        return _neighbours(u.masked_fill(~chunk.there, 0.0), chunk.there, self.kernel)

    def _state(self, view: View) -> Tensor:
        if view.state is None:
            raise PolicyError("compactor: the view has no state: call `observe` with one of width 1 first")
        return view.state


@dataclass
class _Chunk:
    """The last c positions of some rows, in order; some heads may hold no token at some of them."""

    slots: Tensor
    """[b, H, c] int64: where each lies among the view's tokens."""
    there: Tensor
    """[b, H, c] bool"""
    keys: Tensor
    """[b, H, c, Dk] fp32, zero where there is no token, and so the others."""
    values: Tensor
    queries: Tensor
    """[b, H, G, c, Dk] fp32"""
    asked: Tensor
    """[b, c] bool: whether the query of a position is at hand."""


def _last(view: View, rows: slice, count: int) -> _Chunk:
    """The tokens and queries of the last `count` positions of rows."""
    queries, at = (x[rows] for x in view.asked)
    positions, first = view.masked(view.positions, -1)[rows], view.seen[rows] - count
    slots, there = _places(positions, first[:, None, None], count)
    asked_at, asked = _places(at, first[:, None], count)
    held = view.keys_at(slots, rows), view.values_at(slots, rows)
    keys, values = (x.masked_fill(~there[..., None], 0.0) for x in held)
    index = asked_at[:, None, None, :, None].expand(*queries.shape[:3], -1, queries.shape[-1])
    picked = queries.gather(3, index).float().masked_fill(~asked[:, None, None, :, None], 0.0)
    return _Chunk(slots, there, keys, values, picked, asked)


def _places(positions: Tensor, first: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Where the positions first, …, first + count - 1 stand in positions [..., N]: index [..., count], and
    whether they do. A negative position is no token.
    """
    relative = positions - first
    inside = (relative >= 0) & (relative < count) & (positions >= 0)
    target = relative.masked_fill(~inside, count).long()
    own = torch.arange(positions.shape[-1], device=positions.device).expand(positions.shape)
    index = torch.full((*positions.shape[:-1], count + 1), -1, device=positions.device)
    index = index.scatter(-1, target, own)[..., :count]
    return index.clamp_min(0), index >= 0


def _neighbours(x: Tensor, there: Tensor, kernel: int) -> Tensor:
    """The average over `kernel` neighbours of x [b, H, c], those that are there."""
    ones = there.to(x.dtype)
    sums, number = (F.avg_pool1d(t, kernel, 1, kernel // 2) for t in (x, ones))
    return sums / number.clamp_min(1e-9)


def _leverage(chunk: _Chunk, ridge: float) -> Tensor:
    """ℓ, [b, H, c], in fp64 wherever there is such a thing."""
    there = chunk.there[..., None]
    wide = torch.float32 if chunk.keys.device.type == "mps" else torch.float64
    keys = chunk.keys.to(wide)
    mean = keys.sum(2, keepdim=True) / there.sum(2, keepdim=True).clamp_min(1)
    x = (keys - mean).masked_fill(~there, 0.0)
    gram = x.transpose(-1, -2) @ x  # [b, H, Dk, Dk]
    size = gram.diagonal(dim1=-2, dim2=-1).mean(-1)
    gram.diagonal(dim1=-2, dim2=-1).add_((ridge * size).clamp_min(torch.finfo(torch.float32).tiny)[..., None])
    factor, _ = torch.linalg.cholesky_ex(gram)
    solved = torch.cholesky_solve(x.transpose(-1, -2), factor)  # [b, H, Dk, c]
    leverage: Tensor = (x * solved.transpose(-1, -2)).sum(-1)
    return leverage


def _standard(x: Tensor, there: Tensor) -> Tensor:
    """(x - mean) / standard deviation over the tokens there are, x and there [b, H, c]."""
    number = there.sum(-1, keepdim=True)
    mean = x.masked_fill(~there, 0.0).sum(-1, keepdim=True) / number.clamp_min(1)
    apart = (x - mean).masked_fill(~there, 0.0)
    variance = apart.square().sum(-1, keepdim=True) / (number - 1).clamp_min(1)
    return apart / variance.sqrt().clamp_min(_LEAST_SPREAD)
