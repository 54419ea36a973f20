"""Reads of one layer's keys and values by later layers of the same call (Gemma 3n, Gemma 4).

Such a layer evicts before the others attend. So it keeps, until the last of them has, what each chunk of the
call attended to: copies of what was held, and the chunk itself.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
from torch import Tensor

from modicum.kv import attend
from modicum.kv.bank import Bank, Virtual
from modicum.kv.call import Piece


@dataclass
class HeldCopy:
    """What some rows and heads held before a chunk."""

    rows: slice
    heads: slice
    keys: Tensor
    """[b, h, n, Dk]"""
    values: Tensor
    valid: Tensor | None
    """[b, h, n] bool, or None if every slot holds a token."""
    virtual: Virtual | None

    @classmethod
    def of(cls, bank: Bank) -> HeldCopy:
        """Copy what a bank holds."""
        bank.arena.settle()
        n = bank.arena.used
        keys, values = (x.clone() for x in bank.held(n))
        valid = bank.arena.valid(n) if n else None
        return cls(bank.rows, bank.heads, keys, values, valid, copy.deepcopy(bank.virtual))


@dataclass
class SharedRead:
    """One chunk of a call and what its layer held before it."""

    piece: Piece
    held: list[HeldCopy]
    key: Tensor
    """[B, H, m, Dk] of the chunk"""
    value: Tensor

    @property
    def nbytes(self) -> int:
        """Bytes of the copies and of the chunk."""
        copies = sum(part.keys.nbytes + part.values.nbytes for part in self.held)
        return copies + self.key.nbytes + self.value.nbytes

    def attend(self, query: Tensor, scaling: float, softcap: float | None, sinks: Tensor | None) -> Tensor:
        """Attend with another layer's queries.

        query [B, H, G, t, Dk] of the chunk's last t tokens, sinks [H, G] -> [B, H, G, t, Dv].
        """
        out = query.new_empty(*query.shape[:-1], self.value.shape[-1])
        for part in self.held:
            at = (part.rows, part.heads)
            valid = None if self.piece.valid is None else self.piece.valid[part.rows]
            held = (part.keys, part.values) if part.keys.shape[2] else None
            q, k, v = query[at], self.key[at], self.value[at]
            own, lse = attend.chunk(q, held, part.valid, k, v, valid, scaling, softcap)
            if part.virtual is not None:
                b, h, g, m, _ = own.shape
                flat = q.reshape(b, h, g * m, -1), own.reshape(b, h, g * m, -1), lse.reshape(b, h, g * m)
                joined, total = part.virtual.join(*flat, scaling, softcap)
                own, lse = joined.view(own.shape), total.view(lse.shape)
            if sinks is not None:
                own = attend.with_sinks(own, lse, sinks[part.heads])
            out[at] = own
        return out


class SharedReads:
    """The chunks of the call under way, until every layer that reads them has.

    Args:
        num_readers: layers that read them.
    """

    def __init__(self, num_readers: int) -> None:
        self.num_readers = num_readers
        self.left = 0
        self.reads: list[SharedRead] = []

    def begin(self) -> None:
        """A call begins: forget the one before, should it have been cut short."""
        self.reads, self.left = [], self.num_readers

    def add(self, piece: Piece, banks: list[Bank], key: Tensor, value: Tensor) -> int:
        """Keep a chunk and what is held before it; returns the bytes now kept."""
        self.reads.append(SharedRead(piece, [HeldCopy.of(bank) for bank in banks], key, value))
        return sum(read.nbytes for read in self.reads)

    def attend(self, query: Tensor, scaling: float, softcap: float | None, sinks: Tensor | None) -> Tensor:
        """The attention of a layer that reads.

        query [B, H, G, q, Dk] of the call's last q tokens -> [B, H, G, q, Dv].
        """
        dropped = self.reads[-1].piece.stop - query.shape[3]
        outs = []
        for read in self.reads:
            first, last = (max(0, edge - dropped) for edge in (read.piece.start, read.piece.stop))
            if first < last:
                outs.append(read.attend(query[:, :, :, first:last], scaling, softcap, sinks))
        self.left -= 1
        if self.left <= 0:
            self.reads = []
        return outs[0] if len(outs) == 1 else torch.cat(outs, dim=3)
