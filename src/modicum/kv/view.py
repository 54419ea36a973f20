"""View: what a policy sees when it scores."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import reduce
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from modicum.errors import PolicyError
from modicum.kernels import dispatch as kernels
from modicum.kv.turning import Rotary

_TILE = 4096  # tokens turned to fp32 at a time: scoring scratch stays small beside the cache
_ROW_BYTES = 32 * 2**20  # attention rows made at a time


@dataclass(frozen=True)
class Replay:
    """Tokens of the call that are read again after it, m' columns, and are not held."""

    queries: Tensor
    """[B, H, G, m', Dk]"""
    keys: Tensor
    """[B, H, m', Dk]"""
    valid: Tensor | None
    """[B, m'] bool, False for a pad; None where there is none."""
    residual_norms: Tensor | None = None
    """[B, m'] fp32: L2 norms of the hidden states that the layer is given, if the policy needs them."""


@dataclass
class View:
    """The candidates among which a policy chooses: B rows, H KV heads of G query heads each, N tokens per
    head.

    The tokens lie in parts (the arena, then the chunk that has just come), in no particular order:
    `positions` tells where each stood in its row. Scores are in fp32 whatever the dtype of the cache.
    """

    parts: tuple[tuple[Tensor, Tensor], ...]
    """Pairs of keys [B, H, n_i, Dk] (post-RoPE) and values [B, H, n_i, Dv]; the n_i add up to N."""
    positions: Tensor
    """[B, H, N] int32 or int64: absolute position in the row (pads not counted), -1 where there is no
    token.
    """
    valid: Tensor | None
    """[B, H, N] bool, False where there is no token; None when there is one everywhere."""
    protected: Tensor
    """[B, H, N] bool: sinks and recent tokens, which the engine keeps whatever their score."""
    seen: Tensor
    """[B] int64: tokens each row has seen, this call's included."""
    capacity: int
    """Slots a head may hold between calls (b)."""
    layer: int
    layers: int
    scaling: float
    """Factor on q·k in the model's attention, usually 1/sqrt(Dk)."""
    softcap: float | None = None
    queries: Tensor | None = None
    """[B, H, G, R, Dk]: the queries that the policy asked for (the last R, or all of this call, which may
    follow some of the calls before, see `Policy.kept_queries`), in no order that matters.
    """
    query_positions: Tensor | None = None
    """[B, R] int64: position of each query in its row, -1 for none (a pad, or fewer than R seen)."""
    state: Tensor | None = None
    """[B, H, N, F] fp32: the policy's own numbers per token, as `token_state` gave and `observe` changed
    them.
    """
    newcomers: int = 0
    """How many of the N tokens came with this call, pads included."""
    arrived: Tensor | None = None
    """[B] int64: how many came in each row, pads left out; None where that is `newcomers` in all of them."""
    replay: Replay | None = None
    """The second reading of the call's tokens, if the policy asks for one and the caller gave it."""
    newcomer_scores: Tensor | None = None
    """[B, H, newcomers] fp32: what the model's regression says of them, if the policy needs it."""
    newcomer_slots: Tensor | None = None
    """[B, H, newcomers] int64: where among the N tokens each of them lies."""
    sums: Tensor | None = None
    """[B, H, F] fp64: the policy's sums over the tokens there are, kept from step to step; None where they
    are to be made anew.
    """
    tally: Tensor | None = None
    """[B, H, F] fp64: what the policy adds up over all that it reads, changed in place by `observe`; None
    if it says no width.
    """
    rotary: Rotary | None = None
    """How the model turns queries and keys, if the policy needs it."""
    renumbered: bool = False
    """Whether keys and queries are turned to their ranks among the tokens at hand, not to their positions."""
    plain_queries: Tensor | None = None
    """`queries` before the rotary embedding, where they are renumbered."""
    dots: Tensor | None = None
    """[B, H, N] fp32: the policy's `probe` times each key, where attention has made them on its way."""
    handed: Tensor | None = None
    """[B, H, G, 1, N] fp32: `logits` of a single query, where attention has made them on its way."""
    sink_logits: Tensor | None = None
    """[H, G] learned logits that join every softmax and stand for no token (gpt-oss); None without."""
    output_weight: Tensor | None = None
    """[H, G, Dv, hidden]: slices of the output projection, one per query head; None if the model has none."""

    @property
    def keys(self) -> Tensor:
        """[B, H, N, Dk]; copied into one tensor when there are several parts."""
        return self.parts[0][0] if len(self.parts) == 1 else torch.cat([k for k, _ in self.parts], dim=2)

    @property
    def values(self) -> Tensor:
        """[B, H, N, Dv]; copied into one tensor when there are several parts."""
        return self.parts[0][1] if len(self.parts) == 1 else torch.cat([v for _, v in self.parts], dim=2)

    @property
    def count(self) -> Tensor:
        """[B, H] fp32: tokens there are per head (N where all are valid)."""
        if self.valid is None:
            return torch.full(
                self.positions.shape[:2], float(self.positions.shape[2]), device=self.positions.device
            )
        return self.valid.sum(-1).float()

    @property
    def group(self) -> int:
        """G, query heads per KV head (1 when the policy asked for no queries)."""
        return 1 if self.queries is None else self.queries.shape[2]

    @property
    def asked(self) -> tuple[Tensor, Tensor]:
        """The queries [B, H, G, R, Dk] and their positions [B, R], as the policy's `query_rows` asked for."""
        if self.queries is None or self.query_positions is None:
            raise PolicyError("a policy read attention rows without asking for them: set its `query_rows`")
        return self.queries, self.query_positions

    def masked(self, x: Tensor, fill: float = 0.0) -> Tensor:
        """`x` [B, H, N] with `fill` where there is no token."""
        return x if self.valid is None else x.masked_fill(~self.valid, fill)

    def per_key(self, fn: Callable[[Tensor], Tensor]) -> Tensor:
        """Apply fn: [B, H, n, Dk] fp32 -> [B, H, n, ...] to the keys tile by tile; join along the tokens."""
        return self._per_token(fn, 0)

    def per_value(self, fn: Callable[[Tensor], Tensor]) -> Tensor:
        """Apply fn: [B, H, n, Dv] fp32 -> [B, H, n, ...] to the values tile by tile; join along the
        tokens.
        """
        return self._per_token(fn, 1)

    def sum_keys(self, weights: Tensor) -> Tensor:
        """Σ_j w_j k_j: weights [B, H, ..., N] fp32 -> [B, H, ..., Dk] fp32."""
        return self._weighted_sum(weights, 0)

    def sum_values(self, weights: Tensor, origin: Tensor | None = None) -> Tensor:
        """Σ_j w_j (v_j - origin), the origin [B, H, 1, Dv]: weights [B, H, ..., N] -> [B, H, ...,
        Dv]; fp32.
        """
        return self._weighted_sum(weights, 1, origin)

    def keys_at(self, index: Tensor, rows: slice = slice(None)) -> Tensor:
        """Keys of the tokens in slots index [b, H, M] of these rows: [b, H, M, Dk] fp32."""
        return self._in_slots(index, 0, rows)

    def values_at(self, index: Tensor, rows: slice = slice(None)) -> Tensor:
        """Values of the tokens in slots index [b, H, M] of these rows: [b, H, M, Dv] fp32."""
        return self._in_slots(index, 1, rows)

    def _in_slots(self, index: Tensor, which: int, rows: slice) -> Tensor:
        found, start = None, 0
        for part in self.parts:
            x = part[which][rows]
            n = x.shape[2]
            local = (index - start).clamp(0, n - 1).unsqueeze(-1).expand(-1, -1, -1, x.shape[-1])
            here = x.gather(2, local).float()
            found = here if found is None else torch.where((index >= start).unsqueeze(-1), here, found)
            start += n
        assert found is not None
        return found

    def dot_values(self, vectors: Tensor) -> Tensor:
        """Each of M vectors times each value: [B, H, M, Dv] fp32 -> [B, H, M, N] fp32."""
        return self._dots(vectors, 1)

    def _tiles(self, which: int) -> Iterator[Tensor]:
        for part in self.parts:
            x = part[which]
            whole = x.shape[2] <= _TILE  # decode's case: spared the split
            for tile in (x,) if whole else torch.split(x, _TILE, dim=2):
                yield tile.float()

    def _per_token(self, fn: Callable[[Tensor], Tensor], which: int) -> Tensor:
        done = [fn(tile) for tile in self._tiles(which)]
        return done[0] if len(done) == 1 else torch.cat(done, dim=2)

    def dot_keys(self, vectors: Tensor) -> Tensor:
        """Each of M vectors times each key: [B, H, M, Dk] fp32 -> [B, H, M, N] fp32."""
        return self._dots(vectors, 0)

    def _dots(self, vectors: Tensor, which: int) -> Tensor:
        b, h, m, dim = vectors.shape
        flat = vectors.reshape(b * h, m, dim)
        # Three dimensions and vectors @ kT: half the price of k @ vectorsT for few vectors, in decode.
        done = [torch.bmm(flat, tile.reshape(b * h, -1, dim).transpose(1, 2)) for tile in self._tiles(which)]
        return (done[0] if len(done) == 1 else torch.cat(done, dim=2)).view(b, h, m, -1)

    def _weighted_sum(self, weights: Tensor, which: int, origin: Tensor | None = None) -> Tensor:
        b, h = weights.shape[:2]
        flat = weights.reshape(b * h, -1, weights.shape[-1])  # [B·H, M, N]
        total, start = None, 0
        for tile in self._tiles(which):
            n, dim = tile.shape[2:]
            part = flat if n == flat.shape[2] else flat[..., start : start + n]
            part = torch.bmm(part, (tile if origin is None else tile - origin).reshape(b * h, n, dim))
            total = part if total is None else total + part
            start += n
        assert total is not None
        return total.view(*weights.shape[:-1], total.shape[-1])

    def logits(self, first: int = 0, last: int | None = None, gain: Tensor | None = None) -> Tensor:
        """z = scaling · q·k of queries first:last, soft-capped where the model does: [B, H, G, R, N] fp32.

        gain: [B, R] or [B, H, R], a factor on each query's z. -inf where there is no token, and where
        the token came after the query.
        """
        queries, at = self.asked
        if self.handed is None:
            q = queries[:, :, :, first:last].float().flatten(2, 3) * self.scaling  # [B, H, G*R, Dk]
            z = torch.unflatten(self.dot_keys(q), 2, (self.group, -1))  # [B, H, G, R, N]
            if self.softcap is not None:
                z = self.softcap * torch.tanh(z / self.softcap)
        else:
            z = self.handed
        if gain is not None:
            z = z * (gain if gain.dim() == 3 else gain.unsqueeze(1))[:, :, None, first:last, None]
        unseen = self.positions[:, :, None, None, :] > at[:, None, None, first:last, None]
        if self.valid is not None:
            unseen = unseen | ~self.valid[:, :, None, None, :]
        return z.masked_fill(unseen, -math.inf) if z is self.handed else z.masked_fill_(unseen, -math.inf)

    def rows(self, gain: Tensor | None = None, first: int = 0, last: int | None = None) -> Tensor:
        """Attention rows softmax(gain · z) of queries first:last over the tokens at hand: [B, H, G,
        R, N] fp32. With sinks a row adds up to less than 1.

        A row without a query, or of a query before all tokens at hand, is zero.
        """
        z = self.logits(first, last, gain)
        if self.sink_logits is None:
            rows = torch.softmax(z, dim=-1)
        else:
            sink = self._sinks_of(gain, first, last)
            rows = torch.exp(z - torch.logaddexp(torch.logsumexp(z, -1), sink)[..., None])
        _, at = self.asked
        oldest = self.masked(self.positions, torch.iinfo(self.positions.dtype).max).amin(-1)  # [B, H]
        blind = at[:, None, first:last] < oldest[:, :, None]  # [B, H, R]
        return rows.masked_fill_(blind[:, :, None, :, None], 0.0)

    def _sinks_of(self, gain: Tensor | None, first: int, last: int | None) -> Tensor:
        """The sinks' logits beside those of queries first:last: [1|B, 1|H, G, R|1], fp32."""
        assert self.sink_logits is not None
        sink = self.sink_logits.float()[None, :, :, None]
        if gain is None:
            return sink
        return sink * (gain if gain.dim() == 3 else gain.unsqueeze(1))[:, :, None, first:last]

    def row_tiles(self, gain: Tensor | None = None) -> Iterator[Tensor]:
        """`rows` in tiles of queries, so that the full map never stands in memory."""
        b, h, g, r = self.asked[0].shape[:4]
        tile = max(1, _ROW_BYTES // (4 * b * h * g * self.positions.shape[2]))
        for first in range(0, r, tile):
            yield self.rows(gain, first, min(r, first + tile))

    def row_sums(self, gain: Tensor | None = None, over: Literal["sum", "max"] = "sum") -> Tensor:
        """Sum (or largest) of `rows` over the queries: [B, H, G, N] fp32."""
        queries, at = self.asked
        if kernels.on(queries.device) and self.handed is None and self.sink_logits is None:
            keys = [key for key, _ in self.parts]
            positions = self.masked(self.positions, -1)
            return kernels.row_sums(queries, at, keys, positions, self.scaling, self.softcap, gain, over)
        tiles = self.row_tiles(gain)
        if over == "sum":
            return reduce(torch.add, (rows.sum(3) for rows in tiles))
        return reduce(torch.maximum, (rows.amax(3) for rows in tiles))

    def pool(
        self, x: Tensor, kernel: int, kind: Literal["avg", "max"], where: Tensor | None = None
    ) -> Tensor:
        """Pool x [B, H, N] (or [B, H, G, N]) over neighbours in the order of positions; stride 1,
        same length.

        Tokens outside `where` [B, H, N] (default: all there are) neither give nor take: their own x
        comes back. The edges average over what is there, not over padding.
        """
        if kernel == 1:
            return x
        member = self.valid if where is None else (where if self.valid is None else where & self.valid)
        key = (
            self.positions
            if member is None
            else self.positions.masked_fill(~member, torch.iinfo(self.positions.dtype).max)
        )
        order = key.argsort(dim=-1)  # members first, oldest first
        inside = None if member is None else member.gather(-1, order)
        if x.dim() == 4:
            order = order.unsqueeze(2).expand_as(x)
            inside = None if inside is None else inside.unsqueeze(2).expand_as(x)
        line = x.gather(-1, order)
        flat = line.flatten(0, -2).unsqueeze(1)  # [M, 1, N]
        if kind == "avg":
            if inside is None:
                pooled = F.avg_pool1d(flat, kernel, 1, kernel // 2, count_include_pad=False)
            else:
                weight = inside.flatten(0, -2).unsqueeze(1).to(flat.dtype)
                number = F.avg_pool1d(weight, kernel, 1, kernel // 2)
                # filled, not multiplied: what stands outside need not be finite
                flat = flat.masked_fill(weight == 0, 0.0)
                pooled = F.avg_pool1d(flat, kernel, 1, kernel // 2) / number.clamp_min(1e-9)
        else:
            if inside is not None:
                flat = flat.masked_fill(~inside.flatten(0, -2).unsqueeze(1), -math.inf)
            pooled = F.max_pool1d(flat, kernel, 1, kernel // 2)
        pooled = pooled.reshape(line.shape)
        if inside is not None:
            pooled = torch.where(inside, pooled, line)
        return torch.empty_like(x).scatter_(-1, order, pooled)
