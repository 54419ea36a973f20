"""CriticalKV (Feng et al., 2025): half by the base's score, half by that times the projected value's size."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from modicum.errors import PolicyError
from modicum.kv.policy import Wrapper, check_between
from modicum.kv.registry import register
from modicum.kv.view import View
from modicum.kv.weighting import lifted

_FIRST = 1e30  # above any score of the second stage
_BYTES = 32 * 2**20  # projected values made at a time


@register
@dataclass(frozen=True)
class CriticalKV(Wrapper):
    """The base's own top `share` of the capacity first, the rest by (A_j + ε) · ‖v_j W_O^h‖₁, its group mean.

    The form of NVIDIA's kvpress: protected tokens count among the base's top, as a window does there.
    Negative base scores are first raised (`modicum.kv.weighting`), so that a larger value never lowers a
    score. The projection is computed once, when a token comes, and kept as one number per token behind the
    base's state.
    """

    name: ClassVar[str] = "criticalkv"
    title: ClassVar[str] = "CriticalKV"
    paper: ClassVar[str] = "https://arxiv.org/abs/2502.03805"
    summary: ClassVar[str] = (
        "Half of the budget by the base's score, half weighted by the projected value's size."
    )

    share: float = 0.5
    eps: float = 1e-4

    def __post_init__(self) -> None:
        super().__post_init__()
        check_between(self, 0, 1, share=self.share)
        check_between(self, 0, math.inf, eps=self.eps)

    @property
    def needs_output_weight(self) -> bool:
        return True

    @property
    def is_rotation_invariant(self) -> bool:
        return self.base.is_rotation_invariant

    def state_width(self, group: int) -> int:
        return self.base.state_width(group) + 1

    def token_state(self, keys: Tensor, values: Tensor, group: int, output_weight: Tensor | None) -> Tensor:
        of_base = self.base.token_state(keys, values, group, output_weight)
        return torch.cat([of_base, _projected(values, output_weight).unsqueeze(-1)], dim=-1)

    def observe(self, view: View) -> Tensor:
        state, of_base = _state(view), self.base.observe(_base_view(view))
        if of_base is not None:
            state[..., :-1] = of_base
        return state

    def score(self, view: View) -> Tensor:
        there = torch.ones_like(view.protected) if view.valid is None else view.valid
        base = self.base.score(_base_view(view)).float()
        second = (lifted(base, there & ~view.protected) + self.eps) * _state(view)[..., -1]
        rank = _rank(
            base.masked_fill(view.protected, torch.inf).masked_fill(~there, -torch.inf), view.positions
        )
        # A first stage that keeps its own order, should the cache be cut below it.
        first = _FIRST * (2 - rank / rank.shape[-1])
        return torch.where(rank < int(self.share * view.capacity), first, second.clamp_max(_FIRST))


def _state(view: View) -> Tensor:
    if view.state is None:
        raise PolicyError("criticalkv read its state without having one: its view needs state_width columns")
    return view.state


def _base_view(view: View) -> View:
    """The view as the base knows it: its own columns of the state."""
    state = _state(view)[..., :-1]
    return replace(view, state=state if state.shape[-1] else None)


def _projected(values: Tensor, output_weight: Tensor | None) -> Tensor:
    """Group mean of ‖v W_O^h‖₁: values [B, H, m, Dv], weights [H, G, Dv, hidden] -> [B, H, m] fp32."""
    if output_weight is None:
        raise PolicyError("criticalkv needs the output projection of the layer, and this model gives none")
    b, h = values.shape[:2]
    tile = max(1, _BYTES // (4 * b * h * output_weight.shape[-1]))
    done = []
    for part in torch.split(values.to(output_weight.dtype), tile, dim=2):
        heads = [torch.linalg.vector_norm((part @ w).float(), ord=1, dim=-1) for w in output_weight.unbind(1)]
        done.append(torch.stack(heads).mean(0))
    return torch.cat(done, dim=2)


def _rank(score: Tensor, positions: Tensor) -> Tensor:
    """Place of each token from the highest score (0) to the lowest, the newer of equals first: [B, H, N]."""
    newest = positions.argsort(dim=-1, descending=True)
    order = newest.gather(-1, score.gather(-1, newest).argsort(dim=-1, descending=True, stable=True))
    places = torch.arange(score.shape[-1], device=score.device).expand_as(order)
    return torch.empty_like(order).scatter_(-1, order, places)
