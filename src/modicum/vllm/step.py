"""Step: what one step does with each request's arena, worked out from counts alone."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from modicum.vllm.counts import Counts, Page
from modicum.vllm.pages import place
from modicum.vllm.settings import Settings

Numbers = npt.NDArray[np.int64]


@dataclass
class Over:
    """Requests that hold too much, all of one size."""

    rows: Tensor
    """[R] which of the step's they are."""
    total: int
    """Tokens that each holds while the step attends."""
    after: int
    """Tokens that each is to hold."""
    decode: bool
    """Whether each has taken one token in."""


@dataclass
class Step:
    """The requests of one step, in the order of the batch. Tensors are on the device of the pages."""

    table: Tensor
    """[R, P] each request's pages."""
    total: Tensor
    """[R] tokens that each holds while the step attends."""
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
    ring: Tensor
    """[R] each request's place among those that run."""
    fresh: Tensor
    """[R] bool: what lies in that place is not the request's own."""
    begins: bool
    """Whether any is."""
    over: list[Over]
    most: int
    """The largest `total`."""
    _place: tuple[Tensor, Tensor] | None = field(default=None, repr=False)  # the same for all layers

    def place(self, block: int) -> tuple[Tensor, Tensor]:
        """The page of each token and its slot there, [T] each, pages being of `block` slots."""
        if self._place is None:
            self._place = place(self.table, self.row, self.slot, block)
        return self._place


class Ledger:
    """How many tokens each request holds, by its first page: a request keeps that for life."""

    def __init__(self, settings: Settings, requests: int) -> None:
        self.settings = settings
        self._held: dict[int, int] = {}
        self._rings = Rings(requests)
        self._counts, self._page = Counts(), Page()

    def step(self, table: Tensor, starts: Tensor, seen: Tensor) -> Step:
        """Take in a step: table [R, P], starts [R + 1] of each request's tokens, seen [R] -> what to do.

        starts and seen are read on the host, with numpy: these are a few numbers, at each step.
        """
        most, slack = self.settings.budget, self.settings.evict_every - 1
        firsts = table[:, 0].tolist()
        begin, now = starts.numpy(force=True).astype(np.int64), seen.numpy(force=True).astype(np.int64)
        new = begin[1:] - begin[:-1]
        before = now - new
        begins = (before == 0).tolist()
        # A request that begins, or begins again after it was preempted, holds nothing.
        pairs = zip(firsts, begins, strict=True)
        live = np.array([0 if fresh else self._held.get(first, 0) for first, fresh in pairs])
        total = live + new
        after = np.where(total <= most, total, np.where(new == 1, most - slack, most))
        self._held.update(zip(firsts, after.tolist(), strict=True))
        self._count(min(firsts) > 0, new, total, after)
        ring, fresh = self._rings.of(firsts, begins)
        row = np.repeat(np.arange(len(new)), new)
        offset = np.arange(len(row)) - begin[row]
        device = table.device
        over = [
            Over(torch.tensor(rows, device=device), *kind)
            for kind, rows in _alike(total.tolist(), after.tolist(), new.tolist()).items()
        ]
        parts = {"total": total, "new": new, "after": after, "seen": now, "row": row}
        parts |= {"slot": live[row] + offset, "position": (before[row] + offset).astype(np.int32)}
        parts |= {"starts": begin[:-1], "ring": np.array(ring), "fresh": np.array(fresh)}
        there: dict[str, Any] = {
            name: torch.from_numpy(x).to(device, non_blocking=True) for name, x in parts.items()
        }
        return Step(table=table, begins=any(fresh), over=over, most=int(total.max()), **there)

    def _count(self, real: bool, new: Numbers, total: Numbers, after: Numbers) -> None:
        """Tell the server; requests on vLLM's page 0 are its own dry runs."""
        if not real:
            return
        counts = self._counts
        counts.seen += int(new.sum())
        counts.gone += int((total - after).sum())
        counts.held = int(after.sum())
        counts.most = max(counts.most, int(after.max()))
        self._page.write(counts)


def _alike(total: list[int], after: list[int], new: list[int]) -> dict[tuple[int, int, bool], list[int]]:
    """Requests over their budget, those of one kind together: total, after and whether in decode -> rows."""
    kinds: dict[tuple[int, int, bool], list[int]] = {}
    for row, (held, kept, come) in enumerate(zip(total, after, new, strict=True)):
        if held > kept:
            kinds.setdefault((held, kept, come == 1), []).append(row)
    return kinds


class Rings:
    """A place for each of the requests that run, for what is kept beside the pages.

    A request has its place from its first step on; a new one takes the place not used for longest, so that
    one that waits while more than `number` others begin finds its own taken, and is told so.
    """

    def __init__(self, number: int) -> None:
        self._ring: dict[int, int] = {}  # by first page
        self._owner = [-1] * number  # first page
        self._used = [0] * number
        self._clock = 0

    def of(self, firsts: list[int], begins: list[bool]) -> tuple[list[int], list[bool]]:
        """The places [R] of requests with these first pages, and [R] bool: nothing of theirs is there."""
        self._clock += 1
        fresh = list(begins)
        rings = []
        for number, first in enumerate(firsts):
            ring = self._ring.get(first, -1)
            if ring < 0 or self._owner[ring] != first:
                ring = min(range(len(self._used)), key=self._used.__getitem__)
                self._ring.pop(self._owner[ring], None)
                self._owner[ring], self._ring[first], fresh[number] = first, ring, True
            self._used[ring] = self._clock
            rings.append(ring)
        return rings, fresh
