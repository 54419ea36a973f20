"""Listening: a policy that keeps everything and hands what it is shown to a function."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from modicum import Budget, BudgetCache, Policy, View
from modicum.compat import cache_kwargs
from modicum.kv.policy import ALL


@dataclass(frozen=True)
class Listener(Policy):
    """Calls `hear` with the view of each layer after its attention; the view's rows can then be read."""

    name: ClassVar[str] = "listener"

    hear: Callable[[View], None] = print
    rows: int = ALL

    @property
    def query_rows(self) -> int:
        return self.rows

    @property
    def evicts(self) -> bool:
        return False

    @property
    def accumulates(self) -> bool:
        return True

    def state_width(self, group: int) -> int:
        return 1  # without state nothing is observed

    def observe(self, view: View) -> Tensor | None:
        state, view.state = view.state, None  # ours is no policy's: whoever scores works it out from the keys
        self.hear(view)
        view.state = state
        return state

    def score(self, view: View) -> Tensor:
        return torch.zeros_like(view.positions, dtype=torch.float32)


@torch.no_grad()
def listen(model: Any, ids: Tensor, hear: Callable[[View], None], rows: int = ALL) -> None:
    """Read ids [B, n] in one call with the full cache; `hear` gets each layer's view, first to last."""
    n = ids.shape[1]
    cache = BudgetCache(model, Listener(hear, rows), Budget(tokens=n, chunk=n, n_sink=0, recent=0))
    model(input_ids=ids, **cache_kwargs(model, cache), use_cache=True, logits_to_keep=1)
