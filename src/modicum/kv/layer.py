"""The layers of a BudgetCache, as transformers sees them."""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass, field
from typing import Any, NoReturn

import torch
from torch import Tensor
from transformers.cache_utils import CacheLayerMixin, DynamicSlidingWindowLayer

from modicum.errors import BudgetError, CacheError, InputError, ModelError
from modicum.kv.arena import Arena
from modicum.kv.bank import Bank, Moment, Setting, Virtual
from modicum.kv.call import Call, Piece, read_call
from modicum.kv.choice import compete
from modicum.kv.policy import ALL
from modicum.kv.shape import LayerShape

_PROJECTIONS = ("o_proj", "out_proj", "dense", "c_proj", "wo")


class BudgetLength(int):
    """The length a budgeted layer reports for its mask, by which our mask function knows that the mask is ours."""


@dataclass
class Shared:
    """What the layers of one cache have in common."""

    config: Any
    """The configuration object of the model that the cache was built for."""
    now: int = 0
    """Bytes allocated."""
    peak: int = 0
    """Most bytes ever in use, a chunk in hand and both sides of a reallocation included."""
    last_call: tuple[Any, ...] | None = None
    call: Call | None = field(default=None)

    def change(self, nbytes: int) -> None:
        """Count bytes allocated (or freed, if negative)."""
        self.now += nbytes
        self.peak = max(self.peak, self.now)

    def in_hand(self, nbytes: int) -> None:
        """Note that so many bytes are held for the moment beside what is allocated."""
        self.peak = max(self.peak, self.now + nbytes)

    def read(
        self, before: tuple[int, ...], length: int, chunk: int, mask: Tensor | None, device: torch.device
    ) -> Call:
        """The layout of a call; worked out by its first layer and used by the others."""
        last = self.last_call
        if last is not None and last[:3] == (before, length, device) and last[3] is mask:
            assert self.call is not None
            return self.call
        self.call = read_call(before, length, chunk, mask, device)
        self.last_call = (before, length, device, mask)
        return self.call


class Handle:
    """Stands where a model expects keys and values; our attention function finds the layer in it."""

    def __init__(self, layer: BudgetLayer) -> None:
        self.layer = layer

    def __getattr__(self, name: str) -> NoReturn:
        raise CacheError(
            f"this model's attention read `{name}` of a budget cache's keys: the cache was built for another model, or "
            "the model was detached. Build the cache for this model: BudgetCache(model, …)"
        )


class BudgetLayer(CacheLayerMixin):  # type: ignore[misc]  # transformers is not typed
    """One full-attention layer's slots."""

    is_sliding = False
    is_compileable = False
    is_croppable = False

    def __init__(
        self,
        setting: Setting,
        shape: LayerShape,
        capacities: list[int],
        streaming: list[bool],
        shared: Shared,
    ) -> None:
        super().__init__()
        self.setting = setting
        self.shape = shape
        self.capacities = capacities
        """Slots per KV head between calls, a virtual token's included."""
        self.streaming = streaming
        self.shared = shared
        self.banks: list[Bank] = []
        self.seen = 0
        self.row_seen: tuple[int, ...] = ()
        self.queries: Tensor | None = None
        """[B, H, G, R, Dk]: the last R queries, a ring; None if the policy reads none."""
        self.query_positions: Tensor | None = None
        """[B, R] int32, -1 for none."""
        self._ring = 0
        self._incoming: tuple[Tensor, Tensor] | None = None

    # -- what is stored ------------------------------------------------------------------------------------------

    @property
    def batch(self) -> int:
        return len(self.row_seen)

    @property
    def compensates(self) -> bool:
        return bool(getattr(self.setting.policy, "compensate", False))

    @property
    def nbytes(self) -> int:
        """Bytes of live storage."""
        memory = 0
        if self.queries is not None and self.query_positions is not None:
            memory = self.queries.untyped_storage().nbytes() + self.query_positions.untyped_storage().nbytes()
        return sum(bank.nbytes for bank in self.banks) + memory

    @property
    def held(self) -> Tensor:
        """[B, H] slots in use, virtual tokens included."""
        held = torch.zeros(self.batch, self.shape.kv_heads, dtype=torch.int64)
        for bank in self.banks:
            held[bank.rows, bank.heads] = torch.tensor(bank.arena.live)[:, None]
            if bank.virtual is not None:
                held[bank.rows, bank.heads] += (bank.virtual.count > 0).cpu()
        return held

    @property
    def positions(self) -> Tensor:
        """[B, H, N] absolute positions of what is held; -1 for an empty or a virtual slot."""
        width = max((int(n) for n in self.held.flatten()), default=0)
        out = torch.full((self.batch, self.shape.kv_heads, width), -1, dtype=torch.int64)
        for bank in self.banks:
            bank.arena.settle()
            n = bank.arena.used
            held = bank.arena.positions[:, :, :n].to("cpu", torch.int64)
            valid = bank.arena.valid(n) if n else None
            out[bank.rows, bank.heads, :n] = held if valid is None else held.masked_fill(~valid.cpu(), -1)
        return out

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Allocate everything, once."""
        b, h, _, key_dim = key_states.shape
        value_dim = value_states.shape[-1]
        self.dtype, self.device = key_states.dtype, key_states.device
        policy = self.setting.policy
        width = policy.state_width(self.shape.group)
        self.row_seen = (0,) * b
        self.banks = []
        for rows, heads in self._blocks(b):
            streaming = self.streaming[heads.start]
            capacity = self.capacities[heads.start]
            shape = (rows.stop - rows.start, heads.stop - heads.start)
            virtual = None
            if streaming and self.compensates:
                capacity -= 1
                virtual = Virtual(
                    torch.zeros(*shape, key_dim, device=self.device),
                    torch.zeros(*shape, value_dim, device=self.device),
                    torch.zeros(*shape, device=self.device),
                )
            kept = 0 if streaming else width
            arena = Arena(*shape, capacity, key_dim, value_dim, kept, self.dtype, self.device)
            self.banks.append(Bank(rows, heads, arena, streaming, virtual))
        if policy.query_rows > 0:
            ring = (b, h, self.shape.group, policy.query_rows, key_dim)
            self.queries = torch.zeros(ring, dtype=self.dtype, device=self.device)
            self.query_positions = torch.full(
                (b, policy.query_rows), -1, dtype=torch.int32, device=self.device
            )
        self.is_initialized = True
        self.shared.change(self.nbytes)

    def _blocks(self, rows: int) -> list[tuple[slice, slice]]:
        """Rows × heads that share an arena: runs of heads of one kind, or every head of every row by itself."""
        heads = self.shape.kv_heads
        if self.setting.policy.head_shares() is not None:
            return [(slice(r, r + 1), slice(h, h + 1)) for r in range(rows) for h in range(heads)]
        kinds = list(zip(self.capacities, self.streaming, strict=True))
        edges = [h for h in range(heads) if h == 0 or kinds[h] != kinds[h - 1]] + [heads]
        return [(slice(0, rows), slice(a, b)) for a, b in zip(edges, edges[1:], strict=False)]

    # -- what transformers calls ---------------------------------------------------------------------------------

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Handle, Handle]:
        """Take a call's keys and values [B, H, q, D] in hand; the attention function does the rest."""
        self._check(key_states, value_states)
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        self._incoming = (key_states.detach(), value_states.detach())
        handle = Handle(self)
        return handle, handle

    def _check(self, key: Tensor, value: Tensor) -> None:
        name = f"layer {self.setting.layer}"
        if key.shape[1] != self.shape.kv_heads or key.shape[-1] != self.shape.key_dim:
            raise CacheError(
                f"{name} got keys of {key.shape[1]} heads × {key.shape[-1]}, the cache was built for "
                f"{self.shape.kv_heads} × {self.shape.key_dim}: build a cache for this model"
            )
        if self.is_initialized and key.shape[0] != self.batch:
            raise CacheError(
                f"{name} got a batch of {key.shape[0]}, the cache holds {self.batch}: use a new cache, or cache.reset()"
            )
        if self.is_initialized and (key.dtype != self.dtype or key.device != self.device):
            raise CacheError(
                f"{name} got {key.dtype} on {key.device}, the cache holds {self.dtype} on {self.device}: use a new "
                "cache for the new dtype or device"
            )
        if value.shape[-1] != self.shape.value_dim:
            raise CacheError(f"{name} got values of width {value.shape[-1]}, expected {self.shape.value_dim}")
        # A finite sum means finite terms. On a GPU each look costs a wait, so decode goes without.
        if (key.shape[2] > 1 or not key.is_cuda) and not math.isfinite(key.sum().item()):
            bad = int((~torch.isfinite(key)).sum())
            if bad:
                raise InputError(
                    f"{name}: {bad} of {key.numel()} key values are not finite (nan or inf), so nothing can be scored: "
                    "check the weights and the dtype (fp16 overflows at 65504; bfloat16 does not)"
                )

    def get_seq_length(self, *args: Any) -> int:
        """Columns seen, pads included, whatever is held: so positions and later turns go on where they should."""
        return self.seen

    def get_mask_sizes(self, query_length: int | Tensor) -> tuple[int, int]:
        """(length, offset) such that a mask would be causal to the lower right."""
        q = query_length if isinstance(query_length, int) else query_length.shape[0]
        held = max((bank.arena.used for bank in self.banks), default=0)
        return BudgetLength(held + q), self.seen - held

    def get_max_length(self) -> int:
        """-1: a cache under a budget takes sequences of any length."""
        return -1

    def get_max_cache_shape(self) -> int:
        """The older name of `get_max_length`."""
        return -1

    def crop(self, *args: Any) -> None:
        raise CacheError(
            "a budget cache cannot take tokens back, as what was evicted for them is gone: use generation without "
            "assistant_model, prompt_lookup_num_tokens or another form of assisted decoding"
        )

    def activate_past_recording(self) -> None:
        self.crop()

    def reset(self) -> None:
        """Forget everything; the next call may have another batch size."""
        if self.is_initialized:
            self.shared.change(-self.nbytes)
        self.banks, self.queries, self.query_positions = [], None, None
        self.seen, self.row_seen, self._ring = 0, (), 0
        self._incoming = None
        self.is_initialized = False

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self._select_rows(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._select_rows(torch.arange(self.batch).repeat_interleave(repeats))

    def batch_select_indices(self, indices: Tensor) -> None:
        if indices.dtype == torch.bool:
            indices = indices.nonzero().flatten()
        self._select_rows(indices)

    def _select_rows(self, index: Tensor) -> None:
        if not self.is_initialized:
            return
        before = self.nbytes
        chosen = [int(i) for i in index.tolist()]
        if self.setting.policy.head_shares() is None:
            for bank in self.banks:
                bank.arena.select_rows(index)
                bank.rows = slice(0, len(chosen))
                if bank.virtual is not None:
                    to = index.to(self.device)
                    bank.virtual = Virtual(*(t.index_select(0, to) for t in bank.virtual.tensors.values()))
        else:
            moved = []
            for new, old in enumerate(chosen):
                for bank in self.banks:
                    if bank.rows.start == old:
                        twin = copy.deepcopy(bank)
                        twin.rows = slice(new, new + 1)
                        moved.append(twin)
            self.banks = moved
        if self.queries is not None and self.query_positions is not None:
            to = index.to(self.device)
            self.queries = self.queries.index_select(0, to)
            self.query_positions = self.query_positions.index_select(0, to)
        self.row_seen = tuple(self.row_seen[i] for i in chosen)
        self.shared.change(self.nbytes - before)

    def offload(self) -> None:
        raise CacheError("a budget cache is not offloaded: give it a smaller budget instead")

    prefetch = offload

    # -- what our attention function calls -----------------------------------------------------------------------

    def attend(
        self,
        module: torch.nn.Module,
        query: Tensor,
        mask: Tensor | None,
        scaling: float,
        softcap: float | None,
    ) -> Tensor:
        """Attend, score, evict, piece by piece; query [B, Hq, q, Dk], mask [B, columns] or None -> [B, q, Hq, Dv]."""
        if self._incoming is None:
            raise CacheError("attention without keys: update() comes first")
        key, value = self._incoming
        self._incoming = None
        b, h, q, _ = key.shape
        grouped = query.detach().view(b, h, -1, q, query.shape[-1])  # [B, H, G, q, Dk]
        call = self.shared.read(self.row_seen, q, self.setting.budget.chunk, mask, self.device)
        if not self.setting.policy.evicts:
            self._check_room(call)
        outs = []
        for piece in call.pieces:
            part = slice(piece.start, piece.stop)
            outs.append(
                self._piece(
                    module,
                    grouped[:, :, :, part],
                    key[:, :, part],
                    value[:, :, part],
                    piece,
                    scaling,
                    softcap,
                )
            )
        self.seen += q
        self.row_seen = call.after
        out = outs[0] if len(outs) == 1 else torch.cat(outs, dim=3)  # [B, H, G, q, Dv]
        return out.flatten(1, 2).transpose(1, 2).contiguous()

    def _check_room(self, call: Call) -> None:
        most, room = max(call.after), min(self.capacities)
        if most > room:
            raise BudgetError(
                f"the policy 'full' never evicts, and {most} tokens do not fit a budget of {room}: give a budget of at "
                f"least {most} tokens, or a policy that lets go (keydiff, snapkv, …)"
            )

    def _piece(
        self,
        module: torch.nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        piece: Piece,
        scaling: float,
        softcap: float | None,
    ) -> Tensor:
        policy = self.setting.policy
        b, h, g, m, _ = query.shape
        size = key.element_size()
        self.shared.in_hand(b * h * m * (key.shape[-1] + value.shape[-1]) * size)
        if policy.query_rows > 0:
            self._remember(query, piece)
        weight = self._output_weight(module) if policy.needs_output_weight else None
        whole = len(self.banks) == 1
        out = None if whole else value.new_empty(b, h, g, m, value.shape[-1])
        moments = []
        for bank in self.banks:
            queries, at = self._queries(query, piece, bank)
            local = weight if weight is None or whole else weight[bank.heads]
            moments.append(Moment(piece, bank.rows, scaling, softcap, queries, at, local, g))
        if policy.head_shares() is not None and (m > 1 or piece.valid is not None):
            assert out is not None or whole
            out = value.new_empty(b, h, g, m, value.shape[-1])
            self._competing_chunk(moments, query, key, value, out)
            return out
        for bank, moment in zip(self.banks, moments, strict=True):
            if out is None:
                return bank.attend(self.setting, moment, query, key, value)
            block = (bank.rows, bank.heads)
            out[block] = bank.attend(self.setting, moment, query[block], key[block], value[block])
        assert out is not None
        return out

    def _remember(self, query: Tensor, piece: Piece) -> None:
        """Put the piece's last queries into the ring."""
        assert self.queries is not None and self.query_positions is not None
        room = self.queries.shape[3]
        positions = piece.positions.expand(query.shape[0], -1)
        if piece.length >= room:
            self.queries.copy_(query[:, :, :, -room:])
            self.query_positions.copy_(positions[:, -room:])
            self._ring = 0
            return
        if piece.length == 1:
            self.queries[:, :, :, self._ring] = query[:, :, :, 0]
            self.query_positions[:, self._ring] = positions[:, 0]
        else:
            slot = (self._ring + torch.arange(piece.length, device=query.device)) % room
            self.queries.index_copy_(3, slot, query)
            self.query_positions.index_copy_(1, slot, positions)
        self._ring = (self._ring + piece.length) % room

    def _queries(self, query: Tensor, piece: Piece, bank: Bank) -> tuple[Tensor | None, Tensor | None]:
        rows = self.setting.policy.query_rows
        if rows == 0:
            return None, None
        if rows == ALL:
            positions = piece.positions.expand(query.shape[0], -1)
            return query[bank.rows, bank.heads], positions[bank.rows]
        assert self.queries is not None and self.query_positions is not None
        return self.queries[bank.rows, bank.heads], self.query_positions[bank.rows]

    def _output_weight(self, module: torch.nn.Module) -> Tensor:
        """[H, G, Dv, hidden]: the output projection's slice of each query head, a view of the weight."""
        for name in _PROJECTIONS:
            weight = getattr(getattr(module, name, None), "weight", None)
            if isinstance(weight, Tensor) and weight.is_floating_point() and weight.dim() == 2:
                h, g = self.shape.kv_heads, self.shape.group
                return weight.detach().t().reshape(h, g, self.shape.value_dim, -1)
        raise ModelError(
            f"{self.setting.policy} needs the weight of the output projection, and {type(module).__name__} has none by "
            f"the names {', '.join(_PROJECTIONS)} that is a plain matrix: use another policy for this model"
        )

    def _competing_chunk(
        self, moments: list[Moment], query: Tensor, key: Tensor, value: Tensor, out: Tensor
    ) -> None:
        """A piece under head-wise budgets: the heads of a row compete for its slots, and arenas change size."""
        share = self.setting.policy.head_shares()
        assert share is not None
        heads, budget = self.shape.kv_heads, self.capacities[0]
        sure = max(int(share * budget), self.setting.budget.least(self.setting.policy.window))
        for row in range(query.shape[0]):
            block = [i for i, bank in enumerate(self.banks) if bank.rows.start == row]
            views, scores = [], []
            for i in block:
                bank = self.banks[i]
                at = (bank.rows, bank.heads)
                out[at], view = bank.look(self.setting, moments[i], query[at], key[at], value[at])
                views.append(view)
                scores.append(bank.score(self.setting, view)[0, 0])
            keeps = compete(scores, [v.positions[0, 0] for v in views], heads * budget, sure)
            kept = [int(keep.sum()) for keep in keeps]
            slack = heads * budget - sum(kept)
            fits = all(n <= self.banks[i].arena.capacity for n, i in zip(kept, block, strict=True))
            plan = [self.banks[i].arena.capacity for i in block]
            if not fits or slack == 0:
                plan = [n + slack // heads + (j < slack % heads) for j, n in enumerate(kept)]
            self._reshape_row(block, keeps, plan, views)
            for j, i in enumerate(block):
                bank, view = self.banks[i], views[j]
                at = (bank.rows, bank.heads)
                m = key.shape[2]
                there = torch.ones(bank.arena.used, dtype=torch.bool, device=key.device)
                keep = torch.cat([there, keeps[j][-m:]])[None, None]
                state = None
                if view.state is not None and view.state.shape[-1]:
                    n = bank.arena.used
                    state = torch.cat([bank.arena.state[:, :, :n], view.state[:, :, -m:]], dim=2)
                bank.take(keep, [kept[j]], moments[i], key[at], value[at], state)

    def _reshape_row(self, block: list[int], keeps: list[Tensor], plan: list[int], views: list[Any]) -> None:
        """Drop what goes from the arenas of a row and give each its new capacity, the shrinking ones first."""
        for j, i in enumerate(block):
            arena = self.banks[i].arena
            n = arena.used
            if n == 0:
                continue
            if views[j].state is not None and views[j].state.shape[-1]:
                arena.state[:, :, :n] = views[j].state[:, :, :n]
            keep = keeps[j][:n]
            arena.absorb(keep[None, None], [int(keep.sum())])
        for j, i in sorted(
            enumerate(block), key=lambda item: plan[item[0]] - self.banks[item[1]].arena.capacity
        ):
            arena = self.banks[i].arena
            if plan[j] != arena.capacity:
                other = arena.resized(plan[j])
                self.shared.change(other.nbytes)
                self.banks[i].arena = other
                self.shared.change(-arena.nbytes)

    def check(self) -> str | None:
        """What is wrong, or None."""
        for bank in self.banks:
            wrong = bank.arena.check()
            if wrong is not None:
                return f"heads {bank.heads.start} to {bank.heads.stop - 1}: {wrong}"
            for row, live in enumerate(bank.arena.live):
                # A row that has seen little holds it all; past that, evict_every leaves a little slack at most.
                seen = self.row_seen[bank.rows.start + row]
                if live > seen:
                    return f"row {row} holds {live} tokens and has seen {seen}"
        total = int(self.held.sum())
        most = self.batch * sum(self.capacities)
        if total > most:
            return f"{total} slots are in use, the budget allows {most}"
        return None


class WindowLayer(DynamicSlidingWindowLayer):  # type: ignore[misc]  # transformers is not typed
    """A sliding-window layer: transformers' own, its storage cut to the window after each call."""

    is_croppable = False

    def __init__(self, sliding_window: int, shape: LayerShape, shared: Shared) -> None:
        super().__init__(sliding_window)
        self.shape = shape
        self.shared = shared

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        before = self.nbytes
        keys, values = super().update(key_states, value_states)
        # What is kept is a view of all that came: copy it, so that the rest is really freed.
        self.keys, self.values = self.keys.detach().clone(), self.values.detach().clone()
        self.shared.change(self.nbytes - before)
        length = key_states.shape[2]
        self.shared.in_hand(length * (key_states[:, :, :1].nbytes + value_states[:, :, :1].nbytes))
        return keys, values

    @property
    def batch(self) -> int:
        return self.keys.shape[0] if self.is_initialized else 0

    @property
    def nbytes(self) -> int:
        if not self.is_initialized:
            return 0
        return int(self.keys.untyped_storage().nbytes() + self.values.untyped_storage().nbytes())

    @property
    def held(self) -> Tensor:
        held = self.keys.shape[2] if self.is_initialized else 0
        return torch.full((self.batch, self.shape.kv_heads), held, dtype=torch.int64)

    @property
    def positions(self) -> Tensor:
        """[B, H, N] columns of what is held (pads counted: a window does not know them)."""
        held = self.keys.shape[2] if self.is_initialized else 0
        line = torch.arange(self.cumulative_length - held, self.cumulative_length)
        return line.expand(self.batch, self.shape.kv_heads, held).clone()

    @property
    def seen(self) -> int:
        return int(self.cumulative_length)

    def reset(self) -> None:
        self.shared.change(-self.nbytes)
        self.keys = self.values = None
        self.is_initialized = False
        self.cumulative_length = 0

    def crop(self, *args: Any) -> None:
        BudgetLayer.crop(self)  # type: ignore[arg-type]  # the same refusal; it reads nothing of self

    def activate_past_recording(self) -> None:
        self.crop()

    def check(self) -> str | None:
        if self.is_initialized and self.keys.shape[2] > max(self.sliding_window - 1, 0):
            return f"{self.keys.shape[2]} tokens held, the window keeps {self.sliding_window - 1}"
        return None
