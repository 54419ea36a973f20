"""OBCache (2025): how much the attention output changes when a token's key and value go, to second order."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from modicum.kv.policy import Policy, check_choice, check_odd, check_positive, reduce_group
from modicum.kv.registry import register
from modicum.kv.view import View


@register
@dataclass(frozen=True)
class OBCache(Policy):
    """s_j = V_j + K_j + C_j, summed over the last `window` query rows i, for the tokens j before the window.

    With a the weights, z the logits, v the values and o_i = Σ_j a_ij v_j the row's output:
    V_j = Σ_i a_ij² ‖v_j‖² (pruning the value), K_j = Σ_i (a_ij z_ij)² ‖v_j - o_i‖² (pruning the key) and
    C_j = 2 Σ_i a_ij² z_ij (‖v_j‖² - v_j·o_i) (both at once). Together they are
    Σ_i a_ij² ‖v_j + z_ij(v_j - o_i)‖².

    The group's query heads are joined by their mean or largest. kernel, pooling: over neighbours, as in
    SnapKV; 1, the formula's own, is none. Which rows there are is not part of the method: those of SnapKV.
    Source: arXiv 2510.07651; github.com/MalachiAjayi/kv-cache-pruner, cache_utils.py.
    """

    name: ClassVar[str] = "obcache"
    title: ClassVar[str] = "OBCache"
    paper: ClassVar[str] = "https://arxiv.org/abs/2510.07651"
    summary: ClassVar[str] = "Keeps the tokens without whose key and value recent outputs would change most."

    window: int = 32
    kernel: int = 1
    pooling: Literal["avg", "max"] = "avg"
    group: Literal["mean", "max"] = "mean"

    def __post_init__(self) -> None:
        check_positive(self, window=self.window)
        check_odd(self, kernel=self.kernel)
        check_choice(self, "pooling", self.pooling, ("avg", "max"))
        check_choice(self, "group", self.group, ("mean", "max"))

    @property
    def is_rotation_invariant(self) -> bool:
        return True

    @property
    def layerwise(self) -> bool:
        return False

    @property
    def query_rows(self) -> int:
        return self.window

    def score(self, view: View) -> Tensor:
        return reduce_group(self.head_scores(view), self.group)

    def head_scores(self, view: View) -> Tensor:
        before = view.positions < (view.seen - self.window)[:, None, None]
        return view.pool(self._changes(view), self.kernel, self.pooling, where=before)

    def _changes(self, view: View) -> Tensor:
        """V + K + C, [B, H, G, N] fp32."""
        squares = view.masked(view.per_value(lambda v: v.square().sum(-1)))[:, :, None, None]  # ‖v‖²
        total, first = torch.zeros_like(view.positions[:, :, None], dtype=torch.float32), 0
        for rows in view.row_tiles():  # a, [B, H, G, r, N]
            g, r = rows.shape[2:4]
            z = view.logits(first, first + r)
            z = z.masked_fill(z == -torch.inf, 0.0)  # of a weight of zero
            outputs = view.sum_values(rows.flatten(2, 3))  # o, [B, H, G·r, Dv]
            products = torch.unflatten(view.dot_values(outputs), 2, (g, r))  # v·o
            powers = torch.unflatten(outputs.square().sum(-1), 2, (g, r)).unsqueeze(-1)  # ‖o‖²
            key_part = z.square() * (squares - 2 * products + powers)
            cross_part = 2 * z * (squares - products)
            change = (squares + key_part + cross_part).clamp_min(0.0)  # a squared length, but for rounding
            total = total + (rows.square() * change).sum(3)
            first += r
        return total
