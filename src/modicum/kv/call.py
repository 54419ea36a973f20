"""Call: one forward's new tokens, cut into pieces, with the position of each token in its row."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from modicum.errors import InputError


@dataclass(frozen=True)
class Piece:
    """At most `chunk` new tokens of every row, taken in together."""

    start: int
    stop: int
    positions: Tensor
    """[B|1, m] int32: position in the row, pads not counted; -1 for a pad. One line where all rows agree."""
    valid: Tensor | None
    """[B, m] bool, False for a pad; None when there is none."""
    counts: tuple[int, ...]
    """Tokens per row, pads not counted."""
    seen: tuple[int, ...]
    """Tokens each row has seen once this piece is in."""
    seen_tensor: Tensor
    """The same, [B] int64."""
    limit: Tensor
    """[B|1, 1, 1] int32: the positions from here on are recent. One number where all rows agree."""

    @property
    def length(self) -> int:
        return self.stop - self.start


@dataclass(frozen=True)
class Call:
    """The pieces of one forward, the same for every layer."""

    pieces: tuple[Piece, ...]
    counts: tuple[int, ...]
    """Tokens per row in the whole call, pads not counted."""
    after: tuple[int, ...]
    """Tokens each row has seen once the call is over."""


def cuts(length: int, chunk: int) -> list[tuple[int, int]]:
    """Cut a call from its end: first length mod chunk tokens, then whole chunks.

    So padding on the left moves no cut: a row's last tokens fall into the same pieces as they would alone.
    """
    first = length % chunk
    edges = ([0] if first else []) + list(range(first, length + 1, chunk))
    return list(pairwise(edges))


def read_call(
    before: tuple[int, ...], length: int, chunk: int, recent: int, mask: Tensor | None, device: torch.device
) -> Call:
    """Lay out a call of `length` columns for rows that have seen `before` tokens; the last `recent` are safe.

    mask: None, or [B, columns] with 0 for pads, of which the last `length` columns are this call's.
    """
    valid = None
    if mask is not None:
        if mask.dim() != 2 or mask.shape[0] != len(before) or mask.shape[1] < length:
            raise InputError(
                f"the attention mask has shape {tuple(mask.shape)}: a budget cache reads a two-dimensional "
                f"mask [{len(before)}, columns] whose last {length} columns are this call's"
            )
        valid = mask[:, mask.shape[1] - length :].to(device=device, dtype=torch.bool)
        if bool(valid.all()):
            valid = None
    pieces, seen = [], before
    for start, stop in cuts(length, chunk):
        if valid is None:
            part, counts = None, (stop - start,) * len(before)
        else:
            part = valid[:, start:stop]
            counts = tuple(part.sum(1).tolist())
            part = None if min(counts) == stop - start else part
        even = seen.count(seen[0]) == len(seen)
        base = torch.tensor(seen[:1] if even and part is None else seen, dtype=torch.int32, device=device)[
            :, None
        ]
        if part is None:
            positions = base + torch.arange(stop - start, dtype=torch.int32, device=device)
        else:
            positions = (base + part.cumsum(1, dtype=torch.int32) - 1).masked_fill(~part, -1)
        seen = tuple(s + c for s, c in zip(seen, counts, strict=True))
        ends = torch.tensor(seen, device=device)
        one = seen[:1] if seen.count(seen[0]) == len(seen) else seen
        limit = torch.tensor([n - recent for n in one], dtype=torch.int32, device=device)[:, None, None]
        pieces.append(Piece(start, stop, positions, part, counts, seen, ends, limit))
    return Call(tuple(pieces), tuple(a - b for a, b in zip(seen, before, strict=True)), seen)
