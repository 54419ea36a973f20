"""QueryRing: the last queries of a layer, from which attention rows are made again when a policy scores."""

from __future__ import annotations

import torch
from torch import Tensor

from modicum.kv.call import Piece
from modicum.kv.stack import Stack


class QueryRing:
    """The last R columns' queries of every head, in no order that matters, written in place."""

    def __init__(
        self,
        rows: int,
        heads: int,
        group: int,
        room: int,
        dim: int,
        dtype: torch.dtype,
        device: torch.device,
        stack: Stack | None = None,
        line: Stack | None = None,
    ) -> None:
        stack = stack or Stack(rows * heads, self.parts(group, room, dim, dtype), device)
        line = line or Stack(rows, self.line(room), device)
        self.queries = stack.take(rows, heads)["queries"]  # [B, H, G, R, Dk]
        self.positions = line.take(rows, 1)["positions"][:, 0]  # [B, R], -1 for none
        self.next = 0

    @staticmethod
    def parts(
        group: int, room: int, dim: int, dtype: torch.dtype
    ) -> dict[str, tuple[tuple[int, ...], torch.dtype, float]]:
        """What a `Stack` of rings holds for each pair of a row and a head."""
        return {"queries": ((group, room, dim), dtype, 0)}

    @staticmethod
    def line(room: int) -> dict[str, tuple[tuple[int, ...], torch.dtype, float]]:
        """What it holds for each row."""
        return {"positions": ((room,), torch.int32, -1)}

    @property
    def nbytes(self) -> int:
        """Bytes of live storage."""
        return self.queries.nbytes + self.positions.nbytes

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

    def select_rows(self, index: Tensor, stack: Stack | None = None, line: Stack | None = None) -> None:
        """Rows become rows[index]; as many stay in their place, others move into the stacks' room."""
        index = index.to(self.queries.device)
        rows, heads, group, room, dim = self.queries.shape
        if len(index) == rows:
            self.queries.copy_(self.queries.index_select(0, index))
            self.positions.copy_(self.positions.index_select(0, index))
            return
        size = (len(index), heads, group, room, dim, self.queries.dtype, index.device)
        other = QueryRing(*size, stack, line)
        torch.index_select(self.queries, 0, index, out=other.queries)
        torch.index_select(self.positions, 0, index, out=other.positions)
        self.queries, self.positions = other.queries, other.positions

    def sort(self, oldest: Tensor) -> None:
        """Put each row's queries in order, the oldest first; they begin at oldest [B] and go round."""
        room = self.queries.shape[3]
        order = (oldest[:, None] + torch.arange(room, device=oldest.device)) % room
        self.queries.copy_(_pick(self.queries, order))
        self.positions.copy_(self.positions.gather(1, order))
        self.next = 0


def _pick(queries: Tensor, index: Tensor) -> Tensor:
    """Each row's queries [B, H, G, n, Dk] at index [B, r]: [B, H, G, r, Dk]."""
    b, h, g, _, d = queries.shape
    return queries.gather(3, index[:, None, None, :, None].expand(b, h, g, -1, d))
