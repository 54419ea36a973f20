"""SnapKV (Li et al., 2024): an observation window at the end of the prompt votes for what stays."""

from __future__ import annotations

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
class SnapKV(Policy):
    """s_j = pool_j( Σ_i a_ij ) over the last `window` query rows i, for the tokens j before the window.

    The window's own columns are dropped before pooling (its tokens are protected); pooling is 1-D in the
    order of positions. The group's query heads are joined by their mean, as in kvpress.
    over: "max" takes the largest a_ij instead of the sum. floor: scores are clamped below by their mean over
    the tokens that may go, per KV head, and per query head where wrappers ask for those. With over="max",
    group="max", floor=True this is the defensive aggregation of DefensiveKV (arXiv 2510.13334), save that its
    code pools each row before taking the maximum.
    Source: arXiv 2404.14469; github.com/FasterDecoding/SnapKV, snapkv_utils.py.
    """

    name: ClassVar[str] = "snapkv"
    title: ClassVar[str] = "SnapKV"
    paper: ClassVar[str] = "https://arxiv.org/abs/2404.14469"
    summary: ClassVar[str] = "Keeps what a window of the last queries attends to, pooled over neighbours."

    window: int = 32
    kernel: int = 5
    pooling: Literal["avg", "max"] = "avg"
    group: Literal["mean", "max"] = "mean"
    over: Literal["sum", "max"] = "sum"
    floor: bool = False

    def __post_init__(self) -> None:
        check_positive(self, window=self.window)
        check_odd(self, kernel=self.kernel)
        check_choice(self, "pooling", self.pooling, ("avg", "max"))
        check_choice(self, "group", self.group, ("mean", "max"))
        check_choice(self, "over", self.over, ("sum", "max"))
        if not isinstance(self.floor, bool):
            raise PolicyError(f"snapkv: floor is {self.floor!r}; it must be True or False")

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
        return self._clamped(self._votes(view), view)

    def score(self, view: View) -> Tensor:
        votes = reduce_group(self._votes(view), self.group)
        return self._clamped(votes.unsqueeze(2), view).squeeze(2)

    def _votes(self, view: View) -> Tensor:
        """[B, H, G, N]; in the window's columns, which nobody looks at, what was there before pooling."""
        return view.pool(
            view.row_sums(over=self.over), self.kernel, self.pooling, where=self._before_window(view)
        )

    def _clamped(self, votes: Tensor, view: View) -> Tensor:
        if not self.floor:
            return votes
        open_to = view.masked(self._before_window(view) & ~view.protected, False).unsqueeze(2)
        number = open_to.sum(-1, keepdim=True).clamp_min(1)
        mean = votes.masked_fill(~open_to, 0.0).sum(-1, keepdim=True) / number
        return torch.maximum(votes, mean)

    def _before_window(self, view: View) -> Tensor:
        return view.positions < (view.seen - self.window)[:, None, None]
