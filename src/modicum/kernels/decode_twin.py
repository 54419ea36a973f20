"""Decode attention in plain torch, over what a cache holds: the kernel's results on any device and dtype."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from modicum.kv.codec import Codec
from modicum.kv.compensation import virtual_logit

Bank = tuple[slice, slice, Tensor, Tensor]
"""Rows, heads, and the keys [b, h, S, Ck] and values [b, h, S, Cv] that these pairs hold."""
Virtual = tuple[Tensor, Tensor, Tensor]
"""Key [B, H, Dk], value [B, H, Dv] and number [B, H], all fp32: see `modicum.kv.compensation`."""
_ALIGNED = 16  # what Triton wants a number to be divisible by before it counts on wide loads


@dataclass(frozen=True)
class Decoded:
    """What one new token per row reads from its cache; fp32, or fp64 where the query is.

    Attributes:
        out: [B, H, G, Dv] in the query's dtype; 0 where nothing is held.
        lse: [B, H, G] log-sum-exp of the logits, virtual token included; -inf where nothing is held.
        logits: [B, H, G, N] scaled and soft-capped, -inf past a head's count, without the virtual token.
        row: [B, H, N] exp(logits - lse), joined over the group by "mean" or "max".
        dots: [B, H, N] probe · key, not scaled; 0 past a head's count.
    """

    out: Tensor
    lse: Tensor
    logits: Tensor | None
    row: Tensor | None
    dots: Tensor | None


@dataclass(frozen=True)
class Table:
    """Where each head's slots begin, for heads whose banks are of several sizes.

    Attributes:
        banks: the first one's tensors stand for all of them in a call.
        keys: [B, H] int64, where a head's keys begin: entries from the first bank's first.
        values: the same of the values.
        held: [B, H] int32, slots of each head's bank.
        slots: the largest of these: N.
        aligned: whether every head begins where the widest loads may.
    """

    banks: tuple[Bank, ...]
    keys: Tensor
    values: Tensor
    held: Tensor
    slots: int
    aligned: bool

    @classmethod
    def of(cls, banks: Iterable[Bank]) -> Table:
        """The table of banks that together cover every row and head once.

        Raises:
            ValueError: they do not, or they are not alike.
        """
        every = tuple(banks)
        if not every:
            raise ValueError("a table needs at least one bank")
        b = max((rows.start or 0) + keys.shape[0] for rows, _, keys, _ in every)
        h = max((heads.start or 0) + keys.shape[1] for _, heads, keys, _ in every)
        where = torch.zeros(2, b, h, dtype=torch.int64)
        held = torch.full((b, h), -1, dtype=torch.int32)
        for rows, heads, keys, values in every:
            part = (_run(rows, keys.shape[0]), _run(heads, keys.shape[1]))
            if bool((held[part] >= 0).any()):
                raise ValueError("two banks hold the same row and head")
            held[part] = keys.shape[2]
            for i, (first, other) in enumerate(((every[0][2], keys), (every[0][3], values))):
                where[i][part] = _offsets(first, other)
        if bool((held < 0).any()):
            raise ValueError(f"these banks do not cover all of {b} rows and {h} heads")
        if every[0][2].dtype == torch.uint8 and bool((where % 2).any()):
            raise ValueError("slots in 8 bits are read two codes at a time: a bank begins at an odd byte")
        device = every[0][2].device
        return cls(
            every,
            where[0].to(device),
            where[1].to(device),
            held.to(device),
            int(held.max()),
            not bool((where % _ALIGNED).any()),
        )


def decode(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    count: Tensor | None,
    scaling: float,
    *,
    form: str = "model",
    softcap: float | None = None,
    probe: Tensor | None = None,
    logits: bool = False,
    row: str | None = None,
    virtual: Virtual | None = None,
    table: Table | None = None,
) -> Decoded:
    """One query token per row against the first `count` slots of each KV head.

    query [B, H, G, Dk]; keys [B, H, S, Ck] and values [B, H, S, Cv] in the form of `Codec(form)`; count
    [B, H] int32, or None for all S; probe [B, H, Dk], of which dots are wanted as well; logits, row ("mean"
    or "max"): whether these are wanted; virtual: one more slot; table: keys and values are the first bank's
    of several. Nothing waits for a device.
    """
    if table is not None:
        return _ragged(query, count, scaling, form, softcap, probe, logits, row, virtual, table)
    wide = torch.promote_types(query.dtype, torch.float32)
    codec = Codec(form)
    q, k, v = query.to(wide), codec.decode(keys, wide).to(wide), codec.decode(values, wide).to(wide)
    z = (q @ k.mT) * scaling  # [B, H, G, S]
    if softcap is not None:
        z = softcap * torch.tanh(z / softcap)
    dots = None if probe is None else (k @ probe.to(wide).unsqueeze(-1)).squeeze(-1)
    if count is not None:
        past = torch.arange(z.shape[-1], device=z.device) >= count.unsqueeze(-1)  # [B, H, S]
        z = z.masked_fill(past.unsqueeze(2), -math.inf)
        v = v.masked_fill(past.unsqueeze(-1), 0.0)  # what stands there may be no number
        dots = None if dots is None else dots.masked_fill(past, 0.0)
    lse = torch.logsumexp(z, -1)
    if virtual is not None:
        more = virtual_logit(q, virtual[0].to(wide), virtual[2], scaling, softcap)  # [B, H, G]
        lse = torch.logaddexp(lse, more)
    origin = lse.masked_fill(lse == -math.inf, 0.0)  # where nothing is held every share is exp(-inf - 0) = 0
    share = torch.exp(z - origin.unsqueeze(-1))
    out = share @ v
    if virtual is not None:
        out = out + torch.exp(more - origin).unsqueeze(-1) * virtual[1].to(wide).unsqueeze(2)
    joined = None if row is None else share.mean(2) if row == "mean" else share.amax(2)
    return Decoded(out.to(query.dtype), lse, z if logits else None, joined, dots)


def _ragged(
    query: Tensor,
    count: Tensor | None,
    scaling: float,
    form: str,
    softcap: float | None,
    probe: Tensor | None,
    logits: bool,
    row: str | None,
    virtual: Virtual | None,
    table: Table,
) -> Decoded:
    """The same, one bank after the other."""
    b, h, g, _ = query.shape
    wide = torch.promote_types(query.dtype, torch.float32)
    out = query.new_empty(b, h, g, table.banks[0][3].shape[-1] - (Codec(form).columns(2) - 2))
    lse = query.new_empty(b, h, g, dtype=wide)
    z = query.new_full((b, h, g, table.slots), -math.inf, dtype=wide) if logits else None
    joined = None if row is None else query.new_zeros(b, h, table.slots, dtype=wide)
    dots = None if probe is None else query.new_zeros(b, h, table.slots, dtype=wide)
    for rows, heads, keys, values in table.banks:
        part = (_run(rows, keys.shape[0]), _run(heads, keys.shape[1]))
        some = decode(
            query[part],
            keys,
            values,
            None if count is None else count[part],
            scaling,
            form=form,
            softcap=softcap,
            probe=None if probe is None else probe[part],
            logits=logits,
            row=row,
            virtual=None if virtual is None else (virtual[0][part], virtual[1][part], virtual[2][part]),
        )
        out[part], lse[part] = some.out, some.lse
        for whole, piece in ((z, some.logits), (joined, some.row), (dots, some.dots)):
            if whole is not None and piece is not None:
                whole[part][..., : keys.shape[2]] = piece
    return Decoded(out, lse, z, joined, dots)


def _run(place: slice, length: int) -> slice:
    """The slice with both its ends, of so many entries."""
    start = place.start or 0
    if place.step not in (None, 1) or place.stop not in (None, start + length):
        raise ValueError(f"{place} does not name the {length} entries that its bank holds")
    return slice(start, start + length)


def _offsets(first: Tensor, other: Tensor) -> Tensor:
    """[b, h] int64: where each pair of `other` begins, in entries from the first entry of `first`."""
    alike = (other.dtype, other.device, other.stride()[2:]) == (first.dtype, first.device, first.stride()[2:])
    if not alike or other.shape[3] != first.shape[3]:
        raise ValueError("the banks of a table have one dtype, one device, one width and one stride of slots")
    apart, rest = divmod(other.data_ptr() - first.data_ptr(), first.element_size())
    if rest:
        raise ValueError(f"a bank of {first.dtype} begins {rest} bytes beside a whole entry")
    row = torch.arange(other.shape[0]) * other.stride(0)
    return apart + row[:, None] + torch.arange(other.shape[1]) * other.stride(1)
