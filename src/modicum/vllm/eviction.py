"""Eviction: after a layer has attended, which tokens of each request's arena stay, and where they go."""

from __future__ import annotations

from collections.abc import Callable
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

    A request that takes in several tokens is brought down layer by layer. Those in decode, of which each head
    lets one go, are dealt with after the last layer, all at once (`Single`).

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
        self._single: Single | None = None

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
        if layer == 0:
            self._single = self._find_single(step)
            if step.begins:
                notes.summed[step.ring[step.fresh]] = False
            if self._recent is not None:
                self._recent.begin(step)
            if self._single is None or not self._single.alone:
                notes.begin(step, block)
        single = self._single
        if self._recent is not None:
            self._recent.take_in(layer, query)
        calm = len(step.row) == len(step.new) and not step.over
        if not calm and (single is None or not single.alone):
            notes.take_in(step, slice(layer, layer + 1), key[None], value[None], block)
            for over in step.over:
                if single is None or over is not single.over:
                    self._let_go(step, over, layer)
        if layer == self.attention.layers - 1:
            self._end(step, calm)

    def _end(self, step: Step, calm: bool) -> None:
        """Do what is done for all layers at once: with few tokens they cost as much as one."""
        single, self._single = self._single, None
        if single is not None:
            single.let_go()
        elif calm and self.notes.state is not None:
            page, slot = (x[:, None] for x in step.place(self.pages[0].block))
            keys, values = self.tokens(page, slot)
            self.notes.take_in(step, slice(0, len(keys)), keys, values, self.pages[0].block)
        for over in step.over:
            if single is None or over is not single.over:
                self.notes.summed[step.ring[over.rows]] = False

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

    def _find_single(self, step: Step) -> Single | None:
        if self.settings.evict_every > 1:
            return None
        return next((Single(self, step, over) for over in step.over if over.single), None)

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
            newcomers=1 if over.single else int(step.new[rows].max()),
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


class Single:
    """Requests of which each head in each layer lets one token go in a step."""

    def __init__(self, eviction: Eviction, step: Step, over: Over) -> None:
        self.eviction, self.step, self.over = eviction, step, over
        self.alone = len(over.rows) == len(step.row)
        """Whether the step has no other tokens."""

    def let_go(self) -> None:
        """Choose in all layers, and put each head's new token where its worst is."""
        eviction, step, over = self.eviction, self.step, self.over
        notes, policy, pages = eviction.notes, eviction.policy, eviction.pages[0]
        table, ring = step.table[over.rows], step.ring[over.rows]
        used = pages.used(table, over.total)
        layers, rows, heads = eviction.attention.layers, len(over.rows), pages.heads
        at = (step.seen[over.rows] - 1).to(torch.int32).repeat(layers)[:, None].expand(-1, heads)
        newest = torch.full((rows, 1), over.total - 1, device=used.device)
        line = torch.arange(rows, device=used.device)[:, None]
        keys, values = eviction.tokens(*place(table, line, newest, pages.block))
        positions, states = notes.of(used, over.total)  # [L·R, H, N], [L·R, H, N, F]
        positions[:, :, -1] = at
        state = None  # of the new tokens [L·R, H, F]
        if states is not None:
            one_key, one_value = (x.flatten(0, 1).unsqueeze(2) for x in (keys, values))
            state = policy.token_state(one_key, one_value, eviction.attention.group, None)[:, :, 0]
            states[:, :, -1] = state
        sums = None
        if notes.sums is not None:
            sums = notes.sums[:, ring].flatten(0, 1)
            sums += self._summand(keys, values, state)
            summed = notes.summed[ring]
            if not bool(summed.all()):
                held = Held(eviction.pages, used, over.total)
                sums = torch.where(summed.repeat(layers)[:, None, None], sums, self._sums(held, states))

        victim = torch.empty(layers * rows, heads, dtype=torch.long, device=positions.device)
        span = self._span(heads * rows * over.total)
        for first in range(0, layers, span):
            some = slice(first, min(first + span, layers))
            lines = slice(some.start * rows, some.stop * rows)
            parts = (None if x is None else x[lines] for x in (states, sums))
            view = eviction.view(step, over, used, some, positions[lines], *parts)
            score = view.guard(level(view, policy.ranking(view), policy))
            victim[lines] = worst(score, view.positions)

        shape = (layers, rows, heads)
        row = torch.arange(rows, device=victim.device)[:, None].expand(shape)
        head = torch.arange(heads, device=victim.device).expand(shape)
        page, slot = place(table, row, victim.view(shape), pages.block)
        numbers = pages.numbers(page, head, slot)  # [L, R, H, Dk + Dv]
        fresh = torch.cat([keys, values], -1)
        if sums is not None and notes.sums is not None:
            gone = torch.stack([p.take(n) for p, n in zip(eviction.pages, numbers, strict=True)])
            if states is not None:
                index = victim[:, :, None, None].expand(-1, -1, 1, states.shape[-1])
                state_gone = states.gather(2, index)[:, :, 0]
            dim = pages.key_dim
            sums -= self._summand(gone[..., :dim], gone[..., dim:], None if states is None else state_gone)
            notes.sums[:, ring] = sums.view(layers, rows, *sums.shape[1:])
            notes.summed[ring] = True
        for p, n, new in zip(eviction.pages, numbers, fresh, strict=True):
            p.put(n, new)
        layer = torch.arange(layers, device=victim.device)[:, None, None]
        line = notes.line(layer, page, head, slot)
        notes.write(line, at.flatten(), None if state is None else state.flatten(0, 1))

    def _span(self, tokens: int) -> int:
        """Layers that are ranked together; a layer has so many tokens to be ranked."""
        policy, attention = self.eviction.policy, self.eviction.attention
        if policy.layerwise:
            return 1
        rows = max(1, policy.query_rows * attention.group)
        return max(1, _TOGETHER // (4 * tokens * max(rows, self.eviction.pages[0].key_dim)))

    def _summand(self, keys: Tensor, values: Tensor, state: Tensor | None) -> Tensor:
        """[L·R, H, F] what tokens add to the policy's sums: keys [L, R, H, D], state [L·R, H, F]."""
        keys, values = (x.flatten(0, 1).float().unsqueeze(2) for x in (keys, values))
        state = keys[..., :0] if state is None else state.unsqueeze(2)
        return self.eviction.policy.summand(keys, values, state)[:, :, 0].double()

    def _sums(self, held: Held, states: Tensor | None) -> Tensor:
        """[L·R, H, F] over all that is held."""
        keys, values = (x.float() for x in held)
        state = keys[..., :0] if states is None else states
        return self.eviction.policy.summand(keys, values, state).sum(2, dtype=torch.float64)
