"""The full cache: nothing is ever evicted."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from modicum.kv.policy import Policy
from modicum.kv.registry import register
from modicum.kv.view import View


@register
@dataclass(frozen=True)
class Full(Policy):
    """Keeps every token, as a check and a yardstick: a context longer than the budget is an error."""

    name: ClassVar[str] = "full"
    title: ClassVar[str] = "Full cache"
    paper: ClassVar[str] = "—"
    summary: ClassVar[str] = "Keeps every token; a context that outgrows the budget is an error."

    @property
    def evicts(self) -> bool:
        return False

    @property
    def is_rotation_invariant(self) -> bool:
        return True

    def score(self, view: View) -> Tensor:
        return torch.zeros_like(view.positions, dtype=torch.float32)
