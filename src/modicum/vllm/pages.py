"""Pages: the CPU backend's pages of one layer, read and rewritten token by token and head by head.

A page of a KV head is its keys, then its values. The "vec" kernels hold keys as [D, block], so that a query
meets a whole page at once, and values as [block, D].
"""

from __future__ import annotations

import torch
from torch import Tensor

ISA = "vec"
"""The kernels whose layout this is; those for AMX repack pages in tiles."""


class Pages:
    """All pages of a layer.

    Args:
        cache: [pages, H, block, 2·D] as vLLM binds it to the layer.
    """

    def __init__(self, cache: Tensor) -> None:
        pages, heads, block, both = cache.shape
        dim = both // 2
        flat = cache.view(pages, heads, 2, block * dim)
        self.keys = flat[:, :, 0].view(pages, heads, dim, block)  # [pages, H, D, block]
        self.values = flat[:, :, 1].view(pages, heads, block, dim)  # [pages, H, block, D]
        self.block = block

    def read(self, table: Tensor, slots: int) -> tuple[Tensor, Tensor]:
        """The first slots of some requests, whose pages are table [R, P]: copies [R, H, slots, D]."""
        used = table[:, : -(-slots // self.block)]
        keys = self.keys[used].permute(0, 2, 1, 4, 3)  # [R, H, P, block, D]
        values = self.values[used].transpose(1, 2)
        return keys.flatten(2, 3)[:, :, :slots], values.flatten(2, 3)[:, :, :slots]

    def move(self, head: Tensor, source: tuple[Tensor, Tensor], target: tuple[Tensor, Tensor]) -> None:
        """Copy tokens of heads [K] from pages and slots [K] to others; none is both source and target."""
        (from_page, from_slot), (to_page, to_slot) = source, target
        self.keys[to_page, head, :, to_slot] = self.keys[from_page, head, :, from_slot]
        self.values[to_page, head, to_slot] = self.values[from_page, head, from_slot]


def place(table: Tensor, row: Tensor, slot: Tensor, block: int) -> tuple[Tensor, Tensor]:
    """The page and the slot in it [K] of slots [K] of arenas; table [R, P], row [K] whose each slot is."""
    return table[row, torch.div(slot, block, rounding_mode="floor")].long(), slot % block
