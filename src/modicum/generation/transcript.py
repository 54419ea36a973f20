"""Transcript: the tokens a cache has been told: samplers look at them, positions are counted from them."""

from __future__ import annotations

from typing import Self

import torch
from torch import Tensor

from modicum.kv.cache import BudgetCache

_NAME = "transcript"


class Transcript:
    """Columns of token ids [B, n], which of them are not padding, and the logits after the last one.

    Kept in buffers that are made large enough beforehand (`reserve`): small blocks of memory allocated
    between the large passing ones of each chunk fragment the heap, and a process grows with its prompt.
    """

    def __init__(self, rows: int) -> None:
        self._ids = torch.empty(rows, 0, dtype=torch.int64)
        self._valid = torch.empty(rows, 0, dtype=torch.bool)
        self.length = 0
        self.logits: Tensor | None = None
        """[B, vocabulary] after the last token of each row; None if the cache was fed by others."""

    @classmethod
    def of(cls, cache: BudgetCache, rows: int, pad: int) -> Self:
        """The cache's own transcript, brought up to date if the cache was fed elsewhere.

        What it was told there is not known: `pad` stands in for it. Padding is taken to be on the left, and
        `row_seen` says how much of it there is.
        """
        told = getattr(cache, _NAME, None)
        seen = cache.seen
        counts = torch.tensor(cache.row_seen if seen else (0,) * rows)
        if not cache.shape.full and isinstance(told, cls) and told.rows == rows:
            # Layers with a window do not know padding: the transcript is believed, all else held for tokens.
            counts = told.valid.sum(1) + max(0, seen - told.length)
        if not isinstance(told, cls) or not told._agrees(counts, seen):
            told = cls(rows)
        if told.length < seen:
            missing = seen - told.length
            unknown = counts - told.valid.sum(1)
            valid = torch.arange(missing) >= (missing - unknown)[:, None]
            told.add(torch.full((rows, missing), pad), valid)
            told.logits = None
        setattr(cache, _NAME, told)  # so that `cache.copy()` takes it along
        return told

    @property
    def rows(self) -> int:
        """B."""
        return self._ids.shape[0]

    def _agrees(self, counts: Tensor, seen: int) -> bool:
        """Whether the cache can have been told this, and perhaps more afterwards."""
        if self.rows != len(counts) or self.length > seen:
            return False
        more = counts - self.valid.sum(1)
        return bool(((more >= 0) & (more <= seen - self.length)).all())

    def reserve(self, more: int) -> None:
        """Make room for so many columns more."""
        if self.length + more <= self._ids.shape[1]:
            return
        self._ids, old = self._ids.new_empty(self._ids.shape[0], self.length + more), self.ids
        self._ids[:, : self.length] = old
        self._valid, old = self._valid.new_empty(self._ids.shape), self.valid
        self._valid[:, : self.length] = old

    def add(self, ids: Tensor, valid: Tensor | None) -> None:
        """Note columns [B, n] that the cache has been told."""
        self.reserve(ids.shape[1])
        new = slice(self.length, self.length + ids.shape[1])
        self._ids[:, new] = ids
        self._valid[:, new] = True if valid is None else valid
        self.length = new.stop

    @property
    def ids(self) -> Tensor:
        """[B, length] int64 on the CPU."""
        return self._ids[:, : self.length]

    @property
    def valid(self) -> Tensor:
        """[B, length] bool on the CPU, False for padding."""
        return self._valid[:, : self.length]
