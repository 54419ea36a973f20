"""Eviction: after a layer has attended, which tokens of each request's arena stay, and where they go."""

from __future__ import annotations

import torch
from torch import Tensor

from modicum.kv.bank import Candidates
from modicum.kv.choice import best, gaps
from modicum.kv.scoring import level
from modicum.vllm.pages import Pages, place
from modicum.vllm.recent import Recent
from modicum.vllm.settings import Settings
from modicum.vllm.step import Step


class Eviction:
    """One layer's.

    Args:
        pages: the layer's.
        layer, layers: which it is, and how many there are.
        scaling, softcap: of its attention.
        group: query heads per KV head.
    """

    def __init__(
        self,
        settings: Settings,
        pages: Pages,
        layer: int,
        layers: int,
        scaling: float,
        softcap: float | None,
        group: int,
        recent: Recent | None,
    ) -> None:
        self.settings, self.pages = settings, pages
        self.layer, self.layers = layer, layers
        self.scaling, self.softcap, self.group = scaling, softcap, group
        self.recent = recent
        number, heads, _, block = pages.keys.shape
        self.positions = torch.full((number, heads, block), -1, dtype=torch.int32)
        """Where each token of each page stood in its request; heads let go of different ones."""

    @property
    def nbytes(self) -> int:
        """Bytes beside the pages."""
        return self.positions.nbytes + (0 if self.recent is None else self.recent.nbytes)

    def take_in(self, step: Step, query: Tensor) -> None:
        """Note the tokens of a step, which lie in their slots; query [T, Hq, D]."""
        page, slot = step.place(self.pages.block)
        self.positions[page, :, slot] = step.position[:, None]
        if self.recent is not None:
            self.recent.take_in(step, query)

    def let_go(self, step: Step) -> None:
        """Bring every request down to what it may hold."""
        for rows, total, after in step.over:
            self._let_go(step, rows, total, after)

    def _let_go(self, step: Step, rows: Tensor, total: int, after: int) -> None:
        """rows [R]: requests that hold `total` tokens and are to hold `after`."""
        table = step.table[rows]
        view = self._view(step, rows, table, total)
        score = view.guard(level(view, self.settings.policy.score(view), self.settings.policy))
        keep = best(score, view.positions, torch.tensor([[after]]))  # [R, H, N]
        free, mover = gaps(keep, torch.tensor([[[after]]]))
        row, head = mover[:, 0], mover[:, 1]
        source, target = (place(table, row, slot, self.pages.block) for slot in (mover[:, 2], free[:, 2]))
        self.pages.move(head, source, target)
        self.positions[target[0], head, target[1]] = self.positions[source[0], head, source[1]]

    def _view(self, step: Step, rows: Tensor, table: Tensor, total: int) -> Candidates:
        keys, values = self.pages.read(table, total)
        used = table[:, : -(-total // self.pages.block)]
        positions = self.positions[used].transpose(1, 2).flatten(2, 3)[:, :, :total]
        queries, at = (None, None) if self.recent is None else self.recent.of(step, rows)
        seen, policy = step.seen[rows], self.settings.policy
        return Candidates(
            parts=((keys, values),),
            positions=positions,
            valid=None,
            protected=None,  # type: ignore[arg-type]  # worked out when read
            seen=seen,
            capacity=self.settings.budget,
            layer=self.layer,
            layers=self.layers,
            scaling=self.scaling,
            softcap=self.softcap,
            queries=queries,
            query_positions=at,
            # A function of key and value alone: made again, it takes no room beside the pages.
            state=policy.token_state(keys, values, self.group, None)
            if policy.state_width(self.group)
            else None,
            newcomers=int(step.new[rows].max()),
        ).guarded((seen - self.settings.protected).to(torch.int32)[:, None, None], self.settings.n_sink)
