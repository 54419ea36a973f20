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
        if piece.valid is not None:
            self._write_padded(query, positions)
            return
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

    def _write_padded(self, query: Tensor, positions: Tensor) -> None:
        """As `write`, row by row: no pad displaces a query, so that a batch changes no row."""
        room = self.queries.shape[3]
        fresh = positions.topk(min(room, positions.shape[1]), dim=1).indices
        queries = torch.cat([self.queries, _pick(query, fresh)], dim=3)
        positions = torch.cat([self.positions, positions.gather(1, fresh)], dim=1)
        last = positions.topk(room, dim=1).indices.flip(1)  # oldest first, as `next` goes
        self.queries.copy_(_pick(queries, last))
        self.positions.copy_(positions.gather(1, last))
        self.next = 0

    def select_rows(self, index: Tensor) -> None:
        """Rows become rows[index]."""
        index = index.to(self.queries.device)
        self.queries = self.queries.index_select(0, index)
        self.positions = self.positions.index_select(0, index)


def _pick(queries: Tensor, index: Tensor) -> Tensor:
    """Each row's queries [B, H, G, n, Dk] at index [B, r]: [B, H, G, r, Dk]."""
    b, h, g, _, d = queries.shape
    return queries.gather(3, index[:, None, None, :, None].expand(b, h, g, -1, d))
