"""Filling: decode steps while every head has room, so that nothing is scored and nothing goes.

As a cache fills, and between evictions of `evict_every` tokens. Each layer writes its token into the first
free slot and attends. Slots count as taken once the last layer has attended: a step that is cut short leaves
what was held as it was.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from modicum.kv import admission
from modicum.kv.bank import Bank

if TYPE_CHECKING:
    from modicum.kv.layer import BudgetLayer


def has_room(layers: Sequence[BudgetLayer]) -> bool:
    """Whether one more token of every row fits everywhere, with no score to bring up to date."""
    first = layers[0]
    if first.setting.policy.accumulates or first.shared.spread or not layers[-1].is_initialized:
        return False
    if any(layer.shape.num_readers or layer.shape.is_latent for layer in layers):
        return False
    return all(
        bank.arena.live[0] < bank.arena.capacity and bank.arena.even
        for layer in layers
        for bank in layer.banks
    )


class Filling:
    """The steps of the layers under a budget, in order."""

    def __init__(self, layers: Sequence[BudgetLayer]) -> None:
        self.layers = list(layers)
        self._positions: Tensor | None = None  # [B, 1] of the step under way; between steps nothing is held

    def attend(
        self,
        index: int,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        scaling: float,
        softcap: float | None,
        weight: Tensor | None,
        sinks: Tensor | None,
    ) -> Tensor:
        """One token of every row in one layer: query [b, Hq, 1, Dk], key [b, H, 1, Dk], value; weight: the
        layer's output projection, for a policy that reads it; sinks [Hq]: logits that join the softmax ->
        [b, 1, Hq, Dv].
        """
        layer = self.layers[index]
        admission.check_finite(layer.setting.layer, key)
        b, h = key.shape[:2]
        grouped = query.reshape(b, h, -1, query.shape[-1])
        if index == 0 or self._positions is None:
            self._positions = torch.tensor(layer.row_seen, dtype=torch.int32, device=key.device)[:, None]
        store = layer.store
        stored = store.keys.encode(key), store.values.encode(value)
        if store.is_coded:
            key = store.keys.decode(stored[0], layer.dtype)
            value = store.values.decode(stored[1], layer.dtype)
        layer.shared.in_hand(key.nbytes + value.nbytes + store.is_coded * sum(x.nbytes for x in stored))
        if layer.ring is not None:
            layer.ring.queries[:, :, :, layer.ring.next] = grouped
        by_head = None if sinks is None else sinks.view(grouped.shape[1:3])
        if len(layer.banks) == 1:
            out = self._in_bank(
                layer, layer.banks[0], grouped, stored, key, value, scaling, softcap, weight, by_head
            )
        else:
            out = value.new_empty(*grouped.shape[:3], value.shape[-1])
            for bank in layer.banks:
                at = (bank.rows, bank.heads)
                parts = (grouped[at], (stored[0][at], stored[1][at]), key[at], value[at])
                own = None if weight is None else weight[bank.heads]
                sink = None if by_head is None else by_head[bank.heads]
                out[at] = self._in_bank(layer, bank, *parts, scaling, softcap, own, sink)
        if index == len(self.layers) - 1:
            self._finish()
        return out.reshape(b, 1, -1, out.shape[-1])

    def _in_bank(
        self,
        layer: BudgetLayer,
        bank: Bank,
        query: Tensor,
        stored: tuple[Tensor, Tensor],
        key: Tensor,
        value: Tensor,
        scaling: float,
        softcap: float | None,
        weight: Tensor | None,
        sinks: Tensor | None,
    ) -> Tensor:
        """query [b, h, G, Dk]; stored: key and value [b, h, 1, C] as they lie in a slot -> [b, h, G, Dv]."""
        arena = bank.arena
        arena.settle()
        n = arena.live[0]
        arena.keys[:, :, n : n + 1] = stored[0]
        arena.values[:, :, n : n + 1] = stored[1]
        assert self._positions is not None
        arena.positions[:, :, n] = self._positions[bank.rows]
        if arena.state.shape[-1]:
            value = bank.before_projection(value, weight)
            state = layer.setting.policy.token_state(key, value, query.shape[2], weight)
            arena.state[:, :, n : n + 1] = state
        return bank.answer(query, *bank.held(n + 1), scaling, softcap, None, sinks=sinks)

    def _finish(self) -> None:
        """All layers have attended: their tokens are held."""
        for layer in self.layers:
            layer.seen += 1
            layer.row_seen = tuple(n + 1 for n in layer.row_seen)
            for bank in layer.banks:
                bank.arena.live = [n + 1 for n in bank.arena.live]
            ring = layer.ring
            if ring is not None:
                assert self._positions is not None
                ring.positions[:, ring.next] = self._positions[:, 0]
                ring.next = (ring.next + 1) % ring.queries.shape[3]
        self._positions = None
