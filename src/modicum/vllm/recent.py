"""Recent: the last queries of each running request, from which attention rows are made again."""

from __future__ import annotations

import torch
from torch import Tensor

from modicum.vllm.step import Step


class Recent:
    """Rings of the last `window` queries in all layers, for as many requests as may run at once.

    A request whose place was taken while it waited (`Step.fresh`) is scored by fewer queries.
    """

    def __init__(
        self,
        layers: int,
        requests: int,
        heads: int,
        group: int,
        window: int,
        dim: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.window = window
        self.queries = torch.zeros(layers, requests, window, heads, group, dim, dtype=dtype, device=device)
        self.positions = torch.full((requests, window), -1, dtype=torch.int64, device=device)
        self._where: tuple[Tensor, Tensor, Tensor] | None = None

    @property
    def nbytes(self) -> int:
        return self.queries.nbytes + self.positions.nbytes

    def begin(self, step: Step) -> None:
        """Work out which of a step's tokens are to be kept, and where."""
        if step.begins:
            self.positions[step.ring[step.fresh]] = -1
        token = (step.position >= step.seen[step.row] - self.window).nonzero()[:, 0]
        position = step.position[token].long()
        ring = step.ring[step.row[token]]
        self.positions[ring, position % self.window] = position
        self._where = token, ring, position % self.window

    def take_in(self, layer: int, query: Tensor) -> None:
        """query [T, Hq, D] of that step."""
        assert self._where is not None
        token, ring, at = self._where
        self.queries[layer, ring, at] = query[token].view(len(token), *self.queries.shape[3:])

    def of(self, layers: slice, ring: Tensor) -> tuple[Tensor, Tensor]:
        """The queries [L·R, H, G, W, D] in some places and their positions [L·R, W], -1 for none."""
        queries = self.queries[layers, ring].permute(0, 1, 3, 4, 2, 5).flatten(0, 1)
        positions = self.positions[ring]
        return queries, positions.repeat(len(queries) // len(positions), 1)
