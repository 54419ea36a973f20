"""Span: arenas that are scored together in a decode step, as R rows of H heads of one capacity and kind."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from modicum.kv.bank import Bank, Virtual
from modicum.kv.stack import joined


@dataclass
class Span:
    """Tensors over the arenas of some banks; views, nothing of its own."""

    banks: list[Bank]
    layers: list[int]
    """Which layer each bank is of, counted among those under the budget."""
    live: Tensor
    """[B] slots in use in each row of the batch."""
    hole: Tensor
    """[R, H] where each head's next token goes."""
    keys: Tensor
    """[R, H, S, Ck]"""
    values: Tensor
    positions: Tensor
    """[R, H, S]"""
    state: Tensor
    """[R, H, S, F]"""
    sums: Tensor
    """[R, H, F']"""
    tally: Tensor
    """[R, H, F'']"""
    virtual: Virtual | None
    row: Tensor | None
    """[R] the batch's row of each row; None where they are the same."""
    first: Tensor
    """[R·H] where the slots of each pair of a row and a head begin, all slots in one line."""

    @classmethod
    def single(cls, bank: Bank, layer: int, live: Tensor, hole: Tensor, first: Tensor) -> Span:
        """One bank, by its own tensors."""
        a = bank.arena
        own = (a.keys, a.values, a.positions, a.state, a.sums, a.tally)
        return cls([bank], [layer], live, hole, *own, bank.virtual, None, first)

    @classmethod
    def of(cls, banks: list[Bank], layers: list[int], live: Tensor, hole: Tensor) -> Span:
        """Banks that lie side by side; hole [M] of them.

        Raises:
            LookupError: they do not.
        """
        sizes = [bank.arena.keys.shape[:2] for bank in banks]
        heads = sizes[0][1] if all(size == sizes[0] for size in sizes) else 1

        def whole(parts: Sequence[Tensor]) -> Tensor:
            x = joined(parts)
            return x.view(len(x) // heads, heads, *x.shape[1:])

        arenas = [bank.arena for bank in banks]
        means = [bank.virtual for bank in banks if bank.virtual is not None]
        row = torch.cat([torch.arange(b).repeat_interleave(h // heads) for b, h in sizes])
        return cls(
            banks,
            layers,
            live,
            hole.view(-1, heads),
            whole([a.keys for a in arenas]),
            whole([a.values for a in arenas]),
            whole([a.positions for a in arenas]),
            whole([a.state for a in arenas]),
            whole([a.sums for a in arenas]),
            whole([a.tally for a in arenas]),
            Virtual(*(whole([getattr(v, n) for v in means]) for n in ("key", "value", "count")))
            if means
            else None,
            row.to(hole.device),
            torch.arange(len(hole), device=hole.device) * (banks[0].arena.capacity + 1),
        )

    @property
    def capacity(self) -> int:
        return self.banks[0].arena.capacity

    @property
    def streaming(self) -> bool:
        return self.banks[0].streaming

    @property
    def counted(self) -> bool:
        """Whether the policy keeps sums here."""
        return self.sums.shape[-1] > 0

    def per_row(self, x: Tensor) -> Tensor:
        """Numbers [B] of the batch's rows as numbers [R] of these."""
        if self.row is None:
            return x
        return x.expand(len(self.row)) if len(x) == 1 else x[self.row]

    def put(self, store: Tensor, slot: Tensor, x: Tensor) -> None:
        """Write x [R, H, …] into one slot [R, H] of each pair, in place: store [R, H, S, …], one of these."""
        if torch.compiler.is_compiling():  # a scatter that the compiler leaves in place
            store.index_put_(self._pairs(slot), x)
            return
        store.flatten(0, 2).index_copy_(0, self._line(slot), x.flatten(0, 1))

    def pick(self, slot: Tensor, *stores: Tensor) -> list[Tensor]:
        """One slot [R, H] of each pair: of each store [R, H, S, …], one of these, [R, H, …]."""
        if torch.compiler.is_compiling():
            return [store[self._pairs(slot)] for store in stores]
        line = self._line(slot)
        return [
            store.flatten(0, 2).index_select(0, line).view(*slot.shape, *store.shape[3:]) for store in stores
        ]

    def _line(self, slot: Tensor) -> Tensor:
        return slot.flatten() + self.first

    def _pairs(self, slot: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        row, head = (torch.arange(n, device=slot.device) for n in slot.shape)
        return row[:, None], head[None], slot

    def decoded(self) -> tuple[Tensor, Tensor]:
        """Keys [R, H, S, Dk] and values in the model's dtype."""
        bank = self.banks[0]
        keys = bank.store.keys.decode(self.keys, bank.dtype)
        return keys, bank.store.values.decode(self.values, bank.dtype)

    def new_keys(self) -> Tensor:
        """Keys [R, H, Dk] of the tokens that have come, in the model's dtype."""
        bank = self.banks[0]
        return bank.store.keys.decode(self.pick(self.hole, self.keys)[0], bank.dtype)

    def at(self, slot: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Key [R, H, 1, Dk] and value in fp32 or wider, and state [R, H, 1, F], of one slot of each head."""
        bank = self.banks[0]
        key, value, state = self.pick(slot, self.keys, self.values, self.state)
        parts = ((bank.store.keys, key), (bank.store.values, value))
        both = (codec.decode(x, bank.dtype) for codec, x in parts)
        key, value = (x.to(torch.promote_types(x.dtype, torch.float32)).unsqueeze(2) for x in both)
        return key, value, state.unsqueeze(2)
