"""Group: the arenas of all layers that have one capacity, as a decode step of all layers sees them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from modicum.kv.bank import Bank
from modicum.kv.span import Span


@dataclass
class Place:
    """Where a bank's newcomers go, and what its attention leaves for the score."""

    bank: Bank
    alone: Span
    """This bank by itself."""
    at: Tensor
    """[b·h] each head's free slot among the bank's b·h·S."""
    keys: Tensor
    """[b·h·S, Ck], the bank's, as `at` counts them."""
    values: Tensor
    dots: Tensor | None = None
    """`View.dots`, [b, h, S]"""
    logits: Tensor | None = None
    """[b, h, G, S]"""


class Group:
    """The banks of all layers that have one capacity and are of one kind: M pairs of a row and a head."""

    def __init__(self, banks: list[Bank], layers: list[int], rows: int, tile: int) -> None:
        self.banks, self.layers = banks, layers
        device, slots = banks[0].arena.keys.device, banks[0].arena.capacity + 1
        edges = [0]
        for bank in banks:
            edges.append(edges[-1] + bank.arena.keys.shape[0] * bank.arena.keys.shape[1])
        self.edges = edges
        first = [torch.arange(b - a) * slots for a, b in pairwise(edges)]
        self.first = torch.cat(first).to(device)  # [M] index of each pair's first slot among its bank's
        self.hole = torch.zeros(edges[-1], dtype=torch.int64, device=device)
        self.at = torch.zeros(edges[-1], dtype=torch.int64, device=device)
        self.live = torch.zeros(rows, dtype=torch.int64, device=device)
        """[B] slots in use in each row."""
        self.spans = []
        for i in range(0, len(banks), tile):
            j = min(len(banks), i + tile)
            hole = self.hole[edges[i] : edges[j]]
            self.spans.append(Span.of(banks[i:j], layers[i:j], self.live, hole))

    def places(self) -> Iterator[tuple[int, Place]]:
        """Each bank's layer and place."""
        for i, (layer, bank) in enumerate(zip(self.layers, self.banks, strict=True)):
            arena = bank.arena
            run = slice(self.edges[i], self.edges[i + 1])
            free = self.hole[run].view(arena.keys.shape[:2])
            keys, values = arena.keys.flatten(0, 2), arena.values.flatten(0, 2)
            alone = Span.single(bank, layer, self.live, free, self.first[run])
            yield layer, Place(bank, alone, self.at[run], keys, values)

    def enter(self) -> None:
        """Take the free slots and counts from the arenas, which from now on have them from here."""
        for i, bank in enumerate(self.banks):
            arena = bank.arena
            free = self.hole[self.edges[i] : self.edges[i + 1]].view(arena.keys.shape[:2])
            live = torch.tensor(arena.live, device=free.device)
            if arena.hole is None:
                free.copy_(live[:, None].expand_as(free))
            elif arena.hole.data_ptr() != free.data_ptr():
                free.copy_(arena.hole)
            arena.hole = free
            self.live.copy_(live)
        self.at.copy_(self.hole + self.first)
