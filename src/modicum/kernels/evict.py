"""Eviction on the device: which tokens stay, which one goes, and newcomers into the slots that fall free."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import triton  # type: ignore[import-untyped]  # triton ships no types
import triton.language as tl  # type: ignore[import-untyped]  # as above
from torch import Tensor

from modicum.kernels.sizes import pow2

# ruff: noqa: N803
# Compile-time constants are in capitals, as everywhere in Triton.
# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator"
# The bodies under @triton.jit are Triton's language: their arguments have no Python type.

_SCORES = (torch.float16, torch.bfloat16, torch.float32)
_MOST_AT_ONCE = 16384  # tokens of a head that `best` holds in registers
_LAST = tl.constexpr(2**31 - 1)
_FIRST = tl.constexpr(-(2**31))


@dataclass(frozen=True)
class Config:
    """Sizes for one shape of input; a benchmark may sweep them."""

    block: int
    """Tokens (in `move`: slots) that a program looks at together: a power of two."""
    warps: int


def serves(dtype: torch.dtype, tokens: int = 0) -> str | None:
    """Why `worst` or `best` do not take scores of this dtype; tokens: N, for `best` only. None if they do.

    `move` takes whatever an arena stores.
    """
    if dtype not in _SCORES:
        return f"scores in {dtype}, neither fp16, bf16 nor fp32"
    if tokens > _MOST_AT_ONCE:
        return f"{tokens} tokens a head, over {_MOST_AT_ONCE}"
    return None


def worst(
    score: Tensor,
    positions: Tensor,
    limit: Tensor,
    sinks: int,
    count: Tensor | None = None,
    factor: Tensor | None = None,
    config: Config | None = None,
) -> Tensor:
    """[B, H] int64: index of the lowest score that may go, the oldest among equals.

    score [B, H, N] float; positions [B, H, N] int; limit [B] int: tokens from this position on are protected,
    and so are those below `sinks`: they count as +inf. count [B] or [B, H] int: only the first `count` slots
    hold a token, the others are never chosen unless there are no tokens. factor [B, H, N] float multiplies
    the score (KeyDiff's inverse norms).
    Source: `Candidates.guard` and `choice.worst`. Floor: score, positions and factor read once, 8 to 12
    bytes a token.
    """
    b, h, n = score.shape
    size = config or Config(min(4096, max(32, pow2(n))), 4 if n <= 2048 else 8)
    out = torch.empty(b, h, dtype=torch.int64, device=score.device)
    some = limit if count is None else count  # not read without a count
    at = _per_head(some, h)
    by = score if factor is None else factor  # not read without a factor
    _worst[(b * h,)](
        *(score, *score.stride(), positions, *positions.stride(), by, *by.stride()),
        *(limit, limit.stride(0), at, *at.stride(), out, n, h, sinks),
        COUNTED=count is not None,
        SCALED=factor is not None,
        BLOCK=size.block,
        num_warps=size.warps,
    )
    return out


def best(score: Tensor, positions: Tensor, goal: Tensor, config: Config | None = None) -> Tensor:
    """[B, H, N] bool: the `goal` highest of each head; ties keep the more recent.

    score [B, H, N] float, +inf for protected tokens, -inf where there is none; positions [B, H, N] int;
    goal [B] or [B, H] int. Of several places without a token any may be named.
    Source: `choice.best`; the goal-th largest by bisection over the bits of an ordered integer, as a radix
    select of one bit a turn. Floor: 8 bytes a token read, 1 written; in practice the 63 counts, one after
    the other, are what takes time.
    """
    b, h, n = score.shape
    block = max(32, pow2(n))
    warps = (4 if block <= 2048 else 8 if block <= 8192 else 16) if config is None else config.warps
    keep = torch.empty(b, h, n, dtype=torch.uint8, device=score.device)
    goals = _per_head(goal, h)
    _best[(b * h,)](
        *(score, *score.stride(), positions, *positions.stride(), goals, *goals.stride(), keep, n, h),
        BLOCK=block,
        num_warps=warps,
    )
    return keep.view(torch.bool)


def move(
    keep: Tensor,
    live: Tensor,
    stores: Sequence[Tensor],
    fresh: Sequence[Tensor] | None,
    config: Config | None = None,
) -> None:
    """Keep some slots and some newcomers, in place, so that slots 0 … live - 1 hold the kept tokens.

    keep [B, H, A + m] bool over the first A slots, then m newcomers; live [B] int: how many are kept, the
    same in each head; stores [B, H, S, ...] contiguous, S ≥ A and S ≥ live; fresh: the newcomers' tensors
    [B|1, H|1, m, ...] for each store, or None. A kept token in a slot below `live` stays there; the i-th
    free slot takes the i-th of the others, slots first, then newcomers.
    Source: `Arena.absorb`. Floor: each moved token read and written once, and `keep` read once.
    """
    b, h, entries = keep.shape
    m = 0 if fresh is None else fresh[0].shape[2]
    slots = min(stores[0].shape[2], entries)  # none beyond can be filled
    if not slots:
        return
    size = config or Config(64, 4)
    hole = torch.empty(b, h, slots, dtype=torch.int32, device=keep.device)
    source = torch.empty_like(hole)
    moved = torch.empty(b, h, dtype=torch.int32, device=keep.device)
    kept = keep.view(torch.uint8)
    block = min(2048, max(32, pow2(entries)))
    _plan[(b * h,)](
        *(kept, *kept.stride(), live, live.stride(0), hole, source, moved, h, entries, entries - m, slots),
        BLOCK=block,
        num_warps=4,
    )
    for i, store in enumerate(stores):
        if not store.numel():
            continue
        flat = store.view(b * h, store.shape[2], -1)
        width = flat.shape[2]
        new = flat.view(b, h, store.shape[2], width)  # not read without newcomers
        if fresh is not None and m:
            new = fresh[i].unsqueeze(-1) if store.dim() == 3 else fresh[i].flatten(3)
            new = new.expand(b, h, m, width)
        wide = pow2(width)
        block = max(1, min(pow2(slots), size.block * 128 // wide if wide > 128 else size.block))
        _copy[(triton.cdiv(slots, block), b * h)](
            *(hole, source, moved, flat, new, *new.stride()),
            *(h, slots, entries - m, store.shape[2], width),
            FRESH=m > 0,
            WIDE=wide,
            BLOCK=block,
            num_warps=size.warps,
        )


def _per_head(x: Tensor, heads: int) -> Tensor:
    """[B] or [B, H|1] -> [B, H], without a copy."""
    return (x if x.dim() == 2 else x.unsqueeze(1)).expand(-1, heads)


@triton.jit
def _worst(
    scores, score_b: tl.int64, score_h: tl.int64, score_n: tl.int64,
    positions, pos_b: tl.int64, pos_h: tl.int64, pos_n: tl.int64,
    factors, factor_b: tl.int64, factor_h: tl.int64, factor_n: tl.int64,
    limits, limit_b: tl.int64, counts, count_b: tl.int64, count_h: tl.int64,
    out, n, heads, sinks,
    COUNTED: tl.constexpr, SCALED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip  # a tensor and its strides on one line
    """One head: every lane keeps the worst of what it has seen, then the lanes are compared."""
    head = tl.program_id(0)
    b, h = (head // heads).to(tl.int64), (head % heads).to(tl.int64)
    limit = tl.load(limits + b * limit_b).to(tl.int32)
    count = n
    if COUNTED:
        count = tl.minimum(tl.load(counts + b * count_b + h * count_h).to(tl.int32), n)
    lowest = tl.full((BLOCK,), float("inf"), tl.float32)
    oldest = tl.full((BLOCK,), _LAST, tl.int32)
    which = tl.zeros((BLOCK,), tl.int32)
    for start in range(0, n, BLOCK):
        slot = start + tl.arange(0, BLOCK)
        there = slot < count
        score = tl.load(
            scores + b * score_b + h * score_h + slot * score_n, mask=there, other=float("inf")
        ).to(tl.float32)
        if SCALED:
            score *= tl.load(
                factors + b * factor_b + h * factor_h + slot * factor_n, mask=there, other=1.0
            ).to(tl.float32)
        at = tl.load(positions + b * pos_b + h * pos_h + slot * pos_n, mask=there, other=_LAST).to(tl.int32)
        score = tl.where((at >= limit) | (at < sinks), float("inf"), score)
        worse = (score < lowest) | ((score == lowest) & (at < oldest))
        lowest, oldest = tl.where(worse, score, lowest), tl.where(worse, at, oldest)
        which = tl.where(worse, slot, which)
    oldest = tl.where(lowest == tl.min(lowest, 0), oldest, _LAST)
    which = tl.where(oldest == tl.min(oldest, 0), which, _LAST)
    victim = tl.min(which, 0)
    tl.store(out + head, victim.to(tl.int64))


@triton.jit
def _best(
    scores, score_b: tl.int64, score_h: tl.int64, score_n: tl.int64,
    positions, pos_b: tl.int64, pos_h: tl.int64, pos_n: tl.int64,
    goals, goal_b: tl.int64, goal_h: tl.int64, keep, n, heads,
    BLOCK: tl.constexpr,
):  # fmt: skip  # a tensor and its strides on one line
    """One head, all its tokens in registers."""
    head = tl.program_id(0)
    b, h = (head // heads).to(tl.int64), (head % heads).to(tl.int64)
    goal = tl.load(goals + b * goal_b + h * goal_h).to(tl.int32)
    slot = tl.arange(0, BLOCK)
    there = slot < n
    score = tl.load(scores + b * score_b + h * score_h + slot * score_n, mask=there, other=0.0).to(tl.float32)
    at = tl.load(positions + b * pos_b + h * pos_h + slot * pos_n, mask=there, other=-1).to(tl.int32)
    # Whole numbers in the order of the scores: a negative float's bits grow as it falls. 0 and -0 are equal.
    bits = tl.where(score == 0, 0.0, score).to(tl.int32, bitcast=True)
    rank = tl.where(bits < 0, bits ^ _LAST, bits)
    rank = tl.where(score != score, _LAST, rank)  # a NaN comes first, as when torch sorts
    rank = tl.where(there, rank, _FIRST)
    # The largest rank that `goal` tokens reach, from the top bit down; the sign's weight is negative.
    least = tl.where(tl.sum((rank >= 0).to(tl.int32), 0) >= goal, 0, _FIRST)
    for bit in range(31):
        higher = least + (1 << (30 - bit))
        least = tl.where(tl.sum((rank >= higher).to(tl.int32), 0) >= goal, higher, least)
    taken = rank > least
    tied = (rank == least) & there
    rest = goal - tl.sum(taken.to(tl.int32), 0)
    # The same among those that tie at that rank, by position.
    newest = least * 0 - 1
    for bit in range(31):
        later = newest + (1 << (30 - bit))
        newest = tl.where(tl.sum((tied & (at >= later)).to(tl.int32), 0) >= rest, later, newest)
    newer = tied & (at > newest)
    last = tied & (at == newest)  # one token, or several empty places
    rest -= tl.sum(newer.to(tl.int32), 0)
    taken |= newer | (last & (tl.cumsum(last.to(tl.int32), 0) <= rest))
    tl.store(keep + head.to(tl.int64) * n + slot, taken.to(tl.uint8), mask=there)


@triton.jit
def _plan(
    keep, keep_b: tl.int64, keep_h: tl.int64, keep_n: tl.int64,
    lives, live_b: tl.int64, holes, sources, moved, heads, entries, held, slots,
    BLOCK: tl.constexpr,
):  # fmt: skip  # a tensor and its strides on one line
    """One head: lists of its free slots and of what moves into them, [B, H, slots], and their length."""
    head = tl.program_id(0)
    b, h = (head // heads).to(tl.int64), (head % heads).to(tl.int64)
    live = tl.load(lives + b * live_b).to(tl.int32)
    place = head.to(tl.int64) * slots
    free, moving = live * 0, live * 0
    for start in range(0, entries, BLOCK):
        entry = start + tl.arange(0, BLOCK)
        kept = tl.load(keep + b * keep_b + h * keep_h + entry * keep_n, mask=entry < entries, other=0) != 0
        hole = (entry < live) & (entry < slots) & ((entry >= held) | ~kept)  # past `held`, slots not used yet
        mover = kept & ((entry >= live) | (entry >= held))  # newcomers move whatever their number
        hole_place = free + tl.cumsum(hole.to(tl.int32), 0) - 1
        mover_place = moving + tl.cumsum(mover.to(tl.int32), 0) - 1
        tl.store(holes + place + hole_place, entry, mask=hole)
        tl.store(sources + place + mover_place, entry, mask=mover & (mover_place < slots))
        free += tl.sum(hole.to(tl.int32), 0)
        moving += tl.sum(mover.to(tl.int32), 0)
    tl.store(moved + head, tl.minimum(free, moving))  # as many of each, if `live` is true


@triton.jit
def _copy(
    holes, sources, moved, store, fresh, fresh_b: tl.int64, fresh_h: tl.int64, fresh_n: tl.int64,
    fresh_d: tl.int64, heads, slots, held, stride, width,
    FRESH: tl.constexpr, WIDE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip  # a tensor and its strides together
    """Some free slots of one head of one store [B·H, S, width]. Sources lie at `live` and beyond, free slots
    below it: no program reads what another writes.
    """
    head = tl.program_id(1)
    number = tl.load(moved + head)
    first = tl.program_id(0) * BLOCK
    if first < number:
        b, h = (head // heads).to(tl.int64), (head % heads).to(tl.int64)
        i = first + tl.arange(0, BLOCK)
        real = i < number
        place = head.to(tl.int64) * slots + i
        hole = tl.load(holes + place, mask=real, other=0)
        source = tl.load(sources + place, mask=real, other=0)
        lane = tl.arange(0, WIDE)
        inside = (lane < width)[None, :]
        own = store + head.to(tl.int64) * stride * width
        old = real & (source < held)
        value = tl.load(own + (source * width)[:, None] + lane[None, :], mask=old[:, None] & inside, other=0)
        if FRESH:
            where = fresh + b * fresh_b + h * fresh_h + ((source - held) * fresh_n)[:, None]
            new = tl.load(
                where + (lane * fresh_d)[None, :], mask=(real & (source >= held))[:, None] & inside, other=0
            )
            value = tl.where(old[:, None], value, new.to(value.dtype))
        tl.store(own + (hole * width)[:, None] + lane[None, :], value, mask=real[:, None] & inside)
