"""Together: a decode step of all layers, which decides what goes once the last of them has attended.

Each layer writes its token into a free slot and attends; which token goes is settled at the end. Nothing is
committed before that: a step that is cut short leaves what was held as it was, and the next one writes into
the same free slots.

Two forms of the same step. *Eager*: every head is full, the counts are the host's, no mask is needed, and as
many layers as fit are scored in one go. *Static*: every count is a tensor, so that the step has one graph
whatever is held and no host ever waits for a device; layers are scored one by one, by tensors that do not
overlap, as a compiler wants them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from modicum.kernels import dispatch as kernels
from modicum.kv import admission
from modicum.kv.bank import Bank, Candidates
from modicum.kv.choice import worst
from modicum.kv.group import Group, Place
from modicum.kv.joining import why_apart
from modicum.kv.policy import ALL
from modicum.kv.scoring import level, observed
from modicum.kv.span import Span
from modicum.kv.stack import joined

if TYPE_CHECKING:
    from modicum.kv.layer import BudgetLayer


_SCRATCH = 64 * 2**20  # bytes of intermediate results while some layers are scored together


class Together:
    """The decode steps of a cache.

    Args:
        layers: those under the budget.

    Raises:
        LookupError: their arenas do not lie side by side.
    """

    def __init__(self, layers: Sequence[BudgetLayer]) -> None:
        self.layers = list(layers)
        first = self.layers[0]
        self.shared, self.setting, self.policy = first.shared, first.setting, first.setting.policy
        self.rows, self.device, self.group = first.batch, first.device, first.shape.group
        kinds: dict[tuple[int, bool], list[tuple[int, Bank]]] = {}
        for index, layer in enumerate(self.layers):
            for bank in layer.banks:
                kinds.setdefault((bank.arena.capacity, bank.streaming), []).append((index, bank))
        self.groups = []
        for found in kinds.values():
            banks = [bank for _, bank in found]
            tile = self._tile(banks[0], len(kinds))
            self.groups.append(Group(banks, [index for index, _ in found], self.rows, tile))
        self.places: list[list[Place]] = [[] for _ in self.layers]
        for group in self.groups:
            for index, place in group.places():
                self.places[index].append(place)
        for places in self.places:
            places.sort(key=lambda place: place.bank.heads.start)
        self.queries: Tensor | None = None  # [L·b, H, G, R, Dk] the rings of all layers
        self.asked_at: Tensor | None = None  # [L·b, R]
        rings = [layer.ring for layer in self.layers if layer.ring is not None]
        if rings:
            queries = joined([ring.queries for ring in rings])
            self.queries = queries.view(-1, first.shape.kv_heads, *queries.shape[1:])
            self.asked_at = joined([ring.positions[:, None] for ring in rings])
        self.clock = torch.zeros(self.rows, dtype=torch.int64, device=self.device)
        """[b] tokens seen."""
        self.columns = torch.zeros((), dtype=torch.int64, device=self.device)
        """Columns seen, pads included."""
        self.next = torch.zeros(self.rows, dtype=torch.int64, device=self.device)
        """[b] where the next query goes in the rings."""
        self.kernels = kernels.on(self.device) and first.store.has_kernel
        self.static = False
        self.entered = False
        self._marked = False
        self._fresh: list[Tensor] = []  # the step's queries, where a policy reads those of its call
        self._given: list[tuple[Tensor, Tensor]] = []  # the step's key and value in each layer, likewise
        self._scores: Sequence[Tensor] = ()  # [b, H, 1] of each layer's newcomers, where there is a scorer

    @classmethod
    def of(cls, layers: Sequence[BudgetLayer]) -> Together | None:
        """The steps of these layers; None where they cannot go together."""
        try:
            return None if why_apart(layers) else cls(layers)
        except LookupError:
            return None

    def _tile(self, bank: Bank, kinds: int) -> int:
        """Banks like this one to be scored at a time."""
        if not bank.streaming and (self.policy.layerwise or (self.policy.query_rows and kinds > 1)):
            return 1
        b, h, slots = bank.arena.keys.shape[:3]
        wide = self.layers[0].shape.key_dim if bank.arena.keys.dtype != torch.float32 else 1
        rows = max(1, self.policy.query_rows) * self.group
        return max(1, _SCRATCH // (4 * b * h * slots * max(wide, rows)))

    # -- coming in and going out
    # ------------------------------------------------------------------------------------------

    def fits(self) -> bool:
        """Whether it is still as it was built: the arenas lie where they did."""
        return all(
            place.bank.arena.keys.data_ptr() == place.keys.data_ptr()
            for places in self.places
            for place in places
        )

    @property
    def settled(self) -> bool:
        """Whether the arenas' free slots are still those of here."""
        return self.entered and all(
            place.bank.arena.hole is not None for places in self.places for place in places
        )

    @property
    def full(self) -> bool:
        """Whether every head of every row holds what it may."""
        return all(
            n == bank.arena.capacity for group in self.groups for bank in group.banks for n in bank.arena.live
        )

    def enter(self, static: bool) -> None:
        """Take over from the arenas."""
        for group in self.groups:
            group.enter()
        for places in self.places:
            for place in places:
                # The very tensors that a compiled step has seen before.
                place.bank.arena.hole = place.alone.hole
                if place.alone.counted:
                    self._sum(place.alone)
        self.clock.copy_(torch.tensor(self.layers[0].row_seen))
        self.columns.fill_(self.layers[0].seen)
        ring = self.layers[0].ring
        if ring is not None:
            self.next.fill_(ring.next)
        self.static, self.entered = static, True
        if self.device.type == "cuda" and not self._marked:
            self._mark()

    def _sum(self, span: Span) -> None:
        """A policy's sums over what each head holds, from scratch."""
        keys, values = span.decoded()
        slot = torch.arange(span.capacity + 1, device=self.device)
        full = (span.live == span.capacity)[:, None, None]
        # In a full head any slot may be the free one, elsewhere it is the one after those in use.
        there = torch.where(full, slot != span.hole[..., None], slot < span.live[:, None, None])
        parts = self.policy.summand(keys.float(), values.float(), span.state)
        span.sums.copy_(torch.where(there[..., None], parts, 0.0).sum(2, dtype=span.sums.dtype))

    def _mark(self) -> None:
        """Tell torch.compile that these stay where they are, or it captures nothing that writes there."""
        found: list[Tensor] = [self.clock, self.columns, self.next]
        found += [group.live for group in self.groups]
        for layer, places in zip(self.layers, self.places, strict=True):
            found += [] if layer.ring is None else [layer.ring.queries, layer.ring.positions]
            for span in (place.alone for place in places):
                found += [span.keys, span.values, span.positions, span.state, span.sums, span.tally]
                found += [span.hole]
                found += [] if span.virtual is None else list(span.virtual.tensors.values())
        for tensor in found:
            # Another cache has other addresses: its graph is captured anew, not compiled anew.
            torch._dynamo.mark_static_address(tensor, guard=False)
        self._marked = True

    def leave(self) -> None:
        """Hand over to the arenas and the layers what a static run has changed."""
        if not self.entered:
            return
        self.entered = False
        if not self.static:
            return
        self.static = False
        seen, columns = tuple(self.clock.tolist()), int(self.columns)
        for group in self.groups:
            live = group.live.tolist()
            for bank in group.banks:
                bank.arena.live = list(live)
        for layer in self.layers:
            layer.row_seen, layer.seen = seen, columns
            if layer.ring is not None:
                layer.ring.sort(self.next)

    # -- a step
    # -----------------------------------------------------------------------------------------------------

    def attend(
        self,
        index: int,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Tensor | None,
        scaling: float,
        softcap: float | None,
    ) -> Tensor:
        """One token of every row in one layer: query [b, Hq, 1, Dk], key [b, H, 1, Dk], value, mask [b, n]
        or None, of which the last column is looked at -> [b, 1, Hq, Dv].
        """
        layer, places = self.layers[index], self.places[index]
        b, h = key.shape[:2]
        grouped = query.reshape(b, h, -1, query.shape[-1])
        if index == 0:
            self._fresh, self._given = [], []
        taken = None if mask is None or not self.static else mask[:, -1].to(torch.bool)
        if layer.ring is not None:
            self._note(layer, grouped)
        elif self.policy.query_rows == ALL:
            self._fresh.append(grouped)
        if self.shared.scorer is not None:
            self._given.append((key, value))
        stored = layer.store.keys.encode(key), layer.store.values.encode(value)
        outs = []
        for place in places:
            heads = place.bank.heads
            q, k, v = (x if len(places) == 1 else x[:, heads] for x in (grouped, *stored))
            outs.append(self._in_bank(place, q, k, v, taken, scaling, softcap))
        out = outs[0] if len(outs) == 1 else torch.cat(outs, dim=1)
        if index == len(self.layers) - 1:
            self._finish(taken, scaling, softcap)
        return out.reshape(b, 1, -1, out.shape[-1])

    def _in_bank(
        self,
        place: Place,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        taken: Tensor | None,
        scaling: float,
        softcap: float | None,
    ) -> Tensor:
        """query [b, h, G, Dk], key [b, h, 1, Ck] and value as they lie in their slots -> [b, h, G, Dv]."""
        bank, span = place.bank, place.alone
        store = bank.store
        if self.static:
            span.put(span.keys, span.hole, key.squeeze(2))
            span.put(span.values, span.hole, value.squeeze(2))
        else:
            place.keys.index_copy_(0, place.at, key.reshape(-1, key.shape[-1]))
            place.values.index_copy_(0, place.at, value.reshape(-1, value.shape[-1]))
        if self.kernels:
            fresh = store.keys.decode(key, bank.dtype), store.values.decode(value, bank.dtype)
            return self._by_kernel(place, query, fresh, taken, scaling, softcap)
        keys, values = span.decoded()
        valid = None
        if self.static:
            slot = torch.arange(span.capacity + 1, device=self.device)
            valid = slot <= span.live[:, None, None]  # [b, 1, S]
        return bank.answer(query, keys, values, scaling, softcap, valid)

    def _by_kernel(
        self,
        place: Place,
        query: Tensor,
        fresh: tuple[Tensor, Tensor],
        taken: Tensor | None,
        scaling: float,
        softcap: float | None,
    ) -> Tensor:
        """Attend by a kernel that makes what the score needs on its way, as it reads the keys anyhow."""
        span, policy, probe = place.alone, self.policy, None
        if span.counted:
            keys, values = (x.float() for x in fresh)
            state = policy.token_state(keys, values, self.group, None)
            if state.shape[-1]:
                span.put(span.state, span.hole, state.squeeze(2))
            self._add(span, (keys, values, state), taken, 1)
            probe = policy.probe(span.sums)
        mean = span.virtual
        got = kernels.decode(
            query,
            span.keys,
            span.values,
            (span.live + 1).to(torch.int32)[:, None].expand(span.keys.shape[:2]),
            scaling,
            form=place.bank.store.name,
            softcap=softcap,
            probe=probe,
            logits=not span.streaming and policy.query_rows in (1, ALL) and policy.kept_queries <= 1,
            virtual=None if mean is None else (mean.key, mean.value, mean.count),
        )
        place.dots, place.logits = got.dots, got.logits
        return got.out

    def _note(self, layer: BudgetLayer, query: Tensor) -> None:
        """Keep a step's queries [b, H, G, Dk] in the layer's ring."""
        ring = layer.ring
        assert ring is not None
        if self.static:
            b, h, g, d = query.shape
            where = self.next[:, None, None, None, None].expand(b, h, g, 1, d)
            ring.queries.scatter_(3, where, query.unsqueeze(3))
        else:
            ring.queries[:, :, :, ring.next] = query

    def _finish(self, taken: Tensor | None, scaling: float, softcap: float | None) -> None:
        """All layers have attended: take the tokens in, and let one go in every head that is full."""
        if self.static:
            spans = [place.alone for places in self.places for place in places]
        else:
            self._check()
            spans = [span for group in self.groups for span in group.spans]
        self._note_positions(taken)
        self._score_newcomers()
        for span in spans:
            self._take(span)
            self._choose(span, taken, scaling, softcap)
        for group in self.groups:
            if self.static:
                full = group.live == group.banks[0].arena.capacity
                group.live.add_(~full if taken is None else ~full & taken)
            else:
                torch.add(group.hole, group.first, out=group.at)
        self.clock.add_(1 if taken is None else taken)
        self.columns.add_(1)
        self._fresh, self._given, self._scores = [], [], ()
        if self.shared.scorer is not None:
            self.shared.scorer.forget()
        for places in self.places:
            for place in places:
                place.dots = place.logits = None
        if not self.static:
            self._tell()

    def _check(self) -> None:
        """Raise if a key is no number, before anything has changed; only a CPU is asked."""
        if self.device.type != "cpu":
            return
        spans = (span for group in self.groups for span in group.spans)
        if all(math.isfinite(span.new_keys().sum().item()) for span in spans):
            return
        for layer, places in zip(self.layers, self.places, strict=True):
            for place in places:
                admission.check_finite(layer.setting.layer, place.alone.new_keys()[None])

    def _score_newcomers(self) -> None:
        """By a regression, where the policy reads one: of all layers at once, as each is little work."""
        scorer = self.shared.scorer
        if scorer is None:
            return
        layers = tuple(layer.setting.layer for layer in self.layers)
        keys, values = zip(*self._given, strict=True)
        self._scores = scorer.scores_of(layers, keys, values, self.clock[:, None]).unbind()

    def _note_positions(self, taken: Tensor | None) -> None:
        """Where the step's queries stand."""
        ring = self.layers[0].ring
        if ring is None or self.asked_at is None:
            return
        now, room = self.clock.to(ring.positions.dtype), ring.positions.shape[1]
        if not self.static:
            self.asked_at.view(-1, self.rows, room)[:, :, ring.next] = now
            return
        if taken is not None:
            now = now.masked_fill(~taken, -1)  # a pad asks nothing; the next query comes in its place
        for layer in self.layers:
            assert layer.ring is not None
            layer.ring.positions.scatter_(1, self.next[:, None], now[:, None])
        self.next.copy_((self.next + (1 if taken is None else taken.to(torch.int64))) % room)

    def _take(self, span: Span) -> None:
        """Positions of the newcomers, and the policy's numbers for them."""
        position = span.per_row(self.clock).to(torch.int32)[:, None].expand(span.hole.shape)
        span.put(span.positions, span.hole, position)
        if span.state.shape[-1] and not self._early(span):
            key, value, _ = span.at(span.hole)
            span.put(span.state, span.hole, self.policy.token_state(key, value, self.group, None).squeeze(2))

    def _early(self, span: Span) -> bool:
        """Whether a newcomer enters the policy's sums before it is attended to."""
        return self.kernels and span.counted

    def _choose(self, span: Span, taken: Tensor | None, scaling: float, softcap: float | None) -> None:
        """Observe, score, and make the slot of the token that goes the next free one."""
        policy = self.policy
        if span.counted and not self._early(span):
            self._add(span, span.at(span.hole), taken, 1)
        view = self._view(span, taken, scaling, softcap)
        if not span.streaming:
            state = observed(policy, view)
            if state is not None and state is not view.state:
                span.state.copy_(state)
        ranking = level(view, None if span.streaming else policy.ranking(view), policy)
        if self.kernels:
            held, sinks = (span.per_row(span.live) + 1).to(torch.int32), self.setting.budget.n_sink
            victim = kernels.worst(ranking, view.positions, view.limit.flatten(), sinks, held)
        else:
            victim = worst(view.guard(ranking), view.positions)
        goes = None
        if self.static:
            full = span.live == span.capacity  # [b], for a span of one bank
            goes = full if taken is None else full & taken
        if span.virtual is not None:
            key, value, _ = span.at(victim)
            gone = (
                torch.ones_like(victim, dtype=torch.bool)
                if goes is None
                else goes[:, None].expand(victim.shape)
            )
            span.virtual.fold(key, value, gone.unsqueeze(2))
        if span.counted:
            self._add(span, span.at(victim), goes, -1)
        if goes is None:
            span.hole.copy_(victim)
            return
        grows = ~full if taken is None else ~full & taken
        span.hole.copy_(torch.where(goes[:, None], victim, span.hole + grows[:, None]))

    def _view(self, span: Span, taken: Tensor | None, scaling: float, softcap: float | None) -> Candidates:
        first = span.layers[0]
        made = [place for layer in span.layers for place in self.places[layer] if place.bank in span.banks]
        heads, slots = span.positions.shape[1:]
        dots = [place.dots.view(-1, heads, slots) for place in made if place.dots is not None]
        logits = [x.logits.view(-1, heads, self.group, 1, slots) for x in made if x.logits is not None]
        scores = None
        if self._scores:
            each = zip(span.layers, span.banks, strict=True)
            parts = [self._scores[layer][bank.rows, bank.heads] for layer, bank in each]
            joint = parts[0] if len(parts) == 1 else torch.cat([x.flatten() for x in parts])
            scores = joint.reshape(-1, heads, 1)
        valid = None
        if self.static:
            slot = torch.arange(slots, device=self.device)
            valid = (slot <= span.live[:, None, None]).expand(-1, heads, -1)
        queries, at = self._asked(span, taken)
        seen = span.per_row(self.clock) + 1
        return Candidates(
            parts=span.decoded,  # type: ignore[arg-type]  # made when read
            positions=span.positions,
            valid=valid,
            protected=None,  # type: ignore[arg-type]  # worked out when read
            seen=seen,
            capacity=span.capacity,
            layer=self.layers[first].setting.layer,
            layers=self.setting.layers,
            scaling=scaling,
            softcap=softcap,
            queries=queries,
            query_positions=at,
            state=span.state if span.state.shape[-1] else None,
            newcomers=1,
            arrived=None if taken is None else span.per_row(taken.to(torch.int64)),
            newcomer_scores=scores,
            newcomer_slots=None if scores is None else span.hole.unsqueeze(-1),
            sums=span.sums if span.counted else None,
            tally=span.tally if span.tally.shape[-1] else None,
            rotary=self.shared.rotary,
            dots=None if not dots else dots[0] if len(dots) == 1 else torch.cat(dots),
            handed=None if not logits else logits[0] if len(logits) == 1 else torch.cat(logits),
        ).guarded((seen - self.setting.recent).to(torch.int32)[:, None, None], self.setting.budget.n_sink)

    def _asked(self, span: Span, taken: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
        """The queries that the policy reads: [R, H, G, r, Dk], and their positions [R, r]."""
        if span.streaming:
            return None, None
        first, last = span.layers[0], span.layers[-1]
        if self.queries is not None:
            assert self.asked_at is not None
            ring = self.layers[first].ring
            if first == last and ring is not None:
                return ring.queries, ring.positions
            # Layers with a group of their own are looked at one by one, so these are a run.
            run = slice(first * self.rows, (last + 1) * self.rows)
            return self.queries[run], self.asked_at[run]
        if self.policy.query_rows == ALL:
            fresh = [self._fresh[layer] for layer in span.layers]
            query = fresh[0] if len(fresh) == 1 else torch.cat(fresh)
            at = self.clock if taken is None else self.clock.masked_fill(~taken, -1)  # a pad asks nothing
            return query.unsqueeze(3), span.per_row(at)[:, None]
        return None, None

    def _add(self, span: Span, token: tuple[Tensor, Tensor, Tensor], which: Tensor | None, sign: int) -> None:
        """Take a token of each head into the policy's sums, or out: key, value, state [R, H, 1, …]."""
        part = self.policy.summand(*token).squeeze(2)  # [R, H, F]
        if which is not None:
            part = part.masked_fill(~which[:, None, None], 0.0)
        span.sums.add_(part, alpha=sign)

    def _tell(self) -> None:
        """The host's own counts."""
        first = self.layers[0]
        seen, row_seen = first.seen + 1, tuple(n + 1 for n in first.row_seen)
        for layer in self.layers:
            layer.seen, layer.row_seen = seen, row_seen
            if layer.ring is not None:
                layer.ring.next = (layer.ring.next + 1) % layer.ring.queries.shape[3]
