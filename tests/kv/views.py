"""Random views for the tests of policies, and ways to disturb one that no score may notice."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from itertools import pairwise

import torch
from torch import Tensor

from modicum.kv.view import View
from tests.bounds import FUNCTION, LAMBDA, gamma, logit_bound, softmax_bound


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


def with_newcomer_scores(view: View) -> View:
    """The view with random scores of its newcomers, which lie in its last slots."""
    b, h, n = view.positions.shape
    slots = torch.arange(n - view.newcomers, n).expand(b, h, -1)
    rng = torch.Generator().manual_seed(int(view.seen.sum()))
    scores = torch.randn(slots.shape, generator=rng)
    return replace(view, newcomer_scores=scores, newcomer_slots=slots)


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


@dataclass(frozen=True)
class ScoreBound:
    """Error of a base policy's score in fp32: `relative` of its size, and `absolute`."""

    relative: float
    absolute: float

    def of(self, expected: Tensor) -> Tensor:
        return self.relative * expected.double().abs() + self.absolute

    @property
    def both(self) -> dict[str, float]:
        """For two routes to one score, as `rtol` and `atol`."""
        return {"rtol": 2 * self.relative, "atol": 2 * self.absolute}


def score_bound(view: View) -> ScoreBound:
    """What every base policy's score of this view is within.

    Scores are sums of attention weights over queries, neighbours and a group's heads (all positive),
    multiplied or divided by norms and means of positive numbers (relative); or norms; or a key's cosine with,
    or distance from, the mean of the keys. The mean's error counts by its length: that of unit keys which
    point everywhere is short, and its direction so much less exact.
    """
    single, n = torch.float32, view.positions.shape[2]
    keys = view.keys.double()
    there = torch.ones_like(view.protected) if view.valid is None else view.valid
    logit = rows = 0.0
    if view.queries is not None:
        logit = logit_bound(single, view.queries, keys[there], view.scaling, view.softcap)
        longest = [float(x.norm(dim=-1).max()) for x in (view.queries.double(), keys[there])]
        size = longest[0] * longest[1] * view.scaling if view.softcap is None else view.softcap
        # A gain multiplies logits (AhaKV): √(2 ln(seen / capacity)), off by some functions of its own.
        ratio = float(view.seen.max()) / max(1, view.capacity)
        gain = max(1.0, math.sqrt(2 * math.log(max(1.0, ratio))))
        logit = gain * (logit + gamma(FUNCTION, single) * size)
        rows = view.queries.shape[3] * view.queries.shape[2]
    chain = rows + n + 2 * view.values.shape[-1] + 4 * FUNCTION
    relative = softmax_bound(n, single, logit) + gamma(chain, single)
    unit = keys / keys.norm(dim=-1, keepdim=True).clamp_min(1e-30) * there[..., None]
    mean = unit.sum(2) / there.sum(-1).clamp_min(1)[..., None]
    lengths = mean.norm(dim=-1)
    lengths = lengths[lengths > 0]
    direction = (LAMBDA + FUNCTION) / min(1.0, float(lengths.min()) if lengths.numel() else 1.0)
    cosine = gamma(direction + keys.shape[-1] + 2 * FUNCTION, single)
    distance = gamma(LAMBDA + 4, single) * 2 * float(keys[there].norm(dim=-1).max() if there.any() else 0.0)
    return ScoreBound(relative, max(cosine, distance))
