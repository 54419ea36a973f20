"""BudgetLayer: one full-attention layer of a BudgetCache, as transformers sees it."""

from __future__ import annotations

import copy
from itertools import pairwise
from typing import Any, NoReturn

import torch
from torch import Tensor
from transformers.cache_utils import CacheLayerMixin

from modicum.errors import BudgetError, CacheError, ModelError
from modicum.kv import admission, contest
from modicum.kv.arena import Arena
from modicum.kv.bank import Bank, Moment, Setting, Virtual
from modicum.kv.call import Piece
from modicum.kv.filling import Filling
from modicum.kv.latent import absorbed_query, announce, expanded_output
from modicum.kv.layer_shape import LayerShape
from modicum.kv.output_weight import output_weight
from modicum.kv.policy import ALL
from modicum.kv.ring import QueryRing
from modicum.kv.room import stacks
from modicum.kv.shared import OURS, BudgetLength, Handle, Shared, lasting
from modicum.kv.shared_reads import SharedReads
from modicum.kv.stack import Stack
from modicum.kv.store import PLAIN, Store


def _block(both: tuple[Tensor, Tensor], bank: Bank) -> tuple[Tensor, Tensor]:
    """A bank's rows and heads of keys and values."""
    return both[0][bank.rows, bank.heads], both[1][bank.rows, bank.heads]


def refuse_crop() -> NoReturn:
    """Say why a cache under a budget cannot be cropped."""
    raise CacheError(
        "a budget cache cannot take tokens back, as what was evicted for them is gone: generate without "
        "assistant_model, prompt_lookup_num_tokens or another form of assisted decoding"
    )


class BudgetLayer(CacheLayerMixin):  # type: ignore[misc]  # transformers is not typed
    """One full-attention layer's slots."""

    is_sliding = False
    is_croppable = False

    def __init__(
        self,
        setting: Setting,
        shape: LayerShape,
        capacities: list[int],
        streaming: list[bool],
        shared: Shared,
        store: Store = PLAIN,
    ) -> None:
        super().__init__()
        self.store = store.of_layer(shape)
        self.setting = setting
        self.shape = shape
        self.capacities = capacities
        """Slots per KV head between calls, a virtual token's included."""
        self.streaming = streaming
        self.shared = shared
        self.banks: list[Bank] = []
        self.seen = 0
        self.row_seen: tuple[int, ...] = ()
        self.order = len(shared.layers)
        """Its place among the layers under the budget."""
        shared.layers.append(self)
        self.ring: QueryRing | None = None
        """The last queries, if the policy reads their attention rows."""
        self.reads = SharedReads(shape.num_readers) if shape.num_readers else None
        """What other layers of a call read of this one."""
        self._incoming: tuple[Tensor, Tensor] | None = None

    @property
    def is_compileable(self) -> bool:
        """Whether transformers may compile a decode step."""
        return self.shared.static

    @property
    def incoming(self) -> tuple[Tensor, ...]:
        """Keys and values of the call under way, until attention has taken them."""
        return self._incoming or ()

    # -- what is stored
    # ------------------------------------------------------------------------------------------

    @property
    def batch(self) -> int:
        return len(self.row_seen)

    @property
    def compensates(self) -> bool:
        return bool(getattr(self.setting.policy, "compensate", False))

    @property
    def nbytes(self) -> int:
        """Bytes of live storage."""
        return self.kv_nbytes

    @property
    def kv_nbytes(self) -> int:
        """Bytes of the slots and of what is kept beside them."""
        return sum(bank.nbytes for bank in self.banks) + (0 if self.ring is None else self.ring.nbytes)

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
        b, h = key_states.shape[:2]
        key_dim, value_dim = self.shape.key_dim, self.shape.value_dim
        self.dtype, self.device = key_states.dtype, key_states.device
        policy = self.setting.policy
        width = policy.state_width(self.shape.group)
        self.row_seen = (0,) * b
        self.banks = []
        if self is self.shared.layers[0]:
            self.shared.stacks = stacks(self.shared.layers, b, self.dtype, self.device)
        for rows, heads in self._blocks(b):
            streaming = self.streaming[heads.start]
            capacity = self.capacities[heads.start]
            shape = (rows.stop - rows.start, heads.stop - heads.start)
            virtual = None
            kind = (capacity, streaming)
            if streaming and self.compensates:
                capacity -= 1
                virtual = Virtual.make(*shape, key_dim, value_dim, self.device, self._stack("virtual", kind))
            columns = (
                self.store.keys.columns(key_dim),
                self.store.values.columns(self.shape.stored_value_dim),
            )
            arena = Arena(
                *shape,
                capacity,
                *columns,
                0 if streaming else width,
                self.store.dtype(self.dtype),
                self.device,
                0 if streaming else policy.sum_width(key_dim, value_dim),
                self._stack("arena", kind),
                0 if streaming else policy.tally_width(self.shape.group, key_dim),
            )
            latent_dim = value_dim if self.shape.is_latent else 0
            self.banks.append(
                Bank(rows, heads, arena, streaming, virtual, self.store, self.dtype, latent_dim)
            )
        if policy.kept_queries > 0:
            size = (b, h, self.shape.group, policy.kept_queries, key_dim, self.dtype, self.device)
            self.ring = QueryRing(*size, self._stack("ring"), self._stack("line"))
        self.is_initialized = True
        self.shared.change(self.kv_nbytes)

    def _stack(self, what: str, kind: tuple[int, bool] = (0, False)) -> Stack | None:
        """Room beside other layers', if there is any."""
        stack = self.shared.stacks.get((what, *kind))
        return None if stack is None or stack.device != self.device else stack

    def _blocks(self, rows: int) -> list[tuple[slice, slice]]:
        """Rows × heads that share an arena: runs of heads of one kind, or every head of every row by
        itself.
        """
        heads = self.shape.kv_heads
        if self.setting.policy.head_shares() is not None:
            return [(slice(r, r + 1), slice(h, h + 1)) for r in range(rows) for h in range(heads)]
        kinds = list(zip(self.capacities, self.streaming, strict=True))
        edges = [h for h in range(heads) if h == 0 or kinds[h] != kinds[h - 1]] + [heads]
        return [(slice(0, rows), slice(a, b)) for a, b in pairwise(edges)]

    # -- what transformers calls
    # ---------------------------------------------------------------------------------

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
        """Take a call's keys and values [B, H, q, D] in hand; the attention function does the rest."""
        index = self.setting.layer
        admission.check_shape(index, key_states, value_states, self.shape)
        if self.is_initialized:
            admission.check_like(index, key_states, self.batch, self.dtype, self.device)
        if key_states.shape[2] > 1 or not self.is_initialized:
            admission.check_finite(index, key_states)
        if not self.is_initialized:
            self._allocate(key_states, value_states)
        if self.reads is not None:
            self.reads.begin()
        handle = Handle(self)
        if self.shape.is_latent:
            key = torch.cat([key_states, value_states], dim=-1)  # [B, 1, q, rank + rope]
            self._incoming = (key, key[..., : self.shape.value_dim])
            announce(handle, index, value_states, is_first=self.order == 0)
            return key_states, value_states
        self._incoming = (key_states, value_states)
        return handle, handle

    def _allocate(self, key: Tensor, value: Tensor) -> None:
        try:
            with lasting():
                self.lazy_initialization(key, value)
        except RuntimeError as error:  # torch's out of memory, on whatever device
            self.banks, self.ring, self.row_seen = [], None, ()
            self.shared.apart()
            raise BudgetError(
                f"there is no memory for the {sum(self.capacities)} slots of layer {self.setting.layer} "
                f"({key.shape[0]} rows, {key.dtype}, {key.device}): give a smaller budget"
            ) from error

    def get_seq_length(self, *args: Any) -> int | Tensor:
        """Columns seen, pads included, whatever is held: so positions and later turns go on where they
        should. A tensor while counts are tensors.
        """
        steps = self.shared.steps
        return steps.columns if steps is not None and steps.static else self.seen

    def get_mask_sizes(self, query_length: int | Tensor) -> tuple[int, int]:
        """(length, offset) such that a mask would be causal to the lower right."""
        if torch.compiler.is_compiling():
            return OURS, 0
        q = query_length if isinstance(query_length, int) else query_length.shape[0]
        held = max((bank.arena.used for bank in self.banks), default=0)
        length = BudgetLength(held + q)
        length.layer, length.new = self, q
        return length, self.seen - held

    def get_max_length(self) -> int:
        """-1: a cache under a budget takes sequences of any length."""
        return -1

    def get_max_cache_shape(self) -> int:
        """The older name of `get_max_length`."""
        return -1

    def crop(self, *args: Any) -> NoReturn:
        refuse_crop()

    def activate_past_recording(self) -> NoReturn:
        refuse_crop()

    def reset(self) -> None:
        """Forget everything; the next call may have another batch size."""
        if self.is_initialized:
            self.shared.change(-self.kv_nbytes)
        self.banks, self.ring = [], None
        self.shared.apart()
        self.seen, self.row_seen = 0, ()
        self._incoming = None
        self.is_initialized = False

    def reorder_cache(self, beam_idx: Tensor) -> None:
        with lasting(), torch.no_grad():
            self._select_rows(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        self.reorder_cache(torch.arange(self.batch).repeat_interleave(repeats))

    def batch_select_indices(self, indices: Tensor) -> None:
        if indices.dtype == torch.bool:
            indices = indices.nonzero().flatten()
        self.reorder_cache(indices)

    def _select_rows(self, index: Tensor) -> None:
        if not self.is_initialized:
            return
        before = self.kv_nbytes
        chosen = [int(i) for i in index.tolist()]
        shared, changed = self.shared, len(chosen) != self.batch
        if self is shared.layers[0]:
            shared.part()
            if changed:
                shared.apart()
                shared.stacks = stacks(shared.layers, len(chosen), self.dtype, self.device)
        if self.setting.policy.head_shares() is None:
            for bank in self.banks:
                kind = (bank.arena.capacity + (bank.virtual is not None), bank.streaming)
                bank.arena.select_rows(index, self._stack("arena", kind) if changed else None)
                bank.rows = slice(0, len(chosen))
                if bank.virtual is not None:
                    room = self._stack("virtual", kind) if changed else None
                    bank.virtual = bank.virtual.rows(index.to(self.device), room)
        else:
            moved = []
            for new, old in enumerate(chosen):
                for bank in self.banks:
                    if bank.rows.start == old:
                        twin = copy.deepcopy(bank)
                        twin.rows = slice(new, new + 1)
                        moved.append(twin)
            self.banks = moved
        if self.ring is not None:
            rooms = (self._stack("ring"), self._stack("line")) if changed else ()
            self.ring.select_rows(index, *rooms)
        self.row_seen = tuple(self.row_seen[i] for i in chosen)
        shared.change(self.kv_nbytes)  # for a moment beside the old, which goes with the last layer
        shared.leaving += before
        if self is shared.layers[-1]:
            shared.change(-shared.leaving)
            shared.leaving = 0

    def offload(self) -> None:
        raise CacheError("a budget cache is not offloaded: give it a smaller budget instead")

    prefetch = offload

    # -- what our attention function calls
    # -----------------------------------------------------------------------

    def attend(
        self,
        module: torch.nn.Module,
        query: Tensor,
        mask: Tensor | None,
        scaling: float,
        softcap: float | None,
        positions: Tensor | None = None,
        sinks: Tensor | None = None,
    ) -> Tensor:
        """Attend, score, evict, piece by piece; query [B, Hq, q, Dk], mask [B, columns] or None ->
        [B, q, Hq, Dv]. `positions` [B|1, q] are those at which the model turned queries and keys; sinks [Hq]
        are logits that join the softmax.
        """
        if self.shape.is_latent:
            query = absorbed_query(module, query)
        query = self._rotated_query(query)
        out = self._rotated_back(self._attend(module, query, mask, scaling, softcap, positions, sinks))
        return expanded_output(module, out) if self.shape.is_latent else out

    def _rotated_query(self, query: Tensor) -> Tensor:
        """Queries [B, Hq, q, Dk] in the space in which keys are read."""
        return self.store.keys.rotated(query) if self.store.keys.is_rotated else query

    def _rotated_back(self, out: Tensor) -> Tensor:
        """Outputs [B, q, Hq, Dv] out of the space in which values are read."""
        return self.store.values.rotated(out) if self.store.has_rotated_values else out

    def attend_again(
        self, query: Tensor, scaling: float, softcap: float | None, sinks: Tensor | None
    ) -> Tensor:
        """The attention of a later layer that reads this one's keys and values: query [B, Hq, q, Dk] ->
        [B, q, Hq, Dv].
        """
        if self.reads is None or not self.reads.reads:
            raise CacheError(f"layer {self.setting.layer} is read by another layer before it has attended")
        b, _, q, dim = query.shape
        query = self._rotated_query(query)
        grouped = query.reshape(b, self.shape.kv_heads, -1, q, dim)  # of the call's last tokens
        own = None if sinks is None else sinks.view(grouped.shape[1:3])
        out = self.reads.attend(grouped, scaling, softcap, own)
        return self._rotated_back(out.flatten(1, 2).transpose(1, 2).contiguous())

    def _attend(
        self,
        module: torch.nn.Module,
        query: Tensor,
        mask: Tensor | None,
        scaling: float,
        softcap: float | None,
        positions: Tensor | None,
        sinks: Tensor | None,
    ) -> Tensor:
        if self._incoming is None:
            raise CacheError("attention without keys: update() comes first")
        key, value = self._incoming
        self._incoming = None
        b, h, q, _ = key.shape
        if self.order == 0 and not torch.compiler.is_compiling():
            self.shared.check_positions(positions, mask, q)
        if q == 1:
            steps = self.shared.joint(self, mask)
            if isinstance(steps, Filling):
                weight = self._output_weight(module) if self.setting.policy.needs_output_weight else None
                return steps.attend(self.order, query, key, value, scaling, softcap, weight, sinks)
            if steps is not None:
                return steps.attend(self.order, query, key, value, mask, scaling, softcap)
            admission.check_finite(self.setting.layer, key)
        self.shared.part()
        if self.shared.turning is not None:
            if positions is None:
                raise ModelError(
                    f"{type(module).__name__} does not tell its attention the positions, so they cannot be "
                    "renumbered: leave positions='original'"
                )
            query, key = (self.shared.turning.back(x, positions) for x in (query, key))
        grouped = query.reshape(b, h, -1, q, query.shape[-1])  # [B, H, G, q, Dk]
        again = self.shared.replayed
        call = self.shared.read(
            self.row_seen,
            q - again,
            self.setting.budget.chunk,
            self.setting.recent,
            self.shared.without_replay(mask),
            self.device,
        )
        if not self.setting.policy.evicts:
            admission.check_room(max(call.after), self.shared.room)
        outs = []
        for piece in call.pieces:
            part = slice(piece.start, piece.stop + again)
            outs.append(
                self._piece(
                    module,
                    grouped[:, :, :, part],
                    key[:, :, part],
                    value[:, :, part],
                    piece,
                    scaling,
                    softcap,
                    sinks,
                )
            )
        self.seen += q - again
        self.row_seen = call.after
        if self.setting.layer == self.shared.last:
            self.shared.forget()
        if q == 1:
            return outs[0].reshape(b, 1, -1, value.shape[-1])
        out = outs[0] if len(outs) == 1 else torch.cat(outs, dim=3)  # [B, H, G, q, Dv]
        return out.flatten(1, 2).transpose(1, 2).contiguous()

    def check_room(self, mask: Tensor | None, columns: int) -> None:
        """Raise if a policy that never evicts has no room for a call, before any layer has taken it."""
        if self.setting.policy.evicts:
            return
        new = [columns] * max(1, self.batch) if mask is None else mask[:, -columns:].sum(1).tolist()
        seen = self.row_seen or (0,) * len(new)
        admission.check_room(max(map(sum, zip(seen, new, strict=False))), self.shared.room)

    def _piece(
        self,
        module: torch.nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        piece: Piece,
        scaling: float,
        softcap: float | None,
        sinks: Tensor | None,
    ) -> Tensor:
        setting, policy, scorer = self.setting, self.setting.policy, self.shared.scorer
        b, h, g, m, _ = query.shape
        fresh = piece.length  # the columns behind are a replay's
        scores = None
        if scorer is not None:
            turned_at = None if self.shared.turning is not None else piece.positions
            scores = scorer.scores(setting.layer, key, value, turned_at)
        in_hand = key[:, :, :1].nbytes + value[:, :, :1].nbytes
        stored = self._stored(key, value)
        if self.store.is_coded:
            # Attend to the quantised values now, so that results do not depend on chunk boundaries.
            key, value = self._decoded(stored)
            in_hand += stored[0][:, :, :1].nbytes + stored[1][:, :, :1].nbytes
        kept = 0 if self.reads is None else self.reads.add(piece, self.banks, key, value)
        self.shared.in_hand(m * in_hand + kept)
        by_head = None if sinks is None else sinks.view(h, g)
        stored = (stored[0][:, :, :fresh], stored[1][:, :, :fresh])
        every_query, at = self._asked(query[:, :, :, :fresh], piece)
        weight = self._output_weight(module) if policy.needs_output_weight else None
        norms = self._replay_norms(module, m - fresh)
        moments = []
        for bank in self.banks:
            own = weight if weight is None or len(self.banks) == 1 else weight[bank.heads]
            moments.append(
                Moment(
                    piece,
                    bank.rows,
                    scaling,
                    softcap,
                    None if every_query is None else every_query[bank.rows, bank.heads],
                    None if at is None else at[bank.rows],
                    own,
                    g,
                    stored if len(self.banks) == 1 else _block(stored, bank),
                    setting.budget.n_sink,
                    self.shared.turning,
                    None if by_head is None else by_head[bank.heads],
                    self.shared.rotary,
                    m > fresh,
                    None if norms is None else norms[bank.rows],
                    None if scores is None else scores[bank.rows, bank.heads],
                )
            )
        share = policy.head_shares()
        if share is not None and (m > 1 or piece.valid is not None):
            budget = self.capacities[0]
            sure = max(int(share * budget), setting.budget.least(policy.window))
            return contest.take_in(self.banks, setting, moments, self.shared, budget, sure, query, key, value)
        if len(self.banks) == 1:
            return self.banks[0].attend(setting, moments[0], query, key, value)
        out = value.new_empty(b, h, g, m, value.shape[-1])
        for bank, moment in zip(self.banks, moments, strict=True):
            block = (bank.rows, bank.heads)
            out[block] = bank.attend(setting, moment, query[block], key[block], value[block])
        return out

    def _stored(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """A call's keys and values [B, H, m, D] as they are to lie in their slots."""
        stored = self.store.keys.encode(key)
        return stored, stored[..., :0] if self.shape.is_latent else self.store.values.encode(value)

    def _decoded(self, stored: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """Keys and values [B, H, m, D] of what is to lie in slots."""
        key = self.store.keys.decode(stored[0], self.dtype)
        if self.shape.is_latent:
            return key, key[..., : self.shape.value_dim]
        return key, self.store.values.decode(stored[1], self.dtype)

    def _asked(self, query: Tensor, piece: Piece) -> tuple[Tensor | None, Tensor | None]:
        """Take a piece's queries [B, H, G, m, Dk] into the ring; those whose rows the policy reads: [B, H, G,
        R, Dk], and their positions [B, R].
        """
        ring, every = self.ring, self.setting.policy.query_rows == ALL
        positions = piece.positions.expand(query.shape[0], -1)
        if ring is None:
            return (query, positions) if every else (None, None)
        room, several = ring.positions.shape[1], piece.length > 1
        before = None
        if every and several and (piece.valid is not None or piece.length < room):
            before = torch.cat([ring.queries, query], dim=3), torch.cat([ring.positions, positions], dim=1)
        ring.write(query, piece)
        if every and several:
            return (query, positions) if before is None else before
        return ring.queries, ring.positions

    def _output_weight(self, module: torch.nn.Module) -> Tensor:
        """[H, G, Dv, hidden]: the output projection's slice of each query head."""
        return output_weight(module, self.shape, self.device, str(self.setting.policy))

    def _replay_norms(self, module: torch.nn.Module, columns: int) -> Tensor | None:
        """[B, columns] fp32: of the hidden states of the columns read again, where the policy needs them."""
        policy = self.setting.policy
        if not columns or not policy.needs_residual_norms:
            return None
        norms = self.shared.residual_norms.get(self.setting.layer)
        if norms is None:
            raise ModelError(
                f"{policy} needs the hidden states that {type(module).__name__} is given, and found no "
                "decoder layer around it: use replay without plus"
            )
        return norms[:, -columns:].to(self.device)

    def check(self) -> str | None:
        """What is wrong, or None."""
        for bank in self.banks:
            wrong = bank.arena.check()
            if wrong is not None:
                return f"heads {bank.heads.start} to {bank.heads.stop - 1}: {wrong}"
            for row, live in enumerate(bank.arena.live):
                # A row that has seen little holds it all; past that, evict_every leaves a
                # little slack at most.
                seen = self.row_seen[bank.rows.start + row]
                if live > seen:
                    return f"row {row} holds {live} tokens and has seen {seen}"
        total = int(self.held.sum())
        most = self.batch * sum(self.capacities)
        if total > most:
            return f"{total} slots are in use, the budget allows {most}"
        return None
