"""Pages: the pages of one layer, read and rewritten token by token and head by head."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

ISA = "vec"
"""The CPU kernels whose layout `VecPages` is; those for AMX repack pages in tiles."""

_WARM = 2**20  # bytes of keys read at a time: less than a core's second-level cache


class Pages:
    """All pages of a layer, as views of one storage.

    Args:
        keys: [pages, H, block, Dk].
        values: [pages, H, block, Dv].
    """

    def __init__(self, keys: Tensor, values: Tensor) -> None:
        self.keys, self.values = keys, values
        self.number, self.heads, self.block, self.key_dim = keys.shape
        self.value_dim = values.shape[3]
        start = min(keys.storage_offset(), values.storage_offset())
        end = 1 + max(
            x.storage_offset() + sum((n - 1) * s for n, s in zip(x.shape, x.stride(), strict=True))
            for x in (keys, values)
        )
        self._flat = keys.as_strided((end - start,), (1,), start)
        assert keys.stride()[:2] == values.stride()[:2]
        self._by_page, self._by_head = keys.stride()[:2]
        inner = [
            x.storage_offset() - start + x.stride(3) * torch.arange(x.shape[3], device=x.device)
            for x in (keys, values)
        ]
        self._inner = torch.cat(inner)  # [Dk + Dv] where a token's numbers lie from its page and head on
        self._by_slot = torch.cat(
            [torch.full_like(i, x.stride(2)) for i, x in zip(inner, (keys, values), strict=True)]
        )

    def used(self, table: Tensor, slots: int) -> Tensor:
        """The pages of table [R, P] that the first slots fill."""
        return table[:, : -(-slots // self.block)].long()

    def read(self, of: Tensor, used: Tensor, slots: int) -> Tensor:
        """The first slots of requests that used [R, P] hold: [R, H, slots, D] of `keys` or `values`."""
        return of[used].transpose(1, 2).flatten(2, 3)[:, :, :slots]

    def dot(self, layers: Sequence[Pages], used: Tensor, vectors: Tensor) -> Tensor:
        """Vectors [L, R, H, M, Dk] fp32 times each key of pages used [R, P] of some layers: [L, R, H, P, M,
        block] fp32.
        """
        keys = torch.stack([pages.keys[used] for pages in layers]).transpose(2, 3)  # [L, R, H, P, block, Dk]
        return torch.matmul(vectors.unsqueeze(3), keys.float().transpose(-1, -2))

    def numbers(self, page: Tensor, head: Tensor, slot: Tensor) -> Tensor:
        """[..., Dk + Dv]: where the numbers of tokens lie; page, head and slot [...].

        The same in all layers, whose pages are alike.
        """
        head_of_page = page * self._by_page + head * self._by_head
        return head_of_page.unsqueeze(-1) + slot.unsqueeze(-1) * self._by_slot + self._inner

    def take(self, numbers: Tensor) -> Tensor:
        """What lies there: numbers [..., Dk + Dv] as `numbers` gave them -> the same shape."""
        return self._flat.index_select(0, numbers.flatten()).view(numbers.shape)

    def put(self, numbers: Tensor, what: Tensor) -> None:
        """Write it; no token twice."""
        self._flat.index_copy_(0, numbers.flatten(), what.flatten())


class Room:
    """Where a request's keys are copied to be read; used again and again, so that it stays warm."""

    def __init__(self) -> None:
        self._numbers = torch.empty(0)

    def of(self, lines: int, width: int, dtype: torch.dtype) -> Tensor:
        """[lines, width] of anything."""
        if self._numbers.dtype != dtype or len(self._numbers) < lines * width:
            self._numbers = torch.empty(lines * width, dtype=dtype)
        return self._numbers[: lines * width].view(lines, width)


class VecPages(Pages):
    """Pages as vLLM's "vec" kernels for CPUs have them.

    A page of a KV head is its keys, then its values; keys as [D, block], so that a query meets a whole page
    at once, and values as [block, D].

    Args:
        cache: [pages, H, block, 2·D] as vLLM binds it to the layer.
        room: of all layers.
    """

    def __init__(self, cache: Tensor, room: Room) -> None:
        pages, heads, block, both = cache.shape
        dim = both // 2
        halves = cache.view(pages, heads, 2, block * dim)
        keys = halves[:, :, 0].view(pages, heads, dim, block).transpose(2, 3)
        super().__init__(keys, halves[:, :, 1].view(pages, heads, block, dim))
        self._lines = cache.view(pages * heads * 2, block * dim)
        self._of_head = torch.arange(heads)[:, None] * 2
        self._room = room

    def dot(self, layers: Sequence[Pages], used: Tensor, vectors: Tensor) -> Tensor:
        """A few requests at a time, through room that stays warm, and without turning keys around."""
        count, rows, heads, m, dim = vectors.shape
        pages, width, dtype = used.shape[1], self.block * dim, self._lines.dtype
        some = min(rows, max(1, _WARM // (heads * pages * width * dtype.itemsize)))
        lines = (used.unsqueeze(1) * (2 * heads) + self._of_head).view(rows, -1)  # [R, H·P] of the keys
        where = [part.flatten() for part in torch.split(lines, some)]
        room = self._room.of(some * heads * pages, width, dtype)
        rooms = [room[: len(part)] for part in where]
        keys = [part.view(-1, dim, self.block) for part in rooms]
        # Once for all layers: with few tokens each call costs as much as what it does.
        each = vectors.unsqueeze(4).transpose(3, 4).expand(-1, -1, -1, pages, -1, -1)
        each = each.reshape(count, rows * heads * pages, m, dim)
        out = vectors.new_empty(count, rows * heads * pages, m, self.block)
        size = some * heads * pages
        for layer, vector, to in zip(layers, each, out, strict=True):
            assert isinstance(layer, VecPages)
            for at, place, line, key in zip(range(rows), where, rooms, keys, strict=False):
                torch.index_select(layer._lines, 0, place, out=line)
                key = key if dtype == torch.float32 else key.float()
                part = slice(at * size, (at + 1) * size)
                torch.bmm(vector[part], key, out=to[part])
        return out.view(count, rows, heads, pages, m, self.block)


def place(table: Tensor, row: Tensor, slot: Tensor, block: int) -> tuple[Tensor, Tensor]:
    """The page and the slot in it [K] of slots [K] of arenas; table [R, P], row [K] whose each slot is."""
    return table[row, torch.div(slot, block, rounding_mode="floor")].long(), slot % block
