"""Bank: the rows and KV heads of a layer that share one arena, and what is done with each piece of a call."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from modicum.errors import PolicyError
from modicum.kernels import dispatch as kernels
from modicum.kv import attend, compensation, turning
from modicum.kv.arena import Arena
from modicum.kv.budget import Budget
from modicum.kv.call import Piece
from modicum.kv.choice import best, worst
from modicum.kv.policy import Policy
from modicum.kv.scoring import level, observed
from modicum.kv.stack import Stack
from modicum.kv.store import Store
from modicum.kv.turning import Rotary, Turning
from modicum.kv.view import Replay, View

_INFINITY = torch.tensor(math.inf)  # a tensor costs less than a number that becomes one at each step


@dataclass
class Virtual:
    """What was let go, as one token per head: the running means of its keys and values, and how many
    there were.
    """

    key: Tensor
    """[B, H, Dk] fp32"""
    value: Tensor
    """[B, H, Dv] fp32"""
    count: Tensor
    """[B, H] fp32"""

    @staticmethod
    def parts(key_dim: int, value_dim: int) -> dict[str, tuple[tuple[int, ...], torch.dtype, float]]:
        """What a `Stack` of them holds for each pair of a row and a head."""
        wide = torch.float32
        return {"key": ((key_dim,), wide, 0), "value": ((value_dim,), wide, 0), "count": ((), wide, 0)}

    @classmethod
    def make(
        cls, rows: int, heads: int, key_dim: int, value_dim: int, device: torch.device, stack: Stack | None
    ) -> Virtual:
        """Empty ones, in the stack's room or their own."""
        stack = stack or Stack(rows * heads, cls.parts(key_dim, value_dim), device)
        return cls(**stack.take(rows, heads))

    def rows(self, index: Tensor, stack: Stack | None) -> Virtual:
        """Rows become rows[index]; as many stay in their place, others move into the stack's room."""
        if len(index) == self.key.shape[0]:
            for t in self.tensors.values():
                t.copy_(t.index_select(0, index))
            return self
        heads, device = self.key.shape[1], self.key.device
        other = Virtual.make(len(index), heads, self.key.shape[-1], self.value.shape[-1], device, stack)
        for old, new in zip(self.tensors.values(), other.tensors.values(), strict=True):
            torch.index_select(old, 0, index, out=new)
        return other

    @property
    def tensors(self) -> dict[str, Tensor]:
        return {"virtual_key": self.key, "virtual_value": self.value, "virtual_count": self.count}

    @property
    def nbytes(self) -> int:
        return sum(t.nbytes for t in self.tensors.values())

    def join(
        self,
        query: Tensor,
        out: Tensor,
        lse: Tensor,
        scaling: float,
        softcap: float | None,
        key: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Attention and log-sum-exp with this token's share: query [B, H, M, Dk], out [B, H, M, Dv], lse
        [B, H, M]. key [B, H, Dk]: its key, if that is not as it is kept.
        """
        mean = self.key if key is None else key
        logit = compensation.virtual_logit(query, mean, self.count, scaling, softcap)
        return compensation.merge(out, lse, self.value, logit), torch.logaddexp(lse.to(logit.dtype), logit)

    def fold(self, keys: Tensor, values: Tensor, mask: Tensor) -> None:
        """Take in, in place, the tokens of keys [B, H, n, Dk] and values where mask [B, H, n] is True."""
        new = compensation.fold(self.key, self.value, self.count, keys, values, mask)
        for old, now in zip(self.tensors.values(), new, strict=True):
            old.copy_(now)


@dataclass(frozen=True)
class Setting:
    """What a layer's banks have in common."""

    policy: Policy
    budget: Budget
    layer: int
    layers: int

    @property
    def recent(self) -> int:
        return max(self.budget.recent, self.policy.window)


@dataclass
class Moment:
    """What the attention of one piece was handed, for a bank's rows and heads."""

    piece: Piece
    rows: slice
    scaling: float
    softcap: float | None
    queries: Tensor | None
    """[B, H, G, R, Dk] as the policy asked for them"""
    query_positions: Tensor | None
    """[B, R]"""
    output_weight: Tensor | None
    group: int
    """Query heads per KV head"""
    stored: tuple[Tensor, Tensor]
    """The piece's keys and values as they are to lie in their slots"""
    num_sink_tokens: int = 0
    turning: Turning | None = None
    """With which queries and keys, not turned yet, are turned to their ranks; None where the model's own
    positions stand.
    """
    sink_logits: Tensor | None = None
    """[H, G] learned logits that join the softmax, of the bank's heads; None for a model without."""
    rotary: Rotary | None = None
    """How the model turns, if the policy needs it."""
    has_replay: bool = False
    """Whether behind the piece's columns come as many more, its tokens read again."""
    residual_norms: Tensor | None = None
    """[B, m] fp32: of the hidden states of the tokens read again, if the policy needs them."""
    token_scores: Tensor | None = None
    """[B, H, m] fp32: of the piece's tokens by the model's regression, if the policy needs them."""


class Candidates(View):
    """A view whose protected tokens, and keys and values that are to be decoded first, are worked out only if
    the policy asks: most do not, and each look has a price.
    """

    _parts: tuple[tuple[Tensor, Tensor], ...] | Callable[[], tuple[Tensor, Tensor]]
    _protected: Tensor | None
    limit: Tensor
    _sinks: int

    def guarded(self, limit: Tensor, sinks: int) -> Candidates:
        """Protect the first `sinks` positions and those from `limit` on."""
        self.limit, self._sinks = limit, sinks
        return self

    @property
    def parts(self) -> tuple[tuple[Tensor, Tensor], ...]:
        """As a view has them. May be set to what makes the only one."""
        if callable(self._parts):
            self._parts = (self._parts(),)
        return self._parts

    @parts.setter
    def parts(self, value: tuple[tuple[Tensor, Tensor], ...] | Callable[[], tuple[Tensor, Tensor]]) -> None:
        self._parts = value

    @property
    def is_single(self) -> bool:
        """Whether there is one part."""
        return callable(self._parts) or len(self._parts) == 1

    @property
    def protected(self) -> Tensor:
        if self._protected is None:
            guarded = (self.positions >= self.limit) | (self.positions < self._sinks)
            self._protected = guarded if self.valid is None else guarded & self.valid
        return self._protected

    @protected.setter
    def protected(self, value: Tensor | None) -> None:
        self._protected = value

    def guard(self, score: Tensor) -> Tensor:
        """Scores [B, H, N] with protected tokens on top and empty places at the bottom."""
        if self._protected is not None or self.valid is not None or not self.is_single:
            score = score.masked_fill(self.protected, math.inf)
            return score if self.valid is None else score.masked_fill(~self.valid, -math.inf)
        score = torch.where(self.positions < self.limit, score, _INFINITY)
        # Sinks never leave the slots that they came into, which are an arena's first.
        score[:, :, : self._sinks] = _INFINITY
        return score


class Bank:
    """Some rows × some KV heads of one layer, in one arena."""

    def __init__(
        self,
        rows: slice,
        heads: slice,
        arena: Arena,
        streaming: bool,
        virtual: Virtual | None,
        store: Store,
        dtype: torch.dtype,
        latent_dim: int = 0,
    ) -> None:
        self.rows = rows
        self.heads = heads
        self.arena = arena
        self.streaming = streaming
        """Sinks and newest tokens only, whatever the policy (RazorAttention's other heads)."""
        self.virtual = virtual
        self.store = store
        self.dtype = dtype
        """Of keys and values as the model gives them."""
        self.latent_dim = latent_dim
        """If not 0, values are the first so many numbers of keys and are not stored (latent attention)."""

    @property
    def nbytes(self) -> int:
        return self.arena.nbytes + (0 if self.virtual is None else self.virtual.nbytes)

    def attend(self, setting: Setting, moment: Moment, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Take a piece in: attend, then evict. query [B, H, G, m, Dk], key [B, H, m, Dk] -> [B, H, G,
        m, Dv].
        """
        if moment.piece.length == 1 and moment.piece.valid is None and not moment.has_replay:
            return self._step(setting, moment, query, key, value)
        out, view = self.look(setting, moment, query, key, value)
        counts = moment.piece.counts[self.rows]
        total = [a + c for a, c in zip(self.arena.live, counts, strict=True)]
        most, slack = self.arena.capacity, setting.budget.evict_every - 1
        # A row that takes one token is in decode, whatever the others take: a batch changes no row.
        live = [t if t <= most else most - slack * (c == 1) for t, c in zip(total, counts, strict=True)]
        if live == total:
            keep = torch.ones_like(view.protected) if view.valid is None else view.valid
        else:
            goal = torch.tensor(live, device=key.device)[:, None]
            keep = best(self.score(setting, view), view.positions, goal)
            fresh = slice(0, moment.piece.length)
            gone = ~keep if view.valid is None else ~keep & view.valid
            self._fold(gone, key[:, :, fresh], value[:, :, fresh])
        self.take(keep, live, moment, view.state)
        return out

    def _step(self, setting: Setting, moment: Moment, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """One token per row: write it, attend, and let one go per head if the head is over its capacity."""
        arena = self.arena
        turned_query, turned = self._turned(moment, query, key)
        state = self._token_state(setting, moment, turned, value)
        slots = None if moment.token_scores is None else arena.next_slots()
        arena.append(*moment.stored, moment.piece.positions[self._line(moment)], state)
        n = arena.used
        valid = arena.valid(n)
        whole = n > arena.capacity  # every slot is taken
        keys, values = self.held(n)
        keys = self._ranked(moment, keys, valid)
        query = turned_query[:, :, :, 0]
        mean, sinks = self._mean(moment), moment.sink_logits
        out = self.answer(query, keys, values, moment.scaling, moment.softcap, valid, mean, sinks)
        if whole or setting.policy.accumulates:
            positions = arena.positions if whole else arena.positions[:, :, :n]
            view = self._view(setting, moment, ((keys, values),), positions, valid, 1)
            view.newcomer_slots = slots
            view.state = arena.state if whole else arena.state[:, :, :n]
            self._observe(setting, view)
            if whole:
                self._evict(setting, view)
        return out.unsqueeze(3)

    def answer(
        self,
        query: Tensor,
        keys: Tensor,
        values: Tensor,
        scaling: float,
        softcap: float | None,
        valid: Tensor | None,
        mean: Tensor | None = None,
        sinks: Tensor | None = None,
    ) -> Tensor:
        """Attend with one token to keys [B, H, n, Dk] and values that are held, and to the virtual token:
        query [B, H, G, Dk], valid [B, 1|H, n] -> [B, H, G, Dv]. mean [B, H, Dk]: the virtual token's key, if
        that is not as it is kept. sinks [H, G]: logits that join the softmax.
        """
        if self.virtual is None and softcap is None and sinks is None and keys.shape[-1] == values.shape[-1]:
            return attend.decode(query, keys, values, scaling, valid)
        mask = None if valid is None else valid[:, :1, None, :]
        out, lse = attend.with_lse(query, keys, values, scaling, mask=mask, softcap=softcap)
        if self.virtual is not None:
            out, lse = self.virtual.join(query, out, lse, scaling, softcap, mean)
        if sinks is None:
            return out
        return attend.with_sinks(out.unsqueeze(3), lse.unsqueeze(3), sinks).squeeze(3)

    def _evict(self, setting: Setting, view: Candidates) -> None:
        """Let one token per head go, or `evict_every` of them, in place."""
        arena = self.arena
        if setting.budget.evict_every == 1 and view.valid is None:
            ranking = None if self.streaming else setting.policy.ranking(view)
            victim = worst(self._guarded(setting, view, ranking), view.positions)
            if self.virtual is not None:
                at = victim[:, :, None, None]
                key, value = (
                    x.gather(2, at.expand(-1, -1, 1, x.shape[-1])) for x in self.held(arena.capacity + 1)
                )
                self.virtual.fold(key, value, torch.ones_like(victim, dtype=torch.bool).unsqueeze(-1))
            arena.drop(victim)
            return
        live = [m if m <= arena.capacity else m - setting.budget.evict_every for m in arena.live]
        count = torch.tensor(live, device=view.positions.device)[:, None]
        keep = best(self.score(setting, view), view.positions, count)
        self._fold(~keep if view.valid is None else ~keep & view.valid)
        arena.absorb(keep, live)

    def look(
        self, setting: Setting, moment: Moment, query: Tensor, key: Tensor, value: Tensor
    ) -> tuple[Tensor, Candidates]:
        """Attend with a piece of several tokens and show the candidates; nothing is stored yet.

        query, key and value have the columns of a replay behind the piece's, if there are any.
        """
        arena, piece = self.arena, moment.piece
        arena.settle()
        n = arena.used
        held_valid = arena.valid(n) if n else None
        held = None
        if n:
            keys, values = self.held(n)
            held = self._ranked(moment, keys, held_valid), values
        query, key = self._turned(moment, query, key)
        fresh_valid = self._fresh_valid(moment)
        if kernels.on(key.device):
            count = None if held_valid is None else torch.tensor(arena.live, device=key.device)
            out, lse = kernels.chunk(
                query, held, count, key, value, fresh_valid, moment.scaling, moment.softcap
            )
        else:
            out, lse = attend.chunk(
                query, held, held_valid, key, value, fresh_valid, moment.scaling, moment.softcap
            )
        if self.virtual is not None:
            b, h, g, m, _ = out.shape
            flat = query.reshape(b, h, g * m, -1), out.reshape(b, h, g * m, -1), lse.reshape(b, h, g * m)
            both = self.virtual.join(*flat, moment.scaling, moment.softcap, self._mean(moment))
            out, lse = both[0].view(out.shape), both[1].view(lse.shape)
        if moment.sink_logits is not None:
            out = attend.with_sinks(out, lse, moment.sink_logits)
        replay, m = None, piece.length
        if moment.has_replay:
            again = None if fresh_valid is None else fresh_valid[:, m:]
            replay = Replay(query[:, :, :, m:], key[:, :, m:], again, moment.residual_norms)
            key, value = key[:, :, :m], value[:, :, :m]
            fresh_valid = None if fresh_valid is None else fresh_valid[:, :m]
        view = self._chunk_view(setting, moment, held, held_valid, key, value, fresh_valid)
        view.replay = replay
        self._observe(setting, view)
        return out, view

    def _fresh_valid(self, moment: Moment) -> Tensor | None:
        """[b, m] which of a piece's columns, and of those of its replay, hold a token; None if all do."""
        valid = moment.piece.valid
        if valid is None:
            return None
        return (torch.cat([valid, valid], dim=1) if moment.has_replay else valid)[self.rows]

    def _turned(self, moment: Moment, query: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
        """A piece's queries [B, H, G, m, Dk] and keys [B, H, m, Dk] at their ranks, after those held."""
        if moment.turning is None:
            return query, key
        length, valid = key.shape[2], self._fresh_valid(moment)
        ranks = turning.fresh_ranks(self.arena.live, length, valid, key.device)[:, None]  # [B, 1, m]
        most = self.arena.used + length
        return moment.turning.grouped(query, ranks, most), moment.turning.to(key, ranks, most)

    def held(self, n: int) -> tuple[Tensor, Tensor]:
        """Keys [B, H, n, Dk] and values of the first slots, in the model's dtype."""
        whole = n > self.arena.capacity  # every slot: a view of it is not asked for
        both = (self.arena.keys, self.arena.values)
        keys, values = both if whole else (x[:, :, :n] for x in both)
        keys = self.store.keys.decode(keys, self.dtype)
        if self.latent_dim:
            return keys, keys[..., : self.latent_dim]
        return keys, self.store.values.decode(values, self.dtype)

    def _ranked(self, moment: Moment, keys: Tensor, valid: Tensor | None) -> Tensor:
        """The first slots' keys [B, H, n, Dk] as attention and policies see them."""
        if moment.turning is None:
            return keys
        n = keys.shape[2]
        return moment.turning.to(keys, turning.held_ranks(self.arena.positions[:, :, :n], valid), n)

    def _asked(self, moment: Moment, positions: Tensor, valid: Tensor | None) -> Tensor | None:
        """The queries that the policy reads, each at the rank of its token among those at hand."""
        if moment.turning is None or moment.queries is None or moment.query_positions is None:
            return moment.queries
        ranks = turning.query_ranks(moment.query_positions, positions, valid)  # [B, H, R]
        return moment.turning.grouped(moment.queries, ranks, positions.shape[2])

    def take(self, keep: Tensor, live: list[int], moment: Moment, state: Tensor | None) -> None:
        """Absorb a piece's kept tokens; keep [B, H, held + m] over the slots in use, then the piece."""
        n = keep.shape[2] - moment.piece.length
        fresh_state = None
        if state is not None and state.shape[-1]:
            self.arena.state[:, :, :n] = state[:, :, :n]
            fresh_state = state[:, :, n:]
        positions = moment.piece.positions[self._line(moment)]
        self.arena.absorb(keep, live, *moment.stored, positions, fresh_state)

    def _chunk_view(
        self,
        setting: Setting,
        moment: Moment,
        held: tuple[Tensor, Tensor] | None,
        held_valid: Tensor | None,
        key: Tensor,
        value: Tensor,
        fresh_valid: Tensor | None,
    ) -> Candidates:
        arena = self.arena
        b, h, m = key.shape[:3]
        n = 0 if held is None else held[0].shape[2]
        fresh = moment.piece.positions[self._line(moment)][:, None].expand(b, h, m)
        positions = fresh if n == 0 else torch.cat([arena.positions[:, :, :n], fresh], dim=2)
        valid = None
        if held_valid is not None or fresh_valid is not None:
            old = positions.new_ones(b, h, n, dtype=torch.bool) if held_valid is None else held_valid
            new = positions.new_ones(b, h, m, dtype=torch.bool)
            new = new if fresh_valid is None else fresh_valid[:, None].expand(b, h, m)
            valid = torch.cat([old, new], dim=2)
            positions = positions.masked_fill(~valid, -1)
        parts = ((key, value),) if held is None else (held, (key, value))
        view = self._view(setting, moment, parts, positions, valid, m)
        if moment.token_scores is not None:
            view.newcomer_slots = torch.arange(n, n + m, device=key.device).expand(b, h, m)
        state = self._token_state(setting, moment, key, value)
        if state is not None:
            view.state = state if n == 0 else torch.cat([arena.state[:, :, :n], state], dim=2)
        return view

    def _token_state(self, setting: Setting, moment: Moment, key: Tensor, value: Tensor) -> Tensor | None:
        """The policy's numbers for new tokens, or None if it keeps none here."""
        if not self.arena.state.shape[-1]:
            return None
        weight = moment.output_weight
        return setting.policy.token_state(key, self.before_projection(value, weight), moment.group, weight)

    def before_projection(self, value: Tensor, weight: Tensor | None) -> Tensor:
        """Values [B, H, m, Dv] in the model's own space where they meet its output projection."""
        if weight is None or not self.store.has_rotated_values:
            return value
        return self.store.values.rotated(value)

    def _line(self, moment: Moment) -> slice:
        """Which lines of the piece's positions are this bank's: one line may stand for all rows."""
        return slice(0, 1) if moment.piece.positions.shape[0] == 1 else self.rows

    def _view(
        self,
        setting: Setting,
        moment: Moment,
        parts: tuple[tuple[Tensor, Tensor], ...],
        positions: Tensor,
        valid: Tensor | None,
        newcomers: int,
    ) -> Candidates:
        piece, whole = moment.piece, len(moment.piece.seen) == len(self.arena.live)
        counts = None
        if piece.valid is not None:
            counts = torch.tensor(piece.counts[self.rows], device=positions.device)
        limit = piece.limit if whole or len(piece.limit) == 1 else piece.limit[self.rows]
        return Candidates(
            parts=parts,
            positions=positions,
            valid=valid,
            protected=None,  # type: ignore[arg-type]  # worked out when read
            seen=piece.seen_tensor if whole else piece.seen_tensor[self.rows],
            capacity=self.arena.capacity,
            layer=setting.layer,
            layers=setting.layers,
            scaling=moment.scaling,
            softcap=moment.softcap,
            queries=self._asked(moment, positions, valid),
            query_positions=moment.query_positions,
            newcomers=newcomers,
            arrived=counts,
            newcomer_scores=moment.token_scores,
            output_weight=moment.output_weight,
            sink_logits=moment.sink_logits,
            tally=self.arena.tally if self.arena.tally.shape[-1] else None,
            rotary=moment.rotary,
            renumbered=moment.turning is not None,
            plain_queries=None if moment.turning is None else moment.queries,
        ).guarded(limit, setting.budget.n_sink)

    def _observe(self, setting: Setting, view: View) -> None:
        state = None if self.streaming else observed(setting.policy, view)
        if state is None or state is view.state:
            return
        assert view.state is not None
        if len(view.parts) == 1 and view.state.data_ptr() == self.arena.state.data_ptr():
            view.state.copy_(state)
        else:
            view.state = state

    def score(self, setting: Setting, view: Candidates) -> Tensor:
        """The policy's scores with protected tokens on top and empty places at the bottom: [B, H, N] fp32."""
        score = None if self.streaming else setting.policy.score(view)
        if score is not None and bool(score.isnan().any()):
            open_to = ~view.protected if view.valid is None else view.valid & ~view.protected
            if bool((score.isnan() & open_to).any()):
                raise PolicyError(f"{setting.policy}: the scores of layer {setting.layer} hold a NaN")
        return self._guarded(setting, view, score)

    def _guarded(self, setting: Setting, view: Candidates, score: Tensor | None) -> Tensor:
        return view.guard(level(view, score, setting.policy))

    def _mean(self, moment: Moment) -> Tensor | None:
        """The virtual token's key [B, H, Dk] where positions are renumbered: right after the sinks, where
        what it stands for was when it left.
        """
        if self.virtual is None or moment.turning is None:
            return None
        rank = torch.full((1, 1, 1), moment.num_sink_tokens, device=self.virtual.key.device)
        return moment.turning.to(self.virtual.key[:, :, None], rank, moment.num_sink_tokens + 1)[:, :, 0]

    def _fold(self, gone: Tensor, key: Tensor | None = None, value: Tensor | None = None) -> None:
        """Fold what is let go into the virtual token; gone [B, H, N] over the first slots, then the fresh
        key [B, H, m, Dk] and value.
        """
        if self.virtual is None:
            return
        v, n = self.virtual, gone.shape[2] - (0 if key is None else key.shape[2])
        parts = [(*self.held(n), gone[:, :, :n])]
        if key is not None and value is not None:
            parts.append((key, value, gone[:, :, n:]))
        for some_keys, some_values, mask in parts:
            v.fold(some_keys, some_values, mask)
