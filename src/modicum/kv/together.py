"""Together: a decode step of all layers, scored in one go once the last has attended.

Each layer writes its token into a free slot and attends; which token goes is settled at the end, for all
layers at once. Nothing is committed before that: a step that is cut short leaves what was held as it was, and
the next one writes into the same free slots.

Two forms, of the same code. *Eager*: every head is full, the counts are the host's, no mask is needed.
*Static*: every count is a tensor, so that the step has one graph whatever is held, and no host ever waits for
a device.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from modicum.kernels import dispatch as kernels
from modicum.kv import admission, attend
from modicum.kv.bank import Bank, Candidates, Virtual
from modicum.kv.choice import worst
from modicum.kv.policy import ALL
from modicum.kv.scoring import compensated, level, observed
from modicum.kv.stack import joined

if TYPE_CHECKING:
    from modicum.kv.layer import BudgetLayer


def why_apart(layers: Sequence[BudgetLayer]) -> str | None:
    """Why the steps of these layers cannot go together; None if they can."""
    policy = layers[0].setting.policy
    if policy.head_shares() is not None:
        return f"{policy} lets heads compete, so that every head of every row has an arena of its own"
    if policy.needs_output_weight:
        return f"{policy} reads the output projection of each layer"
    if any(layer.shape != layers[0].shape for layer in layers):
        return "the model's layers are of unlike shapes"
    kinds = {kind for layer in layers for kind in zip(layer.capacities, layer.streaming, strict=True)}
    ragged = any(len(set(zip(layer.capacities, layer.streaming, strict=True))) > 1 for layer in layers)
    if policy.query_rows and ragged and len(kinds) > 1:
        return f"{policy} reads queries of heads of unlike capacity"
    return None


def why_no_graph(layers: Sequence[BudgetLayer], cache_layers: int) -> str | None:
    """Why the steps of these layers, of so many in the cache, cannot have one graph; None if they can."""
    first = layers[0] if layers else None
    if first is None or len(layers) < cache_layers:
        return "the model has layers with a sliding window, whose caches grow"
    policy, shared = first.setting.policy, first.shared
    if not policy.evicts:
        return f"{policy} never evicts, so its steps grow: use transformers' StaticCache"
    if (apart := why_apart(layers)) is not None:
        return apart
    if not policy.traceable:
        return f"{policy} decides by what it finds in its scores"
    if first.setting.budget.evict_every > 1:
        return "evict_every is above 1, so not all steps are alike"
    if shared.turning is not None:
        return "positions are renumbered, which sorts them anew at each step"
    if shared.spread:
        return "the model lies on several devices"
    return None


_SCRATCH = 64 * 2**20  # bytes of intermediate results while some layers are scored together


@dataclass
class Place:
    """Where a bank's newcomers go."""

    bank: Bank
    group: Group
    at: Tensor
    """[b·h] index of each head's free slot among the bank's b·h·S: a view of its group's."""
    keys: Tensor
    """[b·h·S, Ck], the bank's, as `at` counts them."""
    values: Tensor
    state: Tensor
    dots: Tensor | None = None
    """What the attention of this step has made on its way: `View.dots`, [b, h, S]."""
    logits: Tensor | None = None
    """[b, h, G, S]"""


class Group:
    """The banks of all layers that have one capacity and are of one kind: M pairs of a row and a head."""

    def __init__(self, banks: list[Bank], layers: list[int], rows: int) -> None:
        self.banks, self.layers = banks, layers
        first = banks[0].arena
        self.capacity, self.slots, self.streaming = first.capacity, first.capacity + 1, banks[0].streaming
        device = first.keys.device
        self.keys = joined([bank.arena.keys for bank in banks])  # [M, S, Ck]
        self.values = joined([bank.arena.values for bank in banks])  # [M, S, Cv]
        self.positions = joined([bank.arena.positions for bank in banks])  # [M, S]
        self.state = joined([bank.arena.state for bank in banks])  # [M, S, F]
        self.sums = joined([bank.arena.sums for bank in banks])  # [M, F']
        self.virtual: Virtual | None = None
        if banks[0].virtual is not None:
            kept = [bank.virtual for bank in banks if bank.virtual is not None]
            self.virtual = Virtual(
                joined([v.key for v in kept])[None],
                joined([v.value for v in kept])[None],
                joined([v.count for v in kept])[None],
            )
        sizes = [bank.arena.keys.shape[:2] for bank in banks]
        alike = all(size == sizes[0] for size in sizes)
        self.heads = sizes[0][1] if alike else 1
        """KV heads to a row of a view; 1 where the banks are of unlike numbers."""
        edges = [0]
        for b, h in sizes:
            edges.append(edges[-1] + b * h)
        self.runs = list(pairwise(edges))
        total = edges[-1]
        row = [torch.arange(b).repeat_interleave(h // self.heads) for b, h in sizes]
        self.row = torch.cat(row).to(device)  # [R] the batch row of each row of a view
        # Index of a bank's first slot among the group's, for each of its pairs; and of each pair's within it.
        self.base = torch.cat([torch.full((b - a,), a) for a, b in self.runs]).to(device) * self.slots
        self.first = torch.cat([torch.arange(b - a) for a, b in self.runs]).to(device) * self.slots
        self.hole = torch.zeros(total, dtype=torch.int64, device=device)
        self.at = torch.zeros(total, dtype=torch.int64, device=device)
        self.live = torch.zeros(rows, dtype=torch.int64, device=device)
        """[b] slots in use in each row."""

    def places(self) -> Iterator[tuple[int, Place]]:
        """Each bank's layer and place."""
        for layer, bank, (start, stop) in zip(self.layers, self.banks, self.runs, strict=True):
            arena = bank.arena
            keys, values, state = (x.flatten(0, 2) for x in (arena.keys, arena.values, arena.state))
            yield layer, Place(bank, self, self.at[start:stop], keys, values, state)

    def tiles(self, most: int) -> Iterator[tuple[int, int]]:
        """Runs of at most so many banks, as (first, last + 1)."""
        n = len(self.banks)
        return ((i, min(n, i + most)) for i in range(0, n, most))

    def enter(self) -> None:
        """Take the free slots and counts from the arenas, which from now on have them from here."""
        for bank, (start, stop) in zip(self.banks, self.runs, strict=True):
            arena, hole = bank.arena, self.hole[start:stop]
            live = torch.tensor(arena.live, device=hole.device)
            if arena.hole is None:
                hole.copy_(live[:, None].expand(arena.keys.shape[:2]).reshape(-1))
            elif arena.hole.data_ptr() != hole.data_ptr():
                hole.copy_(arena.hole.reshape(-1))
            arena.hole = hole.view(arena.keys.shape[:2])
            self.live.copy_(live)
        self.at.copy_(self.hole + self.first)


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
        self.rows, self.device = first.batch, first.device
        kinds: dict[tuple[int, bool], list[tuple[int, Bank]]] = {}
        for index, layer in enumerate(self.layers):
            for bank in layer.banks:
                kinds.setdefault((bank.arena.capacity, bank.streaming), []).append((index, bank))
        self.groups = [
            Group([bank for _, bank in found], [index for index, _ in found], self.rows)
            for found in kinds.values()
        ]
        self.places: list[list[Place]] = [[] for _ in self.layers]
        for group in self.groups:
            for index, place in group.places():
                self.places[index].append(place)
        for places in self.places:
            places.sort(key=lambda place: place.bank.heads.start)
        self.queries: Tensor | None = None  # [M, G, R, Dk] the rings of all layers
        self.asked_at: Tensor | None = None  # [L·b, R]
        rings = [layer.ring for layer in self.layers if layer.ring is not None]
        if rings:
            self.queries = joined([ring.queries for ring in rings])
            self.asked_at = joined([ring.positions[:, None] for ring in rings])
        self.clock = torch.zeros(self.rows, dtype=torch.int64, device=self.device)
        """[b] tokens seen."""
        self.columns = torch.zeros((), dtype=torch.int64, device=self.device)
        """Columns seen, pads included."""
        self.next = torch.zeros(self.rows, dtype=torch.int64, device=self.device)
        """[b] where the next query goes in the rings."""
        self.kernels = kernels.on(self.device)
        self.static = False
        self.entered = False
        self._marked = False
        self._fresh: list[Tensor] = []  # the step's queries, where a policy reads those of its call

    @classmethod
    def of(cls, layers: Sequence[BudgetLayer]) -> Together | None:
        """The steps of these layers; None where they cannot go together."""
        try:
            return None if why_apart(layers) else cls(layers)
        except LookupError:
            return None

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
            if group.sums.shape[-1]:
                self._sum(group)
        seen = self.layers[0].row_seen
        self.clock.copy_(torch.tensor(seen))
        self.columns.fill_(self.layers[0].seen)
        ring = self.layers[0].ring
        if ring is not None:
            self.next.fill_(ring.next)
        self.static, self.entered = static, True
        if self.device.type == "cuda" and not self._marked:
            self._mark()

    def _mark(self) -> None:
        """Tell torch.compile that these stay where they are, or it captures nothing that writes there."""
        found: list[Tensor] = [self.clock, self.columns, self.next]
        found += [x for x in (self.queries, self.asked_at) if x is not None]
        for group in self.groups:
            found += [group.keys, group.values, group.positions, group.state, group.sums]
            found += [group.hole, group.at, group.live, group.row, group.base, group.first]
            found += [] if group.virtual is None else list(group.virtual.tensors.values())
        for layer, places in zip(self.layers, self.places, strict=True):
            found += [] if layer.ring is None else [layer.ring.queries, layer.ring.positions]
            for place in places:
                arena, mean = place.bank.arena, place.bank.virtual
                found += [
                    place.at,
                    place.keys,
                    place.values,
                    place.state,
                    *arena.tensors.values(),
                    arena.sums,
                ]
                found += [] if mean is None else list(mean.tensors.values())
        for tensor in found:
            # Another cache has other addresses: its graph is captured anew, not compiled anew.
            torch._dynamo.mark_static_address(tensor, guard=False)
        self._marked = True

    def _sum(self, group: Group) -> None:
        """A policy's sums over what each head holds, from scratch."""
        for bank in group.banks:
            arena = bank.arena
            keys, values = (
                bank.store.decode(arena.keys, bank.dtype),
                bank.store.decode(arena.values, bank.dtype),
            )
            there = torch.arange(group.slots, device=self.device) < group.live[:, None, None]
            if arena.hole is not None and bool((group.live == group.capacity).any()):
                # In a full head the free slot need not be the last.
                there = torch.arange(group.slots, device=self.device) != arena.hole[..., None]
                there = there & (
                    (torch.arange(group.slots, device=self.device) < group.live[:, None, None])
                    | (group.live == group.capacity)[:, None, None]
                )
            parts = self.policy.summand(keys.float(), values.float(), arena.state)
            arena.sums.copy_(torch.where(there[..., None], parts, 0.0).sum(2, dtype=torch.float64))

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
        grouped = (
            query.view(b, h, -1, query.shape[-1])
            if query.is_contiguous()
            else query.reshape(b, h, -1, query.shape[-1])
        )
        if index == 0:
            self._fresh = []
        taken = None if mask is None or not self.static else mask[:, -1].to(torch.bool)
        if layer.ring is not None:
            self._note(layer, grouped)
        elif self.policy.query_rows == ALL:
            self._fresh.append(grouped)
        outs = []
        for place in places:
            bank = place.bank
            k, v, q = (
                (key, value, grouped)
                if len(places) == 1
                else (key[:, bank.heads], value[:, bank.heads], grouped[:, bank.heads])
            )
            outs.append(self._in_bank(place, q, k, v, taken, scaling, softcap))
        out = outs[0] if len(outs) == 1 else torch.cat(outs, dim=1)
        if index == len(self.layers) - 1:
            self._finish(taken, scaling, softcap)
        return out.reshape(b, 1, -1, out.shape[-1])

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
        bank, group = place.bank, place.group
        arena, mean = bank.arena, bank.virtual
        probe, policy = None, self.policy
        if self._early(group):
            keys, values = (x.float() for x in fresh)
            state = policy.token_state(keys, values, self.layers[0].shape.group, None)
            place.state.index_copy_(0, place.at, state.flatten(0, 2))
            part = policy.summand(keys, values, state).squeeze(2)
            arena.sums.add_(part if taken is None else part.masked_fill(~taken[:, None, None], 0.0))
            probe = policy.probe(arena.sums)
        b, h = arena.keys.shape[:2]
        got = kernels.decode(
            query,
            arena.keys,
            arena.values,
            (group.live + 1).to(torch.int32)[:, None].expand(b, h),
            scaling,
            form=bank.store.name,
            softcap=softcap,
            probe=probe,
            logits=not group.streaming and policy.query_rows in (1, ALL),
            virtual=None if mean is None else (mean.key, mean.value, mean.count),
        )
        place.dots, place.logits = got.dots, got.logits
        return got.out

    def _early(self, group: Group) -> bool:
        """Whether a newcomer enters the policy's sums before it is attended to."""
        return self.kernels and group.sums.shape[-1] > 0

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
        """query [b, h, G, Dk], key [b, h, 1, Dk], value -> [b, h, G, Dv]."""
        bank = place.bank
        arena, store = bank.arena, bank.store
        k, v = store.encode(key), store.encode(value)
        place.keys.index_copy_(0, place.at, k.reshape(-1, k.shape[-1]))
        place.values.index_copy_(0, place.at, v.reshape(-1, v.shape[-1]))
        if self.kernels:
            fresh = store.decode(k, bank.dtype), store.decode(v, bank.dtype)
            return self._by_kernel(place, query, fresh, taken, scaling, softcap)
        keys, values = store.decode(arena.keys, bank.dtype), store.decode(arena.values, bank.dtype)
        valid = None
        if self.static:
            count = place.group.live[:, None, None]
            valid = torch.arange(arena.capacity + 1, device=self.device) <= count  # [b, 1, S]
        if bank.virtual is None and softcap is None and keys.shape[-1] == values.shape[-1]:
            return attend.decode(query, keys, values, scaling, valid)
        mask = None if valid is None else valid[:, :, None]
        out, lse = attend.with_lse(query, keys, values, scaling, mask=mask, softcap=softcap)
        if bank.virtual is None:
            return out
        mean = bank.virtual
        return compensated(mean.key, mean.value, mean.count, query, out, lse, scaling, softcap)

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
        clock = self.clock  # the position of each row's newcomer
        if not self.static:
            self._check()
        if self.asked_at is not None:
            self._note_positions(taken)
        for group in self.groups:
            self._take(group, clock)
            self._choose(group, clock, taken, scaling, softcap)
        if taken is None:
            clock.add_(1)
        else:
            clock.add_(taken)
        self.columns.add_(1)
        self._fresh = []
        if not self.static:
            self._tell()

    def _check(self) -> None:
        """Raise if a key is no number, before anything has changed; only a CPU is asked."""
        if self.device.type != "cpu":
            return
        fresh = [g.keys.view(-1, g.keys.shape[-1]).index_select(0, g.at + g.base) for g in self.groups]
        if all(math.isfinite(keys.sum().item()) for keys in fresh):
            return
        for layer, places in zip(self.layers, self.places, strict=True):
            for place in places:
                admission.check_finite(layer.setting.layer, place.keys.index_select(0, place.at)[None, None])

    def _note_positions(self, taken: Tensor | None) -> None:
        at = self.asked_at
        assert at is not None
        room = at.shape[-1]
        lines = at.view(len(self.layers), self.rows, room)
        if not self.static:
            ring = self.layers[0].ring
            assert ring is not None
            lines[:, :, ring.next] = self.clock.to(at.dtype)
            return
        now = self.clock.to(at.dtype)
        if taken is not None:
            now = now.masked_fill(~taken, -1)  # a pad asks nothing; the next query comes in its place
        lines.scatter_(
            2,
            self.next[None, :, None].expand(len(self.layers), -1, 1),
            now[None, :, None].expand(len(self.layers), -1, 1),
        )
        step = 1 if taken is None else taken.to(torch.int64)
        self.next.copy_((self.next + step) % room)

    def _take(self, group: Group, clock: Tensor) -> None:
        """Positions of the newcomers, and the policy's numbers for them."""
        at = group.at + group.base
        heads = len(group.at) // len(group.row)
        position = clock.to(torch.int32)[group.row]
        group.positions.view(-1).index_copy_(
            0, at, position.repeat_interleave(heads) if heads > 1 else position
        )
        width = group.state.shape[-1]
        if not width or self._early(group):
            return
        keys, values = self._slots(group, at)
        state = self.policy.token_state(keys, values, self.layers[0].shape.group, None)
        group.state.view(-1, width).index_copy_(0, at, state.view(-1, width))

    def _slots(self, group: Group, at: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values of one slot of each pair: [R, H, 1, D] in fp32 (or wider)."""
        bank = group.banks[0]
        both = []
        for whole in (group.keys, group.values):
            x = bank.store.decode(whole.view(-1, whole.shape[-1]).index_select(0, at), bank.dtype)
            both.append(
                x.to(torch.promote_types(x.dtype, torch.float32)).view(len(group.row), group.heads, 1, -1)
            )
        return both[0], both[1]

    def _choose(
        self, group: Group, clock: Tensor, taken: Tensor | None, scaling: float, softcap: float | None
    ) -> None:
        """Observe, score, and make the slot of the token that goes the next free one."""
        policy, heads = self.policy, group.heads
        full = group.live == group.capacity if self.static else None  # [b]
        goes = full if full is None or taken is None else full & taken
        counted = group.sums.shape[-1] > 0
        old = group.at + group.base
        if counted and not self._early(group):
            self._add(group, old, None if taken is None else taken[group.row], 1)
        victims = []
        most = self._most(group)
        for first, last in group.tiles(most):
            start, stop = group.runs[first][0], group.runs[last - 1][1]
            view = self._view(group, first, last, clock, taken, scaling, softcap)
            if not group.streaming:
                state = observed(policy, view)
                if state is not None and state is not view.state:
                    assert view.state is not None
                    view.state.copy_(state)
            ranking = level(view, None if group.streaming else policy.ranking(view), policy)
            if self.kernels:
                now = (group.live + 1).to(torch.int32)[group.row[start // heads : stop // heads]]
                victim = kernels.worst(
                    ranking, view.positions, view.limit.flatten(), self.setting.budget.n_sink, now
                )
            else:
                victim = worst(view.guard(ranking), view.positions)
            victims.append(victim.view(stop - start))
        victim = victims[0] if len(victims) == 1 else torch.cat(victims)
        gone = None if goes is None else goes[group.row].repeat_interleave(heads)  # [M]
        if group.virtual is not None:
            self._fold(group, victim, gone)
        if counted:
            self._add(
                group, victim + group.first + group.base, None if gone is None else gone.view(-1, heads), -1
            )
        if gone is None:
            group.hole.copy_(victim)
        else:
            assert full is not None
            grows = ~full if taken is None else ~full & taken
            group.live.add_(grows)
            grown = group.hole + grows[group.row].repeat_interleave(heads)
            group.hole.copy_(torch.where(gone, victim, grown))
        group.at.copy_(group.hole + group.first)

    def _most(self, group: Group) -> int:
        """Banks scored at a time."""
        if not group.streaming and (
            self.policy.layerwise or (self.policy.query_rows and len(self.groups) > 1)
        ):
            return 1
        b, h = group.banks[0].arena.keys.shape[:2]
        wide = group.keys.shape[-1] if group.keys.dtype != torch.float32 else 1
        rows = max(1, self.policy.query_rows) * self.layers[0].shape.group
        return max(1, _SCRATCH // (4 * b * h * group.slots * max(wide, rows)))

    def _view(
        self,
        group: Group,
        first: int,
        last: int,
        clock: Tensor,
        taken: Tensor | None,
        scaling: float,
        softcap: float | None,
    ) -> Candidates:
        start, stop = group.runs[first][0], group.runs[last - 1][1]
        h = group.heads
        lines = slice(start // h, stop // h)
        row = group.row[lines]
        bank, setting = group.banks[first], self.setting

        def part(x: Tensor) -> Tensor:
            return x[start:stop].view(-1, h, *x.shape[1:])

        keys, values = (bank.store.decode(part(x), bank.dtype) for x in (group.keys, group.values))
        made = [self.places[layer] for layer in group.layers[first:last]]
        here = [place for places in made for place in places if place.group is group]
        dots = [place.dots.view(-1, h, group.slots) for place in here if place.dots is not None]
        logits = [
            place.logits.view(-1, h, 1, *place.logits.shape[-2:]).transpose(2, 3)
            for place in here
            if place.logits is not None
        ]
        valid = None
        if self.static:
            count = group.live[row][:, None, None]
            valid = (torch.arange(group.slots, device=self.device) <= count).expand(-1, h, -1)
        queries, at = self._asked(group, first, last, row, clock, taken)
        seen = clock[row] + 1
        layer = group.layers[first]
        return Candidates(
            parts=((keys, values),),
            positions=part(group.positions),
            valid=valid,
            protected=None,  # type: ignore[arg-type]  # worked out when read
            seen=seen,
            capacity=group.capacity,
            layer=self.layers[layer].setting.layer,
            layers=setting.layers,
            scaling=scaling,
            softcap=softcap,
            queries=queries,
            query_positions=at,
            state=part(group.state) if group.state.shape[-1] else None,
            newcomers=1,
            sums=part(group.sums) if group.sums.shape[-1] else None,
            dots=torch.cat(dots) if dots else None,
            handed=torch.cat(logits) if logits else None,
        ).guarded((seen - setting.recent).to(torch.int32)[:, None, None], setting.budget.n_sink)

    def _asked(
        self, group: Group, first: int, last: int, row: Tensor, clock: Tensor, taken: Tensor | None
    ) -> tuple[Tensor | None, Tensor | None]:
        """The queries that the policy reads: [R, H, G, r, Dk], and their positions [R, r]."""
        layers = group.layers[first:last]
        if self.queries is not None and not group.streaming:
            assert self.asked_at is not None
            # Layers with a group of their own are looked at one by one, so these are a run.
            run = slice(layers[0] * self.rows, (layers[-1] + 1) * self.rows)
            h = self.layers[0].shape.kv_heads
            return self.queries.view(-1, h, *self.queries.shape[1:])[run], self.asked_at[run]
        if self.policy.query_rows == ALL and not group.streaming:
            fresh = [self._fresh[layer] for layer in layers]
            query = fresh[0] if len(fresh) == 1 else torch.cat(fresh)
            at = clock if taken is None else clock.masked_fill(~taken, -1)  # a pad asks nothing
            return query.unsqueeze(3), at[row][:, None]
        return None, None

    def _add(self, group: Group, at: Tensor, which: Tensor | None, sign: int) -> None:
        """Take a slot of each pair into the policy's sums, or out of them."""
        keys, values = self._slots(group, at)
        width = group.state.shape[-1]
        state = group.state.flatten(0, 1).index_select(0, at)
        state = state.view(len(group.row), group.heads, 1, width)
        part = self.policy.summand(keys, values, state).squeeze(2)  # [R, H, F]
        if which is not None:
            part = part.masked_fill(~which.view(len(group.row), -1, 1), 0.0)
        group.sums.view(part.shape).add_(part, alpha=sign)

    def _fold(self, group: Group, victim: Tensor, gone: Tensor | None) -> None:
        """What streaming heads let go becomes part of their virtual tokens."""
        v = group.virtual
        assert v is not None
        keys, values = self._slots(group, victim + group.first + group.base)
        mask = torch.ones_like(victim, dtype=torch.bool) if gone is None else gone
        v.fold(keys.view(1, len(victim), 1, -1), values.view(1, len(victim), 1, -1), mask.view(1, -1, 1))

    def _tell(self) -> None:
        """The host's own counts."""
        first = self.layers[0]
        seen, row_seen = first.seen + 1, tuple(n + 1 for n in first.row_seen)
        for layer in self.layers:
            layer.seen, layer.row_seen = seen, row_seen
            if layer.ring is not None:
                layer.ring.next = (layer.ring.next + 1) % layer.ring.queries.shape[3]
