"""Eviction: after a layer has attended, which tokens of each request's arena stay, and where they go."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from modicum.kv.choice import best, gaps, worst
from modicum.kv.scoring import level
from modicum.vllm.notes import Notes
from modicum.vllm.pages import Pages, place
from modicum.vllm.recent import Recent
from modicum.vllm.settings import Settings
from modicum.vllm.shown import Held, Shown
from modicum.vllm.step import Over, Step

_TOGETHER = 64 * 2**20
"""Bytes of attention rows, or of keys, that a policy may make of several layers at once."""


@dataclass(frozen=True)
class Attention:
    """What the layers have in common."""

    layers: int
    scaling: float
    softcap: float | None
    group: int
    """Query heads per KV head."""


class Eviction:
    """All layers'.

    A request that takes in several tokens is brought down layer by layer; those in decode after the last
    layer, all layers at once (`Decode`).

    Args:
        bind: makes the pages of a layer's cache.
        requests: that may run at once.
    """

    def __init__(
        self, settings: Settings, attention: Attention, bind: Callable[[Tensor], Pages], requests: int
    ) -> None:
        self.settings, self.policy, self.attention = settings, settings.policy, attention
        self._bind, self._requests = bind, requests
        self.pages: list[Pages] = []
        self._notes: Notes | None = None
        self._recent: Recent | None = None

    @property
    def notes(self) -> Notes:
        """There once the first layer has been seen."""
        assert self._notes is not None
        return self._notes

    @property
    def nbytes(self) -> int:
        """Bytes beside the pages."""
        there = (self._notes, self._recent)
        return sum(x.nbytes for x in there if x is not None)

    def after(self, step: Step, layer: int, query: Tensor, key: Tensor, value: Tensor, cache: Tensor) -> None:
        """A layer has attended: query [T, Hq, D], key [T, H, D]; bring its pages down to the budget."""
        if len(self.pages) <= layer:
            self._begin(query, cache)
        notes, block = self.notes, self.pages[layer].block
        decode = len(step.row) == len(step.new)
        # Where all let one go, what is known of the new tokens is written with them into the places left.
        placed = decode and len(step.over) == 1 and self._one(step.over[0], len(step.new))
        if layer == 0:
            if step.begins:
                notes.summed[step.ring[step.fresh]] = False
            if self._recent is not None:
                self._recent.begin(step)
            if not placed:
                notes.begin(step, block)
        if self._recent is not None:
            self._recent.take_in(layer, query)
        if not decode:
            notes.take_in(step, slice(layer, layer + 1), key[None], value[None], block)
            for over in step.over:
                if not over.decode:
                    self._let_go(step, over, layer)
        if layer == self.attention.layers - 1:
            if decode and not placed and notes.state is not None:
                page, slot = (x[:, None] for x in step.place(block))
                notes.take_in(step, slice(0, layer + 1), *self.tokens(page, slot), block)
            for over in step.over:
                if over.decode:
                    Decode(self, step, over).let_go()
                else:
                    notes.summed[step.ring[over.rows]] = False

    def _one(self, over: Over, rows: int) -> bool:
        return over.decode and over.total == over.after + 1 and len(over.rows) == rows

    def tokens(self, page: Tensor, slot: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values [L, T, H, D] of tokens whose pages and slots [T, 1] are those of all heads."""
        first = self.pages[0]
        numbers = first.numbers(page, torch.arange(first.heads, device=page.device), slot)
        both = torch.stack([pages.take(numbers) for pages in self.pages])
        return both[..., : first.key_dim], both[..., first.key_dim :]

    def _begin(self, query: Tensor, cache: Tensor) -> None:
        pages = self._bind(cache)
        self.pages.append(pages)
        if len(self.pages) > 1:
            return
        layers, group = self.attention.layers, self.attention.group
        self._notes = Notes(self.policy, pages, layers, group, self._requests)
        if self.policy.query_rows:
            shape = (layers, self._requests, pages.heads, group, self.policy.query_rows, pages.key_dim)
            self._recent = Recent(*shape, dtype=query.dtype, device=query.device)

    def view(
        self,
        step: Step,
        over: Over,
        used: Tensor,
        layers: slice,
        positions: Tensor,
        state: Tensor | None,
        sums: Tensor | None = None,
    ) -> Shown:
        """What the policy is to see of R requests in L layers, one behind the other.

        used [R, P] their pages; positions [L·R, H, N], state [L·R, H, N, F], sums [L·R, H, F].
        """
        rows, number = over.rows, layers.stop - layers.start
        queries, at = (None, None) if self._recent is None else self._recent.of(layers, step.ring[rows])
        seen = step.seen[rows].repeat(number)
        made = Shown(
            Held(self.pages[layers], used, over.total),
            positions=positions,
            seen=seen,
            capacity=self.settings.budget,
            layer=layers.start,
            layers=self.attention.layers,
            scaling=self.attention.scaling,
            softcap=self.attention.softcap,
            queries=queries,
            query_positions=at,
            state=state,
            newcomers=1 if over.decode else int(step.new[rows].max()),
            sums=sums,
        )
        limit = (seen - self.settings.protected).to(torch.int32)[:, None, None]
        made.guarded(limit, self.settings.n_sink)
        return made

    def _let_go(self, step: Step, over: Over, layer: int) -> None:
        """Bring requests of one size down in one layer, by any number of tokens."""
        pages, notes, table = self.pages[layer], self.notes, step.table[over.rows]
        used, only = pages.used(table, over.total), slice(layer, layer + 1)
        positions, state = notes.of(used, over.total, only)
        view = self.view(step, over, used, only, positions, state)
        score = view.guard(level(view, self.policy.score(view), self.policy))
        keep = best(score, positions, torch.tensor([[over.after]]))  # [R, H, N]
        free, mover = gaps(keep, torch.tensor([[[over.after]]], device=keep.device))
        row, head = mover[:, 0], mover[:, 1]
        source, target = (place(table, row, slot, pages.block) for slot in (mover[:, 2], free[:, 2]))
        numbers = [pages.numbers(page, head, slot) for page, slot in (source, target)]
        pages.put(numbers[1], pages.take(numbers[0]))
        notes.move(*(notes.line(layer, page, head, slot) for page, slot in (source, target)))


class Decode:
    """Requests in decode that hold too much, in all layers."""

    def __init__(self, eviction: Eviction, step: Step, over: Over) -> None:
        self.eviction, self.step, self.over = eviction, step, over
        pages = eviction.pages[0]
        self.table = step.table[over.rows]
        self.used = pages.used(self.table, over.total)
        self.ring = step.ring[over.rows]
        self.layers, self.rows, self.heads = eviction.attention.layers, len(over.rows), pages.heads

    def let_go(self) -> None:
        """Bring them down."""
        positions, states = self.eviction.notes.of(self.used, self.over.total)
        if self.over.total == self.over.after + 1:
            self._one(positions, states)
        else:
            self._several(positions, states)

    def _one(self, positions: Tensor, states: Tensor | None) -> None:
        """Put each head's new token where its worst is; positions [L·R, H, N], states [L·R, H, N, F]."""
        eviction, step, over, device = self.eviction, self.step, self.over, self.used.device
        notes, policy, pages = eviction.notes, eviction.policy, eviction.pages[0]
        line = torch.arange(self.rows, device=device)[:, None]
        newest = torch.full_like(line, over.total - 1)
        keys, values = eviction.tokens(*place(self.table, line, newest, pages.block))  # [L, R, H, D]
        at = (step.seen[over.rows] - 1).to(torch.int32).repeat(self.layers)[:, None].expand(-1, self.heads)
        positions[:, :, -1] = at
        state = None  # of the new tokens [L·R, H, F]
        if states is not None:
            one_key, one_value = (x.flatten(0, 1).unsqueeze(2) for x in (keys, values))
            state = policy.token_state(one_key, one_value, eviction.attention.group, None)[:, :, 0]
            states[:, :, -1] = state
        sums = None
        if notes.sums is not None:
            sums = notes.sums[:, self.ring].flatten(0, 1)
            sums += self._summand(keys, values, state)
            summed = notes.summed[self.ring]
            if not bool(summed.all()):
                summed = summed.repeat(self.layers)[:, None, None]
                sums = torch.where(summed, sums, self._sums(states))

        victim = torch.empty(self.layers * self.rows, self.heads, dtype=torch.long, device=device)
        for view in self._views(positions, states, sums):
            score = view.guard(level(view, policy.ranking(view), policy))
            victim[self._lines(view)] = worst(score, view.positions)

        shape = (self.layers, self.rows, self.heads)
        layer = torch.arange(self.layers, device=device)[:, None, None]
        head = torch.arange(self.heads, device=device).expand(shape)
        page, slot = place(self.table, line.expand(shape), victim.view(shape), pages.block)
        numbers = pages.numbers(page, head, slot)  # [L, R, H, Dk + Dv]
        if sums is not None and notes.sums is not None:
            gone = torch.stack([p.take(n) for p, n in zip(eviction.pages, numbers, strict=True)])
            state_gone = None
            if states is not None:
                index = victim[:, :, None, None].expand(-1, -1, 1, states.shape[-1])
                state_gone = states.gather(2, index)[:, :, 0]
            sums -= self._summand(gone[..., : pages.key_dim], gone[..., pages.key_dim :], state_gone)
            notes.sums[:, self.ring] = sums.view(self.layers, self.rows, *sums.shape[1:])
            notes.summed[self.ring] = True
        fresh = torch.cat([keys, values], -1)
        for p, n, new in zip(eviction.pages, numbers, fresh, strict=True):
            p.put(n, new)
        flat = notes.line(layer, page, head, slot)
        notes.write(flat, at.flatten(), None if state is None else state.flatten(0, 1))

    def _several(self, positions: Tensor, states: Tensor | None) -> None:
        """Let more than one go of each head, and close the gaps."""
        eviction, after, policy = self.eviction, self.over.after, self.eviction.policy
        count = torch.tensor([[after]])
        found = []
        for view in self._views(positions, states, None):
            score = view.guard(level(view, policy.score(view), policy))
            found.append(best(score, view.positions, count))
        keep = torch.cat(found)  # [L·R, H, N]
        free, mover = gaps(keep, torch.tensor([[[after]]], device=keep.device))
        layer, row, head = mover[:, 0] // self.rows, mover[:, 0] % self.rows, mover[:, 1]
        pages = eviction.pages[0]
        source, target = (place(self.table, row, slot, pages.block) for slot in (mover[:, 2], free[:, 2]))
        each = torch.bincount(layer, minlength=self.layers).tolist()  # they come layer by layer
        numbers = [torch.split(pages.numbers(page, head, slot), each) for page, slot in (source, target)]
        for p, there, here in zip(eviction.pages, *numbers, strict=True):
            p.put(here, p.take(there))
        eviction.notes.move(
            *(eviction.notes.line(layer, page, head, slot) for page, slot in (source, target))
        )
        eviction.notes.summed[self.ring] = False

    def _views(self, positions: Tensor, states: Tensor | None, sums: Tensor | None) -> Iterator[Shown]:
        """Of as many layers at a time as the policy and memory allow."""
        span = self._span()
        for first in range(0, self.layers, span):
            some = slice(first, min(first + span, self.layers))
            lines = slice(some.start * self.rows, some.stop * self.rows)
            state, of_heads = (None if x is None else x[lines] for x in (states, sums))
            yield self.eviction.view(self.step, self.over, self.used, some, positions[lines], state, of_heads)

    def _lines(self, view: Shown) -> slice:
        return slice(view.layer * self.rows, view.layer * self.rows + len(view.positions))

    def _span(self) -> int:
        policy, attention = self.eviction.policy, self.eviction.attention
        if policy.layerwise:
            return 1
        width = max(policy.query_rows * attention.group, self.eviction.pages[0].key_dim)
        return max(1, _TOGETHER // (4 * self.rows * self.heads * self.over.total * width))

    def _summand(self, keys: Tensor, values: Tensor, state: Tensor | None) -> Tensor:
        """[L·R, H, F] what tokens add to the policy's sums: keys [L, R, H, D], state [L·R, H, F]."""
        keys, values = (x.flatten(0, 1).float().unsqueeze(2) for x in (keys, values))
        state = keys[..., :0] if state is None else state.unsqueeze(2)
        return self.eviction.policy.summand(keys, values, state)[:, :, 0].double()

    def _sums(self, states: Tensor | None) -> Tensor:
        """[L·R, H, F] over all that is held."""
        keys, values = (x.float() for x in Held(self.eviction.pages, self.used, self.over.total))
        state = keys[..., :0] if states is None else states
        return self.eviction.policy.summand(keys, values, state).sum(2, dtype=torch.float64)
