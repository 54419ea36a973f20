"""Choosing and moving against sorting and loops in plain Python, and against the arena itself."""

from __future__ import annotations

import os

import torch

if not torch.cuda.is_available():  # before Triton is imported, which reads it then
    os.environ["TRITON_INTERPRET"] = "1"

import math
import random
from typing import Any

import pytest
from torch import Tensor

from modicum.kernels import evict, evict_twin
from modicum.kv.arena import Arena

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BOTH = pytest.mark.parametrize("engine", [evict, evict_twin], ids=["kernel", "twin"])
TIES = [-2.0, -0.5, -0.0, 0.0, 0.5, 1e30, math.inf]


def heads(
    b: int, h: int, n: int, seed: int, scores: list[float] | None = None, empty: float = 0.2
) -> tuple[Tensor, Tensor]:
    """Scores with many ties, distinct positions in no order; -inf and -1 in empty slots."""
    draw = random.Random(seed)
    score, position = torch.empty(b, h, n), torch.empty(b, h, n, dtype=torch.int32)
    for row in range(b):
        for head in range(h):
            places = draw.sample(range(2 * n), n)
            for i, at in enumerate(places):
                there = draw.random() >= empty
                some = draw.gauss(0, 1) if scores is None else draw.choice(scores)
                score[row, head, i] = some if there else -math.inf
                position[row, head, i] = at if there else -1
    return score, position


@BOTH
@pytest.mark.parametrize("n", [1, 2, 9, 32, 65, 200])
@pytest.mark.parametrize("scores", [TIES, [1.0, -math.inf], None])
def test_best_keeps_the_highest_and_of_equals_the_newest(
    engine: Any, n: int, scores: list[float] | None
) -> None:
    draw = random.Random(n)
    for seed in range(3):
        score, position = heads(2, 2, n, seed, scores)
        goals = [[draw.choice([0, 1, n // 2, n, draw.randint(0, n)]) for _ in range(2)] for _ in range(2)]
        goal = torch.tensor(goals, dtype=torch.int32)
        keep = engine.best(score.to(DEVICE), position.to(DEVICE), goal.to(DEVICE)).cpu()
        assert keep.dtype == torch.bool
        for row in range(2):
            for head in range(2):
                key = [(float(s), int(p)) for s, p in zip(score[row, head], position[row, head], strict=True)]
                order = sorted(range(n), key=key.__getitem__, reverse=True)
                wanted = set(order[: goals[row][head]])
                found = {i for i in range(n) if keep[row, head, i]}
                there = {i for i in range(n) if position[row, head, i] >= 0}
                assert len(found) == goals[row][head]
                # Which empty place is "kept" beyond the tokens there are does not matter.
                assert found & there == wanted & there


@BOTH
def test_best_of_views_and_one_goal_a_row(engine: Any) -> None:
    score, position = heads(2, 3, 40, 1)
    wide = torch.zeros(2, 40, 3).to(DEVICE)
    wide.copy_(score.transpose(1, 2))
    goal = torch.tensor([7, 33])
    keep = engine.best(wide.transpose(1, 2), position.to(DEVICE), goal.to(DEVICE)).cpu()
    assert keep.sum(-1).tolist() == [[7] * 3, [33] * 3]
    for row in range(2):
        for head in range(3):
            least = score[row, head].sort(descending=True).values[int(goal[row]) - 1]
            assert torch.equal(keep[row, head] & (score[row, head] > least), score[row, head] > least)


@BOTH
@pytest.mark.parametrize("n", [1, 5, 33, 150])
@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("counted", ["all", "row", "head"])
def test_worst_is_the_lowest_that_may_go_and_of_equals_the_oldest(
    engine: Any, n: int, scaled: bool, counted: str
) -> None:
    draw = random.Random(n)
    config = evict.Config(block=32, warps=4)  # so that a head takes several turns
    for seed in range(3):
        score, position = heads(2, 2, n, seed, TIES if seed else None, empty=0.0)
        factor = torch.rand(2, 2, n) + 0.5 if scaled else None
        if scaled:
            score = score.clamp(max=4.0)
        limit, sinks = torch.tensor([n, 2 * n - 1], dtype=torch.int32), draw.randint(0, 2)
        counts = [[draw.randint(0, n) for _ in range(2)] for _ in range(2)]
        if counted == "row":
            counts = [[c, c] for c, _ in counts]
        count = torch.tensor(counts, dtype=torch.int32)
        given = {"all": None, "row": count[:, 0].to(DEVICE), "head": count.to(DEVICE)}[counted]
        options = {"config": config} if engine is evict and seed else {}
        found = engine.worst(
            *(score.to(DEVICE), position.to(DEVICE), limit.to(DEVICE), sinks, given),
            *(None if factor is None else factor.to(DEVICE),),
            **options,
        )
        assert found.dtype == torch.int64
        weighed = score if factor is None else score * factor
        for row in range(2):
            for head in range(2):
                victim = int(found[row, head])
                slots = range(n if counted == "all" else counts[row][head])
                if not slots:
                    assert 0 <= victim < n
                    continue

                keys = {
                    i: (math.inf if at >= int(limit[row]) or at < sinks else float(weighed[row, head, i]), at)
                    for i in slots
                    for at in [int(position[row, head, i])]
                }
                assert victim == min(slots, key=keys.__getitem__)


def made(
    b: int, h: int, held: int, m: int, slots: int, live: list[int], seed: int
) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """What to keep [B, H, A + m], stores of four kinds, and the newcomers' tensors."""
    generator = torch.Generator().manual_seed(seed)
    keep = torch.zeros(b, h, held + m, dtype=torch.bool)
    for row in range(b):
        for head in range(h):
            keep[row, head, torch.randperm(held + m, generator=generator)[: live[row]]] = True

    def some(n: int, width: int) -> Tensor:
        return torch.randn(b, h, n, width, generator=generator)

    def whole(n: int) -> Tensor:
        return torch.randint(0, 256, (b, h, n, 24), generator=generator, dtype=torch.uint8)

    stores = [some(slots, 16).to(torch.bfloat16), whole(slots)]
    stores += [torch.randperm(b * h * slots, generator=generator).view(b, h, slots).int(), some(slots, 3)]
    positions = (1000 + torch.arange(m)).int().expand(1, 1, -1)
    turned = torch.randn(b, m, h, 16, generator=generator).to(torch.bfloat16).transpose(1, 2)
    return keep, stores, [turned, whole(m), positions, some(m, 3)]


SHAPES = [
    (5, 0, 9, [3, 5]),  # eviction alone
    (0, 7, 9, [4, 7]),  # the first chunk
    (6, 5, 9, [7, 2]),  # into slots in use and slots that are not yet
    (9, 4, 9, [9, 9]),
    (8, 30, 9, [9, 0]),  # more newcomers than slots
    (40, 33, 70, [41, 70]),
    (300, 20, 300, [290, 17]),
]


@BOTH
@pytest.mark.parametrize(("held", "m", "slots", "live"), SHAPES)
def test_move_as_loops_do(engine: Any, held: int, m: int, slots: int, live: list[int]) -> None:
    keep, stores, fresh = made(2, 2, held, m, slots, live, seed=held)
    wanted = [store.clone() for store in stores]
    for row in range(2):
        for head in range(2):
            kept = [bool(k) for k in keep[row, head]]
            holes = [n for n in range(live[row]) if n >= held or not kept[n]]
            movers = [n for n in range(held + m) if kept[n] and (n >= held or n >= live[row])]
            assert len(holes) == len(movers)
            for hole, mover in zip(holes, movers, strict=True):
                for old, new, store in zip(stores, fresh, wanted, strict=True):
                    source = old if mover < held else new.expand(2, 2, *new.shape[2:])
                    store[row, head, hole] = source[row, head, mover if mover < held else mover - held]
    moved = [store.to(DEVICE) for store in stores] if DEVICE == "cuda" else [s.clone() for s in stores]
    count = torch.tensor(live, dtype=torch.int32, device=DEVICE)
    options = {"config": evict.Config(block=4, warps=4)} if engine is evict and held == 40 else {}
    new = [f.to(DEVICE) for f in fresh] if m else None
    engine.move(keep.to(DEVICE), count, moved, new, **options)
    for found, expected in zip(moved, wanted, strict=True):
        assert torch.equal(found.cpu(), expected)


@BOTH
@pytest.mark.parametrize(("held", "m", "slots", "live"), SHAPES)
def test_move_does_what_absorb_does(engine: Any, held: int, m: int, slots: int, live: list[int]) -> None:
    keep, stores, fresh = made(2, 2, held, m, slots, live, seed=held + 1)
    arena = Arena(2, 2, slots, 16, 24, 3, torch.float32, torch.device(DEVICE))
    arena.values = arena.values.to(torch.uint8)
    for store, values in zip(arena.tensors.values(), stores, strict=True):
        store[:, :, :slots] = values.to(DEVICE)
    own = [store.clone() for store in arena.tensors.values()]
    key, value, position, state = (f.to(DEVICE) for f in fresh)
    key = key.float()
    keep = keep.to(DEVICE)
    new = None
    if m:
        arena.absorb(keep, live, key, value, position[0], state)
        new = [key, value, position, state]
    else:
        arena.absorb(keep, live)
    engine.move(keep, torch.tensor(live, device=DEVICE), own, new)
    for found, expected in zip(own, arena.tensors.values(), strict=True):
        assert torch.equal(found, expected)


@BOTH
def test_move_leaves_stores_without_width_and_kept_slots_alone(engine: Any) -> None:
    keep = torch.tensor([[[True, False, True, False]]], device=DEVICE)
    keys = torch.arange(4.0, device=DEVICE).view(1, 1, 4, 1).contiguous()
    state = torch.zeros(1, 1, 4, 0, device=DEVICE)
    engine.move(keep, torch.tensor([2], device=DEVICE), [keys, state], None)
    assert keys.flatten().tolist() == [0, 2, 2, 3]


def test_what_the_kernels_do_not_take() -> None:
    assert evict.serves(torch.float32, 16384) is None
    assert evict.serves(torch.float64) is not None
    assert evict.serves(torch.float32, 16385) is not None
