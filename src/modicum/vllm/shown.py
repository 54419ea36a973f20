"""Shown: what a policy sees of requests whose tokens lie in pages, which are read only if asked for."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from modicum.kv.bank import Candidates
from modicum.vllm.pages import Pages


class Held:
    """The pair of keys and values [L·R, H, slots, D] of R requests in L layers, copied when read.

    Args:
        layers: their pages.
        used: [R, P] the requests' pages that `slots` fill.
    """

    def __init__(self, layers: Sequence[Pages], used: Tensor, slots: int) -> None:
        self.layers, self.used, self.slots = layers, used, slots

    def __getitem__(self, which: int) -> Tensor:
        found = [
            pages.read((pages.keys, pages.values)[which], self.used, self.slots) for pages in self.layers
        ]
        return found[0] if len(found) == 1 else torch.cat(found)

    def __iter__(self) -> Iterator[Tensor]:
        return (self[which] for which in (0, 1))

    def dot(self, vectors: Tensor) -> Tensor:
        """Each of M vectors times each key: [L·R, H, M, D] fp32 -> [L·R, H, M, slots] fp32."""
        _, heads, m, _ = vectors.shape
        split = vectors.view(len(self.layers), -1, *vectors.shape[1:])
        found = self.layers[0].dot(self.layers, self.used, split)  # [L, R, H, P, M, block]
        return found.transpose(3, 4).reshape(len(vectors), heads, m, -1)[..., : self.slots]

    def weigh(self, weights: Tensor) -> Tensor:
        """Sums of the keys: weights [L·R, H, M, slots] fp32 -> [L·R, H, M, D] fp32."""
        number, heads, m, slots = weights.shape
        block = self.layers[0].block
        padded = F.pad(weights, (0, -slots % block))
        split = padded.view(len(self.layers), -1, heads, m, self.used.shape[1], block).transpose(3, 4)
        found = self.layers[0].weigh(self.layers, self.used, split)  # [L, R, H, M, D]
        return found.view(number, heads, m, -1)


class Shown(Candidates):
    """A view of them; products with keys, and their sums, are made where the keys lie."""

    def __init__(self, held: Held, **given: Any) -> None:
        super().__init__(parts=(held,), valid=None, protected=None, **given)  # type: ignore[arg-type]
        self._held = held

    def dot_keys(self, vectors: Tensor) -> Tensor:
        return self._held.dot(vectors)

    def sum_keys(self, weights: Tensor) -> Tensor:
        shape = weights.shape
        found = self._held.weigh(weights.reshape(*shape[:2], -1, shape[-1]))
        return found.view(*shape[:-1], found.shape[-1])
