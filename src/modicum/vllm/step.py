"""Step: what one step does with each request's arena, worked out from counts alone."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from modicum.vllm.counts import Counts, Page
from modicum.vllm.pages import place
from modicum.vllm.settings import Settings


@dataclass
class Step:
    """The requests of one step, in the order of the batch."""

    table: Tensor
    """[R, P] each request's pages."""
    live: Tensor
    """[R] tokens held before."""
    new: Tensor
    """[R] tokens that come."""
    after: Tensor
    """[R] tokens held afterwards."""
    seen: Tensor
    """[R] tokens seen, this step's included."""
    row: Tensor
    """[T] whose each token is."""
    slot: Tensor
    """[T] where in its request's arena it goes."""
    position: Tensor
    """[T] where in its request it stands."""
    starts: Tensor
    """[R] each request's first token among the T."""
    _place: tuple[Tensor, Tensor] | None = None  # the same for all layers
    _over: list[tuple[Tensor, int, int]] | None = None

    @property
    def total(self) -> Tensor:
        """[R] tokens held while the step attends."""
        return self.live + self.new

    def place(self, block: int) -> tuple[Tensor, Tensor]:
        """The page of each token and its slot there, [T] each, pages being of `block` slots."""
        if self._place is None:
            self._place = place(self.table, self.row, self.slot, block)
        return self._place

    @property
    def over(self) -> list[tuple[Tensor, int, int]]:
        """Requests that hold too many, those of one size together: rows, what they hold, what they may."""
        if self._over is None:
            sizes = list(zip(self.total.tolist(), self.after.tolist(), strict=True))
            kinds: dict[tuple[int, int], list[int]] = {}
            for number, (total, after) in enumerate(sizes):
                if total > after:
                    kinds.setdefault((total, after), []).append(number)
            self._over = [(torch.tensor(rows), *size) for size, rows in kinds.items()]
        return self._over


class Ledger:
    """How many tokens each request holds, by its first page: a request keeps that for life."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self._held = torch.zeros(1024, dtype=torch.int64)
        self._counts, self._page = Counts(), Page()

    def step(self, table: Tensor, starts: Tensor, seen: Tensor) -> Step:
        """Take in a step: table [R, P], starts [R + 1] of each request's tokens, seen [R] -> what to do."""
        most, slack = self.settings.budget, self.settings.evict_every - 1
        new = (starts[1:] - starts[:-1]).long()
        before = seen.long() - new
        first = table[:, 0].long()
        while int(first.max()) >= len(self._held):
            self._held = torch.cat([self._held, torch.zeros_like(self._held)])
        # A request that begins, or begins again after it was preempted, holds nothing.
        live = torch.where(before == 0, 0, self._held[first])
        total = live + new
        kept = torch.where(new == 1, most - slack, most)
        after = torch.where(total <= most, total, kept)
        self._held[first] = after
        self._count(first > 0, new, total, after)
        row = torch.repeat_interleave(torch.arange(len(new)), new)
        begin = starts[:-1].long()
        offset = torch.arange(len(row)) - begin[row]
        slot, position = live[row] + offset, (before[row] + offset).to(torch.int32)
        return Step(table, live, new, after, seen.long(), row, slot, position, begin)

    def _count(self, real: Tensor, new: Tensor, total: Tensor, after: Tensor) -> None:
        """Tell the server; requests on vLLM's page 0 are its own dry runs."""
        if not bool(real.all()):
            return
        counts = self._counts
        counts.seen += int(new.sum())
        counts.gone += int((total - after).sum())
        counts.held = int(after.sum())
        counts.most = max(counts.most, int(after.max()))
        self._page.write(counts)
