"""The arena against a model made of dictionaries, over random sequences of what a cache does to it."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from modicum import CacheError
from modicum.kv import arena as arena_module
from modicum.kv.arena import Arena

KEY, VALUE = 3, 2


def examples(number: int) -> settings:
    return settings(max_examples=number, derandomize=True, deadline=None, database=None)


@dataclass
class Twin:
    """An arena, and for each row and head the positions that it must hold, with what came at each."""

    arena: Arena
    held: list[list[set[int]]]
    came: list[int]
    """Tokens each row has been given."""
    tokens: dict[tuple[int, int, int], tuple[Tensor, Tensor, Tensor]] = field(default_factory=dict)
    """(row, head, position) -> key, value, state."""
    line: list[int] = field(default_factory=list)
    """Which line of `tokens` each row is: rows may be repeated."""

    @property
    def size(self) -> tuple[int, int]:
        return len(self.arena.live), self.arena.keys.shape[1]

    def make(self, fresh: list[int], columns: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Keys, values, states and positions [B, m] of newcomers: row i brings fresh[i], pads before them."""
        (rows, heads), dtype = self.size, self.arena.keys.dtype
        keys = torch.randn(rows, heads, columns, KEY).to(dtype)
        values = torch.randn(rows, heads, columns, VALUE).to(dtype)
        states = torch.randn(rows, heads, columns, self.arena.state.shape[-1])
        positions = torch.full((rows, columns), -1, dtype=torch.int32)
        for row, n in enumerate(fresh):
            for j in range(n):
                at = self.came[row] + j
                positions[row, columns - n + j] = at
                for head in range(heads):
                    x = tuple(t[row, head, columns - n + j].clone() for t in (keys, values, states))
                    self.tokens[self.line[row], head, at] = x  # type: ignore[assignment]
        return keys, values, states, positions

    def check(self) -> None:
        """What is stored is what should be; looked at in a copy, as looking settles."""
        arena = copy.deepcopy(self.arena)
        assert arena.check() is None
        for row, live in enumerate(arena.live):
            for head, wanted in enumerate(self.held[row]):
                found = arena.positions[row, head, :live].tolist()
                assert sorted(found) == sorted(wanted)
                for slot, at in enumerate(found):
                    key, value, state = self.tokens[self.line[row], head, at]
                    assert torch.equal(arena.keys[row, head, slot], key)
                    assert torch.equal(arena.values[row, head, slot], value)
                    assert torch.equal(arena.state[row, head, slot], state)
        assert arena.used == max(self.arena.live)
        valid = arena.valid(arena.used)
        if valid is None:
            assert len(set(arena.live)) == 1
        else:
            assert valid.sum(-1).tolist() == [[n] * self.size[1] for n in arena.live]


@st.composite
def twins(draw: st.DrawFn) -> Twin:
    rows, heads, capacity = draw(st.integers(1, 3)), draw(st.integers(1, 3)), draw(st.integers(1, 8))
    width = draw(st.integers(0, 2))
    dtype = draw(st.sampled_from([torch.float32, torch.bfloat16]))
    torch.manual_seed(draw(st.integers(0, 99)))
    arena = Arena(rows, heads, capacity, KEY, VALUE, width, dtype, torch.device("cpu"))
    return Twin(
        arena, [[set() for _ in range(heads)] for _ in range(rows)], [0] * rows, line=list(range(rows))
    )


def decode(twin: Twin, data: st.DataObject, sinks: int) -> None:
    """One token for every row; rows that are full let one go per head, the sinks never."""
    arena = twin.arena
    key, value, state, positions = twin.make([1] * twin.size[0], 1)
    arena.append(key, value, positions, state if state.shape[-1] else None)
    for row in range(twin.size[0]):
        for head in twin.held[row]:
            head.add(twin.came[row])
        twin.came[row] += 1
    if arena.used <= arena.capacity:
        return
    over = [n > arena.capacity for n in arena.live]
    # As the cache asks: the slot of each head's victim, by position, whatever slot that is.
    victims = [
        [data.draw(st.sampled_from(sorted(p for p in head if p >= sinks))) for head in row] if full else None
        for row, full in zip(twin.held, over, strict=True)
    ]
    slots = arena.positions[:, :, : arena.used]
    if all(over) and data.draw(st.booleans()):
        goal = torch.tensor(victims)[:, :, None]
        arena.drop((slots == goal).int().argmax(-1))
    else:
        valid = arena.valid(arena.used)
        keep = torch.ones_like(slots, dtype=torch.bool) if valid is None else valid.clone()
        for row, gone in enumerate(victims):
            if gone is not None:
                keep[row] &= slots[row] != torch.tensor(gone)[:, None]
        arena.absorb(keep, [n - full for n, full in zip(arena.live, over, strict=True)])
    for row, gone in enumerate(victims):
        if gone is not None:
            for head, at in zip(twin.held[row], gone, strict=True):
                head.discard(at)


def prefill(twin: Twin, data: st.DataObject, sinks: int) -> None:
    """A chunk, some rows padded; the newest beyond the capacity go, or any others, but never the sinks."""
    arena = twin.arena
    rows, heads = twin.size
    fresh = data.draw(st.lists(st.integers(0, 9), min_size=rows, max_size=rows).filter(any))
    columns = max(fresh)
    key, value, state, positions = twin.make(fresh, columns)
    arena.settle()
    used = arena.used
    keep = torch.zeros(rows, heads, used + columns, dtype=torch.bool)
    live = []
    for row in range(rows):
        total = arena.live[row] + fresh[row]
        sure = min(sinks, twin.came[row] + fresh[row])
        live.append(data.draw(st.integers(min(sure, total), min(total, arena.capacity))))
        for head in range(heads):
            every = {*twin.held[row][head], *range(twin.came[row], twin.came[row] + fresh[row])}
            first = sorted(every)[:sure]
            rest = data.draw(st.permutations(sorted(every)[sure:]))
            stay = {*first, *rest[: live[row] - sure]}
            twin.held[row][head] = stay
            slots = [*arena.positions[row, head, :used].tolist(), *positions[row].tolist()]
            there = [i < arena.live[row] or i >= used for i in range(len(slots))]
            keep[row, head] = torch.tensor([p in stay and ok for p, ok in zip(slots, there, strict=True)])
        twin.came[row] += fresh[row]
    line = positions[:1] if len({tuple(p) for p in positions.tolist()}) == 1 else positions
    arena.absorb(keep, live, key, value, line, state if state.shape[-1] else None)


@given(twin=twins(), data=st.data())
@examples(150)
def test_an_arena_holds_what_it_was_told_to(twin: Twin, data: st.DataObject) -> None:
    sinks = data.draw(st.integers(0, twin.arena.capacity - 1))
    where = {name: t.data_ptr() for name, t in twin.arena.tensors.items()}
    nbytes = twin.arena.nbytes
    for _ in range(data.draw(st.integers(1, 12))):
        step = data.draw(st.sampled_from(["decode", "decode", "decode", "prefill", "settle"]))
        if step == "decode":
            decode(twin, data, sinks)
        elif step == "prefill":
            prefill(twin, data, sinks)
        else:
            twin.arena.settle()
        twin.check()
        # Everything happens in place; the sinks keep the first slots, on which their protection relies.
        assert {name: t.data_ptr() for name, t in twin.arena.tensors.items()} == where
        assert (
            twin.arena.nbytes
            == nbytes
            == sum(t.untyped_storage().nbytes() for t in twin.arena.tensors.values())
        )
        for row, count in enumerate(twin.came):
            n = min(sinks, count)
            assert bool((twin.arena.positions[row, :, :n] == torch.arange(n)).all())


@given(twin=twins(), data=st.data())
@examples(60)
def test_rows_chosen_and_another_capacity_keep_what_is_held(twin: Twin, data: st.DataObject) -> None:
    for _ in range(data.draw(st.integers(0, 6))):
        data.draw(st.sampled_from([decode, prefill]))(twin, data, 0)
    rows = data.draw(st.lists(st.integers(0, twin.size[0] - 1), min_size=1, max_size=4))
    twin.arena.select_rows(torch.tensor(rows))
    twin.held = [[set(head) for head in twin.held[row]] for row in rows]
    twin.came = [twin.came[row] for row in rows]
    # A repeated row goes its own way from here on.
    old, twin.line = [twin.line[row] for row in rows], list(range(len(rows)))
    heads = twin.size[1]
    twin.tokens = {
        (new, head, at): twin.tokens[line, head, at]
        for new, line in enumerate(old)
        for head in range(heads)
        for at in twin.held[new][head]
    }
    twin.check()
    capacity = data.draw(st.integers(max(1, twin.arena.used), twin.arena.used + 5))
    before = twin.arena
    twin.arena = before.resized(capacity)
    assert twin.arena.capacity == capacity
    assert twin.arena.keys.shape[2] == capacity + 1
    assert not {t.data_ptr() for t in twin.arena.tensors.values() if t.numel()} & {
        t.data_ptr() for t in before.tensors.values()
    }
    twin.check()
    for _ in range(data.draw(st.integers(0, 4))):
        data.draw(st.sampled_from([decode, prefill]))(twin, data, 0)
        twin.check()
    twin.arena.clear()
    twin.held = [[set() for _ in range(heads)] for _ in rows]
    twin.check()
    decode(twin, data, 0)
    twin.check()


@pytest.mark.parametrize("move", [1, 3])
def test_tokens_moved_in_many_steps_arrive_as_in_one(move: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(arena_module, "_MOVE", move)

    @given(twin=twins(), data=st.data())
    @examples(25)
    def check(twin: Twin, data: st.DataObject) -> None:
        for _ in range(5):
            prefill(twin, data, 0)
            twin.check()

    check()


def test_more_than_fits_is_refused() -> None:
    arena = Arena(1, 1, 2, KEY, VALUE, 0, torch.float32, torch.device("cpu"))
    keys, values, positions = (
        torch.zeros(1, 1, 5, KEY),
        torch.zeros(1, 1, 5, VALUE),
        torch.arange(5)[None].int(),
    )
    with pytest.raises(CacheError, match="3 tokens kept where 2 fit"):
        arena.absorb(torch.tensor([[[True, True, True, False, False]]]), [3], keys, values, positions)
    assert arena.live == [0]
