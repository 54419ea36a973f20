"""Recent: the last queries of each running request, from which attention rows are made again."""

from __future__ import annotations

import torch
from torch import Tensor

from modicum.vllm.step import Step


class Recent:
    """Rings of the last `window` queries of one layer, for as many requests as may run at once.

    A ring is a request's from its first step on; a new request takes the one not used for longest. So one
    that waits while more than `rows` others begin is scored by fewer queries.
    """

    def __init__(
        self, rows: int, pages: int, group: int, heads: int, window: int, dim: int, dtype: torch.dtype
    ) -> None:
        self.window = window
        self.queries = torch.zeros(rows, heads, group, window, dim, dtype=dtype)
        self.positions = torch.full((rows, window), -1, dtype=torch.int64)
        self._ring = torch.full((pages,), -1, dtype=torch.int64)  # by first page
        self._owner = torch.full((rows,), -1, dtype=torch.int64)  # first page
        self._used = torch.zeros(rows, dtype=torch.int64)
        self._clock = 0

    @property
    def nbytes(self) -> int:
        return self.queries.nbytes + self.positions.nbytes

    def take_in(self, step: Step, query: Tensor) -> None:
        """query [T, Hq, D] of a step's tokens."""
        self._clock += 1
        for number, first in enumerate(step.table[:, 0].tolist()):
            seen, new, start = int(step.seen[number]), int(step.new[number]), int(step.starts[number])
            if new == 0:
                continue
            ring = self._of(first, seen == new)
            count = min(new, self.window)
            part = query[start + new - count : start + new]  # [c, Hq, D]
            at = torch.arange(seen - count, seen)
            heads, group, dim = self.queries.shape[1], self.queries.shape[2], self.queries.shape[4]
            shaped = part.view(count, heads, group, dim).permute(1, 2, 0, 3)
            self.queries[ring][:, :, at % self.window] = shaped
            self.positions[ring, at % self.window] = at

    def of(self, step: Step, rows: Tensor) -> tuple[Tensor, Tensor]:
        """The queries [R, H, G, W, D] of some requests and their positions [R, W], -1 for none."""
        rings = self._ring[step.table[rows, 0].long()]
        return self.queries[rings], self.positions[rings]

    def _of(self, first: int, fresh: bool) -> int:
        """The ring of the request with this first page; an empty one if it begins."""
        ring = int(self._ring[first])
        if ring < 0 or int(self._owner[ring]) != first:
            ring, fresh = int(self._used.argmin()), True
            self._owner[ring], self._ring[first] = first, ring
        if fresh:
            self.positions[ring] = -1
        self._used[ring] = self._clock
        return ring
