"""Pages: the pages of one layer, read and rewritten token by token and head by head."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

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
        inner, by_slot = [], []
        for x in (keys, values):
            inside = torch.arange(x.shape[3], device=x.device)
            inner.append(inside * int(x.stride(3)) + int(x.storage_offset() - start))
            by_slot.append(torch.full_like(inside, int(x.stride(2))))
        # Where a token's numbers lie [Dk + Dv], from its page and head on: inner + slot · by_slot.
        self._inner, self._by_slot = torch.cat(inner), torch.cat(by_slot)

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

    def weigh(self, layers: Sequence[Pages], used: Tensor, weights: Tensor) -> Tensor:
        """The keys' sum with weights [L, R, H, P, M, block] fp32 -> [L, R, H, M, Dk] fp32."""
        keys = torch.stack([pages.keys[used] for pages in layers]).transpose(2, 3)
        return torch.matmul(weights, keys.float()).sum(3)

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
        count, rows, heads, m, dim = vectors.shape
        pages = used.shape[1]
        # Once for all layers: with few tokens each call costs as much as what it does.
        each = vectors.unsqueeze(3).expand(-1, -1, -1, pages, -1, -1)
        each = each.reshape(count, rows * heads * pages, m, dim)
        out = vectors.new_empty(count, rows * heads * pages, m, self.block)
        for layer, part, keys in self._walk(layers, used):
            torch.bmm(each[layer, part], keys, out=out[layer, part])
        return out.view(count, rows, heads, pages, m, self.block)

    def weigh(self, layers: Sequence[Pages], used: Tensor, weights: Tensor) -> Tensor:
        count, rows, heads, pages, m, block = weights.shape
        flat = weights.reshape(count, rows * heads * pages, m, block)
        out = weights.new_empty(count, rows * heads * pages, m, self.key_dim)
        for layer, part, keys in self._walk(layers, used):
            torch.bmm(flat[layer, part], keys.transpose(1, 2), out=out[layer, part])
        return out.view(count, rows, heads, pages, m, -1).sum(3)

    def _walk(self, layers: Sequence[Pages], used: Tensor) -> Iterator[tuple[int, slice, Tensor]]:
        """The keys of a few requests at a time, [K, D, block] fp32 as they lie, through room that stays warm:
        which layer's, and which of its R·H·P pages of heads.
        """
        rows, heads, width, dtype = len(used), self.heads, self.block * self.key_dim, self._lines.dtype
        size = heads * used.shape[1]
        some = min(rows, max(1, _WARM // (size * width * dtype.itemsize)))
        lines = (used.unsqueeze(1) * (2 * heads) + self._of_head).flatten()  # [R·H·P] of the keys
        room = self._room.of(some * size, width, dtype)
        parts = []
        for start in range(0, rows * size, some * size):
            part = slice(start, min(start + some * size, rows * size))
            here = room[: part.stop - part.start]
            parts.append((part, lines[part], here, here.view(-1, self.key_dim, self.block)))
        for number, layer in enumerate(layers):
            assert isinstance(layer, VecPages)
            for part, where, here, keys in parts:
                torch.index_select(layer._lines, 0, where, out=here)
                yield number, part, keys if dtype == torch.float32 else keys.float()


def place(table: Tensor, row: Tensor, slot: Tensor, block: int) -> tuple[Tensor, Tensor]:
    """The page and the slot in it [K] of slots [K] of arenas; table [R, P], row [K] whose each slot is."""
    return table[row, torch.div(slot, block, rounding_mode="floor")].long(), slot % block
