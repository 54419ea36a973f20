"""Turning: a model's rotary embedding, undone and done again at another position.

With `positions="renumbered"` a cache keeps keys as they are before the rotary embedding. Each time they are
looked at they are turned to their rank among the tokens held: 0, 1, 2, … in the order in which they came
(Xiao et al. 2023, "Efficient Streaming Language Models with Attention Sinks", arXiv 2309.17453, section 3.2).
Distances then never grow beyond what is held, however long the stream.

How a model turns is found out in `kv/rotary.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from modicum.errors import InputError

NUMBERINGS = ("original", "renumbered")


@dataclass(frozen=True)
class Rotary:
    """How a model turns: pair i of a head's dimensions at position p by the angle p · speed_i."""

    kind: str
    """As transformers calls it: "default", "yarn", …"""
    speed: Tensor
    """[R / 2] radians per position; R of a head's dimensions are turned, its first."""
    scale: float
    """Factor of the turned vectors (yarn's)."""
    neighbours: bool
    """Whether pairs stand side by side (2i, 2i + 1), or apart (i, i + R / 2)."""


class Turning:
    """A model's rotary embedding, in both directions.

    Args:
        rotary: how the model turns.
        dtype: in which it does: its cosines and sines are rounded to that.
    """

    def __init__(self, rotary: Rotary, dtype: torch.dtype) -> None:
        self.rotary = rotary
        self.dtype = dtype
        self._known: tuple[Tensor, Tensor, Tensor] | None = None
        self._table: tuple[Tensor, Tensor] | None = None

    def forget(self) -> None:
        """Let what was made for a call go."""
        self._known = self._table = None

    def back(self, x: Tensor, positions: Tensor) -> Tensor:
        """What x was before the model turned it: x [B, H, m, D], positions [B|1, m] -> [B, H, m, D].

        In fp32 at least, rounded to x's dtype.
        """
        if self._known is None or self._known[0] is not positions:
            cos, sin = (part[:, None] for part in self._angles(positions.clamp_min(0)))
            wide = torch.promote_types(cos.dtype, torch.float32)
            cos, sin = cos.to(wide), sin.to(wide)
            # Rounded and scaled as they are, the squares need not add up to 1.
            norm = cos.square() + sin.square()
            self._known = positions, cos / norm, -sin / norm
        _, cos, sin = self._known  # [B|1, 1, m, R / 2]
        return self._turned(x.to(cos.dtype), cos, sin).to(x.dtype)

    def to(self, x: Tensor, ranks: Tensor, most: int) -> Tensor:
        """x [B, H, n, D], not turned, at ranks [B|1, H|1, n] below `most`, as the model would turn it."""
        if self._table is None or most > self._table[0].shape[0]:
            self._table = self._angles(torch.arange(most, device=x.device))
        flat = ranks.flatten()
        cos, sin = (part.index_select(0, flat).view(*ranks.shape, -1) for part in self._table)
        return self._turned(x, cos.to(x.dtype), sin.to(x.dtype))

    def grouped(self, query: Tensor, ranks: Tensor, most: int) -> Tensor:
        """The same of queries [B, H, G, m, D], a group's all at the ranks [B|1, H|1, m] of their KV head."""
        b, h, g, m, d = query.shape
        if ranks.shape[1] > 1:
            ranks = ranks[:, :, None].expand(-1, -1, g, -1).flatten(1, 2)
        return self.to(query.reshape(b, h * g, m, d), ranks, most).view(query.shape)

    def _angles(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Cosines and sines [..., R / 2] at positions [...], rounded as the model has them."""
        speed = self.rotary.speed.to(positions.device)
        angles = positions[..., None].to(speed.dtype) * speed
        return tuple((part * self.rotary.scale).to(self.dtype) for part in (angles.cos(), angles.sin()))  # type: ignore[return-value]  # two of them

    def _turned(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """x [B, H, n, D] with its pairs turned by [B|1, H|1, n, R / 2]."""
        half = cos.shape[-1]
        size = 2 * half
        out = torch.empty_like(x)
        if self.rotary.neighbours:
            pairs = (slice(0, size, 2), slice(1, size, 2))
        else:
            pairs = (slice(0, half), slice(half, size))
        (a, b), (to_a, to_b) = ([t[..., part] for part in pairs] for t in (x, out))
        torch.mul(a, cos, out=to_a).addcmul_(b, sin, value=-1)
        torch.mul(b, cos, out=to_b).addcmul_(a, sin)
        if size < x.shape[-1]:
            out[..., size:] = x[..., size:]
        return out


def check_numbering(positions: str) -> str:
    """The setting `positions` of a cache, if it is one.

    Raises:
        InputError: it is not.
    """
    if positions not in NUMBERINGS:
        raise InputError(f"positions is {positions!r}: choose one of {', '.join(NUMBERINGS)}")
    return positions


def fresh_ranks(live: Sequence[int], length: int, valid: Tensor | None, device: torch.device) -> Tensor:
    """Ranks of a piece's tokens, after the `live` held per row: [B|1, m]; valid [B, m], False for pads."""
    fresh = torch.arange(length, device=device)[None]
    if valid is not None:
        fresh = (valid.cumsum(1) - 1).clamp_min(0)
    if min(live) == max(live):
        return fresh + live[0]
    return fresh + torch.tensor(live, device=device)[:, None]


def held_ranks(positions: Tensor, valid: Tensor | None) -> Tensor:
    """How many tokens of its head are older than each: positions [B, H, N] -> [B, H, N] int64.

    valid: [B, H, N], False where there is no token; such places come last.
    """
    if valid is not None:
        positions = positions.masked_fill(~valid, torch.iinfo(positions.dtype).max)
    order = positions.argsort(-1)
    ranks = torch.arange(order.shape[-1], device=order.device).expand_as(order)
    return torch.empty_like(order).scatter_(-1, order, ranks)


def query_ranks(at: Tensor, positions: Tensor, valid: Tensor | None) -> Tensor:
    """Ranks of queries at positions [B, R] among tokens at positions [B, H, N]: [B, H, R].

    Of a token that is held its own; of one that was let go, that of the last before it.
    """
    before = positions[:, :, None] <= at[:, None, :, None]  # [B, H, R, N]
    if valid is not None:
        before = before & valid[:, :, None]
    return (before.sum(-1) - 1).clamp_min(0)
