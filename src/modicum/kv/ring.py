"""QueryRing: the last queries of a layer, from which attention rows are made again when a policy scores."""

from __future__ import annotations

import torch
from torch import Tensor

from modicum.kv.call import Piece


class QueryRing:
    """The last R columns' queries of every head, in no order that matters, written in place."""

    def __init__(
        self, rows: int, heads: int, group: int, room: int, dim: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        self.queries = torch.zeros(
            rows, heads, group, room, dim, dtype=dtype, device=device
        )  # [B, H, G, R, Dk]
        self.positions = torch.full((rows, room), -1, dtype=torch.int32, device=device)  # [B, R], -1 for none
        self.next = 0

    @property
    def nbytes(self) -> int:
        """Bytes of live storage."""
        return self.queries.untyped_storage().nbytes() + self.positions.untyped_storage().nbytes()

    def write(self, query: Tensor, piece: Piece) -> None:
        """Take in a piece's queries [B, H, G, m, Dk]; the oldest go."""
        room, m = self.queries.shape[3], piece.length
        positions = piece.positions.expand(query.shape[0], -1)
        if m >= room:
            self.queries.copy_(query[:, :, :, m - room :])
            self.positions.copy_(positions[:, m - room :])
            self.next = 0
            return
        if m == 1:
            self.queries[:, :, :, self.next] = query[:, :, :, 0]
            self.positions[:, self.next] = positions[:, 0]
        else:
            slot = (self.next + torch.arange(m, device=query.device)) % room
            self.queries.index_copy_(3, slot, query)
            self.positions.index_copy_(1, slot, positions)
        self.next = (self.next + m) % room

    def select_rows(self, index: Tensor) -> None:
        """Rows become rows[index]."""
        index = index.to(self.queries.device)
        self.queries = self.queries.index_select(0, index)
        self.positions = self.positions.index_select(0, index)
