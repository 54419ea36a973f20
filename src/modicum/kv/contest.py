"""Contest: the heads of a row compete for its slots, and their arenas change size (Ada-KV)."""

from __future__ import annotations

import torch
from torch import Tensor

from modicum.kv.bank import Bank, Moment, Setting
from modicum.kv.choice import compete
from modicum.kv.shared import Shared


def take_in(
    banks: list[Bank],
    setting: Setting,
    moments: list[Moment],
    shared: Shared,
    budget: int,
    sure: int,
    query: Tensor,
    key: Tensor,
    value: Tensor,
) -> Tensor:
    """Take a piece of several tokens in, one arena per row and head; `budget` slots a head on average.

    query [B, H, G, m, Dk], key [B, H, m, Dk], value [B, H, m, Dv] -> [B, H, G, m, Dv]. Each head is sure of
    its `sure` best tokens. Head budgets are settled here; in decode each head lets one of its own go.
    """
    heads, m = key.shape[1], moments[0].piece.length
    out = value.new_empty(*query.shape[:-1], value.shape[-1])
    for row in range(query.shape[0]):
        block = [
            (bank, moment) for bank, moment in zip(banks, moments, strict=True) if bank.rows.start == row
        ]
        if moments[0].piece.counts[row] <= 1:  # in decode, whatever the other rows take
            for bank, moment in block:
                at = (bank.rows, bank.heads)
                out[at] = bank.attend(setting, moment, query[at], key[at], value[at])
            continue
        views, scores = [], []
        for bank, moment in block:
            at = (bank.rows, bank.heads)
            out[at], view = bank.look(setting, moment, query[at], key[at], value[at])
            views.append(view)
            scores.append(bank.score(setting, view)[0, 0])
            if view.state is not None:  # what the policy observed moves with the tokens
                bank.arena.state[:, :, : bank.arena.used] = view.state[:, :, : bank.arena.used]
        keeps = compete(scores, [view.positions[0, 0] for view in views], heads * budget, sure)
        kept = [int(keep.sum()) for keep in keeps]
        _make_room([bank for bank, _ in block], keeps, _capacities(block, kept, heads * budget), m, shared)
        for (bank, moment), view, keep, live in zip(block, views, keeps, kept, strict=True):
            at = (bank.rows, bank.heads)
            held = torch.ones(bank.arena.used, dtype=torch.bool, device=key.device)
            state = None
            if view.state is not None:
                state = torch.cat([bank.arena.state[:, :, : bank.arena.used], view.state[:, :, -m:]], dim=2)
            joined = torch.cat([held, keep[-m:]])[None, None]
            bank.take(joined, [live], moment, state)
    return out


def _capacities(block: list[tuple[Bank, Moment]], kept: list[int], total: int) -> list[int]:
    """Slots for each head of a row: what it keeps, and an even share of what is left over."""
    now = [bank.arena.capacity for bank, _ in block]
    spare = total - sum(kept)
    if spare and all(n <= capacity for n, capacity in zip(kept, now, strict=True)):
        return now
    return [n + spare // len(kept) + (i < spare % len(kept)) for i, n in enumerate(kept)]


def _make_room(banks: list[Bank], keeps: list[Tensor], plan: list[int], fresh: int, shared: Shared) -> None:
    """Drop from the arenas of a row what goes, and give each its new capacity, the shrinking ones first."""
    for bank, keep in zip(banks, keeps, strict=True):
        held = keep[: len(keep) - fresh]
        if len(held):
            bank.arena.absorb(held[None, None], [int(held.sum())])
    growth = [
        (capacity - bank.arena.capacity, i)
        for i, (bank, capacity) in enumerate(zip(banks, plan, strict=True))
    ]
    for change, i in sorted(growth):
        if change:
            old = banks[i].arena
            other = old.resized(plan[i])
            shared.change(other.nbytes)
            banks[i].arena = other
            shared.change(-old.nbytes)
