"""Random views for the tests of policies, and ways to disturb one that no score may notice."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import torch
from torch import Tensor

from modicum.kv.view import View


def make_view(
    b: int = 2,
    h: int = 2,
    g: int = 2,
    n: int = 17,
    d: int = 8,
    *,
    dv: int | None = None,
    rows: int = 0,
    newcomers: int = 3,
    parts: int = 1,
    invalid: int = 0,
    empty: bool = False,
    same_heads: bool = False,
    sinks: int = 0,
    recent: int = 0,
    capacity: int | None = None,
    layer: int = 1,
    layers: int = 4,
    state: int = 0,
    hidden: int = 0,
    softcap: float | None = None,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
) -> View:
    """A random View of [b, h, g] heads and n tokens, with gaps in the positions and the older slots shuffled.

    rows: queries R (0: none), the last ones; rows longer than what was seen begin with position -1.
    newcomers: tokens of the last slots, which hold the newest positions in order.
    parts: 1, or 2 (the slots up to the newcomers, then the newcomers).
    invalid: up to so many slots of each head (never the newest token's) hold no token; 0 leaves `valid` None.
    empty: the first head of the first row holds no token at all.
    same_heads: every head of a row holds the same tokens (each in its own slots).
    state, hidden: width of the state, and of the output projection (0: none).
    """
    rng = torch.Generator().manual_seed(seed)
    assert parts in (1, 2)
    assert 1 <= newcomers <= n
    assert invalid < n

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=rng)

    def below(limit: int) -> int:
        return int(torch.randint(limit, (), generator=rng))

    dv = d if dv is None else dv
    seen = torch.tensor([n + below(2 * n) for _ in range(b)])
    positions = torch.full((b, h, n), -1)
    for row in range(b):
        holes = below(invalid + 1) if invalid else 0
        for head in range(h):
            if head == 0 or not same_heads:
                if invalid and not same_heads:
                    holes = below(invalid + 1)
                hole = torch.zeros(n, dtype=torch.bool)
                hole[torch.randperm(n - 1, generator=rng)[:holes]] = True
                fresh = int((~hole[n - newcomers :]).sum())
                older = torch.randperm(int(seen[row]) - fresh, generator=rng)[: n - holes - fresh]
            else:
                old_holes = hole[: n - newcomers]
                hole[: n - newcomers] = old_holes[torch.randperm(len(old_holes), generator=rng)]
                older = older[torch.randperm(len(older), generator=rng)]
            newest = torch.arange(int(seen[row]) - fresh, int(seen[row]))
            positions[row, head, ~hole] = torch.cat([older, newest])
    if empty:
        positions[0, 0] = -1
    valid = positions >= 0 if invalid or empty else None

    keys, values = random(b, h, n, d), random(b, h, n, dv)
    cuts = [0, n] if parts == 1 else [0, n - newcomers, n]
    queries = query_positions = None
    if rows:
        queries = random(b, h, g, rows, d).to(dtype)
        query_positions = (seen[:, None] - rows + torch.arange(rows)).clamp_min(-1)
    kept = random(b, h, n, state).abs() if state else None
    if kept is not None:
        kept[:, :, n - newcomers :] = 0.0
    protected = (positions < sinks) | (positions >= seen[:, None, None] - recent)
    return View(
        parts=tuple(
            (keys[:, :, i:j].to(dtype).contiguous(), values[:, :, i:j].to(dtype).contiguous())
            for i, j in pairwise(cuts)
        ),
        positions=positions,
        valid=valid,
        protected=protected & (positions >= 0),
        seen=seen,
        capacity=max(1, n - newcomers) if capacity is None else capacity,
        layer=layer,
        layers=layers,
        scaling=d**-0.5,
        softcap=softcap,
        queries=queries,
        query_positions=query_positions,
        state=kept,
        newcomers=newcomers,
        output_weight=random(h, g, dv, hidden) if hidden else None,
    )


def with_parts(view: View, parts: tuple[tuple[Tensor, Tensor], ...]) -> View:
    """The view with other keys and values."""
    return replace(view, parts=parts)


def spoil_holes(view: View, value: float = 1e30) -> View:
    """The view with huge keys, values and states where there is no token: no other score may change."""
    if view.valid is None:
        return view
    hole, parts, start = ~view.valid.unsqueeze(-1), [], 0
    for keys, values in view.parts:
        here = hole[:, :, start : start + keys.shape[2]]
        parts.append((keys.masked_fill(here, value), values.masked_fill(here, -value)))
        start += keys.shape[2]
    state = None if view.state is None else view.state.masked_fill(hole, value)
    return replace(view, parts=tuple(parts), state=state)


def shuffle_slots(view: View, seed: int = 0) -> tuple[View, Tensor]:
    """The same tokens in other slots, in one part; order [B, H, N]: which old slot each new one holds."""
    rng = torch.Generator().manual_seed(seed)
    order = torch.rand(view.positions.shape, generator=rng).argsort(-1)

    def move(x: Tensor) -> Tensor:
        return x.gather(2, order if x.dim() == 3 else order.unsqueeze(-1).expand_as(x))

    moved = replace(
        view,
        parts=((move(view.keys), move(view.values)),),
        positions=move(view.positions),
        valid=None if view.valid is None else move(view.valid),
        protected=move(view.protected),
        state=None if view.state is None else move(view.state),
        newcomers=0,
    )
    return moved, order
