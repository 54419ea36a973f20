"""AhaKV (2025): recent attention at an even entropy, times a prior from the values."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from modicum.errors import PolicyError
from modicum.kv.policy import Policy, check_choice, check_odd, check_positive, reduce_group
from modicum.kv.registry import register
from modicum.kv.view import View


@register
@dataclass(frozen=True)
class AhaKV(Policy):
    """s_j = γ̄_j · Σ_i softmax_j(G_i · z_ij) over the last `window` query rows i (exactly so many).

    G_i = √(2 ln(i/k)), 0 where i ≤ k: the step gain, which holds the expected entropy of a row of Gaussian
    logits at ln k whatever its length. k is the budget of the head; i counts the tokens seen by the row's
    query (count="seen") or only those still held (count="held": rows turn nearly uniform once eviction runs).
    It multiplies the model's own z; the layer's output keeps the ordinary softmax. min_gain: least G.

    γ̄_j = γ_j / max_l γ_l, γ the average of ‖v‖² over `kernel` neighbours (fewer at the edges), over all
    tokens held. Where all values are zero, γ̄ = 1. Source: arXiv 2506.03762; no code was released.
    """

    name: ClassVar[str] = "ahakv"
    title: ClassVar[str] = "AhaKV"
    paper: ClassVar[str] = "https://arxiv.org/abs/2506.03762"
    summary: ClassVar[str] = (
        "Keeps what recent queries attend to at a fixed entropy, weighted by value norms."
    )

    window: int = 32
    kernel: int = 5
    min_gain: float = 0.0
    count: Literal["seen", "held"] = "seen"
    group: Literal["mean", "max"] = "mean"

    def __post_init__(self) -> None:
        check_positive(self, window=self.window)
        check_odd(self, kernel=self.kernel)
        check_choice(self, "count", self.count, ("seen", "held"))
        check_choice(self, "group", self.group, ("mean", "max"))
        number = isinstance(self.min_gain, int | float) and not isinstance(self.min_gain, bool)
        if not number or not 0 <= self.min_gain < math.inf:
            raise PolicyError(f"ahakv: min_gain is {self.min_gain!r}; it must be a number of at least 0")

    @property
    def is_rotation_invariant(self) -> bool:
        return True

    @property
    def layerwise(self) -> bool:
        return False

    @property
    def query_rows(self) -> int:
        return self.window

    def head_scores(self, view: View) -> Tensor:
        return view.row_sums(self.gain(view)) * self.prior(view).unsqueeze(2)  # [B, H, G, N]

    def score(self, view: View) -> Tensor:
        return reduce_group(self.head_scores(view), self.group)

    def gain(self, view: View) -> Tensor:
        """G per query row: [B, R], or [B, H, R] where it depends on what each head holds."""
        _, at = view.asked
        count = at + 1
        if self.count == "held":
            past = view.positions.unsqueeze(2) <= at[:, None, :, None]  # [B, H, R, N]
            count = (past if view.valid is None else past & view.valid.unsqueeze(2)).sum(-1)
        ratio = (count / view.capacity).clamp_min(1.0)
        return (2 * ratio.log()).sqrt().clamp_min(self.min_gain)

    def prior(self, view: View) -> Tensor:
        """γ̄: [B, H, N] fp32."""
        norms = view.per_value(lambda v: torch.linalg.vector_norm(v, dim=-1).square())
        pooled = view.masked(view.pool(norms, self.kernel, "avg"))
        largest = pooled.amax(-1, keepdim=True)
        return torch.where(largest > 0, pooled / largest, 1.0)
