"""Transcript: the tokens a cache has been told: samplers look at them, positions are counted from them."""

from __future__ import annotations

from typing import Self

import torch
from torch import Tensor

from modicum.kv.cache import BudgetCache

_NAME = "transcript"


class Transcript:
    """Columns of token ids [B, n], which of them are not padding, and the logits after the last one."""

    def __init__(self, ids: Tensor, valid: Tensor) -> None:
        self._ids, self._valid = [ids], [valid]
        self.length = ids.shape[1]
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
        if not isinstance(told, cls) or not told._agrees(counts, seen):
            empty = torch.zeros(rows, 0)
            told = cls(empty.long(), empty.bool())
        if told.length < seen:
            missing = seen - told.length
            unknown = counts - told.valid.sum(1)
            valid = torch.arange(missing) >= (missing - unknown)[:, None]
            told.add(torch.full((rows, missing), pad), valid)
            told.logits = None
        setattr(cache, _NAME, told)  # so that `cache.copy()` takes it along
        return told

    def _agrees(self, counts: Tensor, seen: int) -> bool:
        """Whether the cache can have been told this, and perhaps more afterwards."""
        if self._ids[0].shape[0] != len(counts) or self.length > seen:
            return False
        more = counts - self.valid.sum(1)
        return bool(((more >= 0) & (more <= seen - self.length)).all())

    def add(self, ids: Tensor, valid: Tensor | None) -> None:
        """Note columns [B, n] that the cache has been told."""
        self._ids.append(ids)
        self._valid.append(torch.ones_like(ids, dtype=torch.bool) if valid is None else valid)
        self.length += ids.shape[1]

    @property
    def ids(self) -> Tensor:
        """[B, length] int64 on the CPU."""
        self._ids = [torch.cat(self._ids, dim=1)]
        return self._ids[0]

    @property
    def valid(self) -> Tensor:
        """[B, length] bool on the CPU, False for padding."""
        self._valid = [torch.cat(self._valid, dim=1)]
        return self._valid[0]
