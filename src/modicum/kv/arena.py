"""Arena: the slots of some rows and KV heads that share one capacity, allocated once and written in place."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from modicum.errors import CacheError
from modicum.kernels import dispatch as kernels
from modicum.kv.choice import gaps
from modicum.kv.stack import Stack

_MOVE = 256  # tokens moved at a time: moving needs a copy of that many, not of a chunk


class Arena:
    """B rows × H heads × (capacity + 1) slots; the last is the newcomer's while a decode step decides.

    Slots 0 … live[row] − 1 hold tokens, in no particular order; `positions` says which. All heads of a
    row hold equally many.
    """

    def __init__(
        self,
        rows: int,
        heads: int,
        capacity: int,
        key_dim: int,
        value_dim: int,
        state_width: int,
        dtype: torch.dtype,
        device: torch.device,
        sum_width: int = 0,
        stack: Stack | None = None,
        tally_width: int = 0,
    ) -> None:
        slots = capacity + 1
        self.capacity = capacity
        if stack is None:
            widths = state_width, sum_width, tally_width
            parts = self.parts(slots, key_dim, value_dim, *widths, dtype, device)
            stack = Stack(rows * heads, parts, device)
        room = stack.take(rows, heads)
        self.keys, self.values = room["keys"], room["values"]  # [B, H, S, Dk], [B, H, S, Dv]
        self.positions, self.state = room["positions"], room["state"]  # [B, H, S], [B, H, S, F] fp32
        self.sums = room["sums"]
        """[B, H, F] fp64: a policy's sums over the tokens of each head, in use while decode steps go on."""
        self.tally = room["tally"]
        """[B, H, F] fp64: what a policy has added up over all that it has read."""
        self.live = [0] * rows
        self.hole: Tensor | None = None
        """[B, H] each head's free slot, when that is not the one after those in use."""
        self._first = torch.arange(0, rows * heads * slots, slots, device=device).view(rows, heads)

    @staticmethod
    def parts(
        slots: int,
        key_dim: int,
        value_dim: int,
        state_width: int,
        sum_width: int,
        tally_width: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> dict[str, tuple[tuple[int, ...], torch.dtype, float]]:
        """What a `Stack` of arenas holds for each pair of a row and a head."""
        # Sums over millions of steps: in fp64, wherever there is such a thing.
        wide = torch.float32 if device.type == "mps" else torch.float64
        return {
            "keys": ((slots, key_dim), dtype, 0),
            "values": ((slots, value_dim), dtype, 0),
            "positions": ((slots,), torch.int32, -1),
            "state": ((slots, state_width), torch.float32, 0),
            "sums": ((sum_width,), wide, 0),
            "tally": ((tally_width,), wide, 0),
        }

    @property
    def tensors(self) -> dict[str, Tensor]:
        """All that is stored per slot, by name."""
        return {"keys": self.keys, "values": self.values, "positions": self.positions, "state": self.state}

    @property
    def nbytes(self) -> int:
        """Bytes of live storage."""
        return sum(t.nbytes for t in (*self.tensors.values(), self.sums, self.tally))

    @property
    def used(self) -> int:
        """Slots in use in the fullest row."""
        return max(self.live)

    @property
    def even(self) -> bool:
        """Whether all rows hold equally many."""
        return self.live.count(self.live[0]) == len(self.live)

    def valid(self, slots: int) -> Tensor | None:
        """[B, H, slots] bool: which of the first slots hold a token; None if all do."""
        if min(self.live) >= slots:
            return None
        live = torch.tensor(self.live, device=self.keys.device)[:, None, None]
        mask = torch.arange(slots, device=self.keys.device) < live  # [B, 1, slots]
        return mask.expand(-1, self.keys.shape[1], -1)

    def next_slots(self) -> Tensor:
        """[B, H, 1] int64: the slots that `append` writes to next."""
        if self.hole is not None:
            return self.hole.unsqueeze(-1)
        live = torch.tensor(self.live, device=self.keys.device)
        return live[:, None, None].expand(-1, self.keys.shape[1], -1)

    def append(self, key: Tensor, value: Tensor, position: Tensor, state: Tensor | None) -> None:
        """Write one token per row into a free slot.

        key [B, H, 1, Dk], value [B, H, 1, Dv], position [B|1, 1], state [B, H, 1, F] or None where F = 0.
        """
        n = self.live[0]
        if self.hole is not None:
            # Where the last victim was: so nothing has to move, in a cache that is full.
            flat = (self.hole + self._first).view(-1)
            self.keys.view(-1, key.shape[-1]).index_copy_(0, flat, key.reshape(-1, key.shape[-1]))
            if value.shape[-1]:
                self.values.view(-1, value.shape[-1]).index_copy_(0, flat, value.reshape(-1, value.shape[-1]))
            where = position.expand(self.keys.shape[:2]).reshape(-1)
            self.positions.view(-1).index_copy_(0, flat, where)
            if state is not None:
                self.state.view(-1, state.shape[-1]).index_copy_(0, flat, state.reshape(-1, state.shape[-1]))
            self.hole = None
        elif self.even:
            self.keys[:, :, n : n + 1] = key
            self.values[:, :, n : n + 1] = value
            self.positions[:, :, n] = position
            if state is not None:
                self.state[:, :, n : n + 1] = state
        else:
            row = torch.arange(len(self.live), device=key.device)
            slot = torch.tensor(self.live, device=key.device)
            self.keys[row, :, slot] = key[:, :, 0]
            self.values[row, :, slot] = value[:, :, 0]
            self.positions[row, :, slot] = position.expand(len(self.live), -1)
            if state is not None:
                self.state[row, :, slot] = state[:, :, 0]
        self.live = [n + 1 for n in self.live]

    def drop(self, victim: Tensor) -> None:
        """Let one token per head go from an arena whose every slot is taken; victim [B, H] slot indices.

        Its slot stays free for the next newcomer. Constant shapes, nothing is moved.
        """
        self.hole = victim
        self.live = [n - 1 for n in self.live]

    def settle(self) -> None:
        """Move the last slot's token into the free slot, if there is one: the first `live` slots are
        then in use.
        """
        if self.hole is None:
            return
        at = (self.hole + self._first).view(-1)
        for store in self.tensors.values():
            if store.numel():
                flat = store.view(-1, *store.shape[3:])
                flat.index_copy_(0, at, store[:, :, -1].flatten(0, 1).clone())
        self.hole = None

    def absorb(
        self,
        keep: Tensor,
        live: Sequence[int],
        key: Tensor | None = None,
        value: Tensor | None = None,
        position: Tensor | None = None,
        state: Tensor | None = None,
    ) -> None:
        """Keep some slots and some newcomers, in place: newcomers move into the slots that became free.

        keep: [B, H, A + m] bool over the first A slots, then the m newcomers; live: tokens kept per
        row, the same for every head; key [B, H, m, Dk], value [B, H, m, Dv], position [B|1, m], state
        [B, H, m, F].
        """
        self.settle()
        heads = self.keys.shape[1]
        fresh = 0 if key is None else key.shape[2]
        held = keep.shape[2] - fresh
        need = max(held, max(live))
        if max(live) > self.capacity:
            raise CacheError(f"{max(live)} tokens kept where {self.capacity} fit: this is a bug in modicum")
        if kernels.on(keep.device):
            fresh_parts = None
            if key is not None and value is not None and position is not None:
                none = self.state[:, :, :0]
                fresh_parts = [key, value, position[:, None], none if state is None else state]
            goal = torch.tensor(live, device=keep.device)
            kernels.move(keep, goal, list(self.tensors.values()), fresh_parts)
            self.live = list(live)
            return
        if need > held:  # physical slots beyond those in use become part of the picture
            gap = keep.new_zeros(*keep.shape[:2], need - held)
            keep = torch.cat([keep[:, :, :held], gap, keep[:, :, held:]], dim=2)
        goal = torch.tensor(live, device=keep.device)[:, None, None]
        holes, movers = gaps(keep, goal)
        inside = movers[:, 2] < need
        for hole, mover in _tiles(holes[inside], movers[inside], heads):
            for store in self.tensors.values():
                store[hole] = store[mover]
        if key is not None and value is not None and position is not None:
            fresh_state = self.state[:, :, :0] if state is None else state
            where = position[:, None].expand(*keep.shape[:2], -1)
            movers[:, 2] -= need
            for hole, mover in _tiles(holes[~inside], movers[~inside], heads):
                for store, source in zip(
                    self.tensors.values(), (key, value, where, fresh_state), strict=True
                ):
                    if source.shape[2]:
                        store[hole] = source[mover]
        self.live = list(live)

    def resized(self, capacity: int) -> Arena:
        """A copy with another capacity, which must hold what is in use."""
        self.settle()
        rows, heads, _, key_dim = self.keys.shape
        other = Arena(
            rows,
            heads,
            capacity,
            key_dim,
            self.values.shape[-1],
            self.state.shape[-1],
            self.keys.dtype,
            self.keys.device,
            self.sums.shape[-1],
            tally_width=self.tally.shape[-1],
        )
        other.tally.copy_(self.tally)
        for name, store in self.tensors.items():
            other.tensors[name][:, :, : self.used] = store[:, :, : self.used]
        other.live = list(self.live)
        return other

    def select_rows(self, index: Tensor, stack: Stack | None = None) -> None:
        """Rows become rows[index] (beam search, repeated or dropped rows).

        As many as before stay in their place; others move into the stack's room, or their own.
        """
        self.settle()
        index = index.to(self.keys.device)
        names = (*self.tensors, "sums", "tally")
        if len(index) == len(self.live):
            for name in names:
                store: Tensor = getattr(self, name)
                store.copy_(store.index_select(0, index))
        else:
            old = {name: getattr(self, name) for name in names}
            if stack is None:
                parts = {name: (tuple(t.shape[2:]), t.dtype, 0.0) for name, t in old.items()}
                stack = Stack(len(index) * self.keys.shape[1], parts, index.device)
            room = stack.take(len(index), self.keys.shape[1])
            for name in names:
                setattr(self, name, torch.index_select(old[name], 0, index, out=room[name]))
        self.live = [self.live[i] for i in index.tolist()]
        rows, heads, slots = self.keys.shape[:3]
        self._first = torch.arange(0, rows * heads * slots, slots, device=index.device).view(rows, heads)

    def clear(self) -> None:
        """Forget every token; the memory stays."""
        self.hole = None
        self.live = [0] * len(self.live)
        self.positions.fill_(-1)
        self.state.zero_()
        self.tally.zero_()

    def check(self) -> str | None:
        """What is wrong, or None: counts within capacity, positions real and distinct, keys finite."""
        self.settle()
        for row, live in enumerate(self.live):
            if not 0 <= live <= self.capacity:
                return f"row {row} holds {live} tokens, its capacity is {self.capacity}"
            held = self.positions[row, :, :live].sort(-1).values
            if live and int(held[:, 0].min()) < 0:
                return f"row {row} has a slot in use without a position"
            if live > 1 and bool((held[:, 1:] == held[:, :-1]).any()):
                return f"row {row} holds the same position twice"
            if not bool(torch.isfinite(self.keys[row, :, :live]).all()):
                return f"row {row} holds keys that are not finite"
        return None


def _tiles(
    holes: Tensor, movers: Tensor, heads: int
) -> Iterator[tuple[tuple[Tensor, ...], tuple[Tensor, ...]]]:
    """Pairs of indices [K, 3] (row, head, slot), some at a time."""
    for hole, mover in zip(
        torch.split(holes, _MOVE * heads), torch.split(movers, _MOVE * heads), strict=True
    ):
        yield tuple(hole.unbind(1)), tuple(mover.unbind(1))
