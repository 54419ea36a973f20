"""Ablation: AhaKV with its three parts switched off one by one; with none of them left it is H2O."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product
from typing import ClassVar

import torch
from torch import Tensor

from modicum import AhaKV, PolicyError, View
from modicum.kv.policy import ALL

PARTS = ("recent", "step", "prior")


@dataclass(frozen=True)
class Ablation(AhaKV):
    """AhaKV's score, or what is left of it."""

    name: ClassVar[str] = "ablation"

    recent: bool = True
    """Sum over the last `window` queries; else over all queries since a token came, as H2O."""
    step: bool = True
    """Step-gain softmax; else the model's own."""
    values: bool = True
    """The prior from the values' norms; else none."""

    @property
    def query_rows(self) -> int:
        return self.window if self.recent else ALL

    @property
    def accumulates(self) -> bool:
        return not self.recent

    def state_width(self, group: int) -> int:
        return 0 if self.recent else 1

    def gain(self, view: View) -> Tensor:
        return super().gain(view) if self.step else torch.ones_like(super().gain(view))

    def prior(self, view: View) -> Tensor:
        return super().prior(view) if self.values else torch.ones_like(view.positions, dtype=torch.float32)

    def observe(self, view: View) -> Tensor | None:
        if view.state is not None:
            for rows in view.row_tiles(self.gain(view)):
                view.state[..., 0] += rows.sum(3).mean(2)
        return view.state

    def score(self, view: View) -> Tensor:
        if self.recent:
            return super().score(view)
        if view.state is None:
            raise PolicyError("ablation: the view has no state to score by")
        return view.state[..., 0] * self.prior(view)

    @property
    def label(self) -> str:
        """In words."""
        on = (self.recent, self.step, self.values)
        if all(on):
            return "AhaKV"
        if not any(on):
            return "none (H2O)"
        off = [name for name, there in zip(PARTS, on, strict=True) if not there]
        return f"without {off[0]}" if len(off) == 1 else f"{PARTS[on.index(True)]} only"


def every() -> list[Ablation]:
    """All eight: whole, one part off, one part on, none."""
    made = [Ablation(recent=r, step=s, values=v) for r, s, v in product((True, False), repeat=3)]
    return sorted(made, key=lambda a: (-sum((a.recent, a.step, a.values)), a.recent, a.step))
