"""Stack: the arenas of all layers that are of one size, side by side in one storage.

A decode step can then score all of them in one go: a dozen operations instead of a dozen for each layer,
which is what a step costs where the tensors are small and where each operation is a kernel to launch.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

import torch
from torch import Tensor


class Stack:
    """Tensors [M, …] for M pairs of a row and a KV head, handed out in runs.

    Args:
        entries: M, of all layers together.
        parts: name -> shape behind M, dtype and what the tensor is filled with.
    """

    def __init__(
        self,
        entries: int,
        parts: dict[str, tuple[tuple[int, ...], torch.dtype, float]],
        device: torch.device,
    ) -> None:
        self._whole = {
            name: torch.full((entries, *shape), fill, dtype=dtype, device=device)
            for name, (shape, dtype, fill) in parts.items()
        }
        self.device = device
        self._next = 0

    def take(self, rows: int, heads: int) -> dict[str, Tensor]:
        """The next rows · heads entries, each tensor as [rows, heads, …]."""
        start = self._next
        self._next = start + rows * heads
        return {
            name: whole[start : self._next].view(rows, heads, *whole.shape[1:])
            for name, whole in self._whole.items()
        }


def joined(parts: Sequence[Tensor]) -> Tensor:
    """One tensor [M, …] over parts [rows, heads, …] that lie one behind the other in one storage.

    Raises:
        LookupError: they do not.
    """
    first = parts[0]
    inside = first.shape[2:]
    total, at = 0, first.storage_offset()
    where = first.untyped_storage().data_ptr()
    for part in parts:
        alike = part.dtype == first.dtype and part.shape[2:] == inside and part.is_contiguous()
        astray = part.untyped_storage().data_ptr() != where or part.storage_offset() != at
        if not alike or (astray and 0 not in inside):
            raise LookupError("these tensors do not lie side by side")
        total += part.shape[0] * part.shape[1]
        at += part.numel()
    if 0 in inside:
        return first.new_empty(total, *inside)
    strides = [prod(inside[i + 1 :]) for i in range(len(inside))]
    return first.as_strided((total, *inside), (prod(inside), *strides), first.storage_offset())
