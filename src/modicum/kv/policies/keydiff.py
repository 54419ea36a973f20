"""KeyDiff (Park et al., 2025), and ManifoldKV as its L2 form: keep the keys unlike the others."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from modicum.kv.policy import Policy, check_choice, check_positive
from modicum.kv.registry import alias, register
from modicum.kv.view import View

_TINY = 1e-8
# without cdist's matrix-product shortcut, which loses small distances between large keys
_EXACT = "donot_use_mm_for_euclid_dist"


@register
@dataclass(frozen=True)
class KeyDiff(Policy):
    """Distance of each key to an anchor, the mean key of its head; no queries needed, O(N·D) per head.

    metric "cosine": μ = mean of k_i/‖k_i‖, s_j = -cos(μ, k_j) (KeyDiff, arXiv 2504.15364). The ranking is
    that of minus the row sums of pairwise cosines, which equal n·‖μ‖·cos(μ, k_j).
    metric "l2": μ = mean of k_i, s_j = ‖k_j - μ‖₂ (ManifoldKV, arXiv 2602.08343).

    The anchor is over all tokens held and new, those about to go included. anchor_window: one anchor per
    window of so many positions (ManifoldKV's remedy for contexts past about 64K, with 4096) instead of one
    per head. Norms are clamped at 1e-8, so that with "cosine" a zero key, or a zero anchor, scores 0.
    """

    name: ClassVar[str] = "keydiff"
    title: ClassVar[str] = "KeyDiff"
    paper: ClassVar[str] = "https://arxiv.org/abs/2504.15364"
    summary: ClassVar[str] = "Keeps the keys least like their head's mean key."

    metric: Literal["cosine", "l2"] = "cosine"
    anchor_window: int | None = None

    def __post_init__(self) -> None:
        check_choice(self, "metric", self.metric, ("cosine", "l2"))
        if self.anchor_window is not None:
            check_positive(self, anchor_window=self.anchor_window)

    def score(self, view: View) -> Tensor:
        if self.metric == "l2" and view.sums is not None:
            anchor = (view.sums / view.count.unsqueeze(-1)).float().unsqueeze(2)
            return view.per_key(lambda k: torch.cdist(k, anchor, compute_mode=_EXACT)).squeeze(-1)
        window, share = self._windows(view)
        if self.metric == "l2":
            there = view.masked(torch.ones_like(view.positions, dtype=torch.float32))
            anchors = view.sum_keys(share * there.unsqueeze(2))  # [B, H, M, Dk]
            return _own(view.per_key(lambda k: torch.cdist(k, anchors, compute_mode=_EXACT)), window)
        inverse = self._inverse_norms(view)
        anchors = view.sum_keys(share * view.masked(inverse).unsqueeze(2))
        anchors = anchors / torch.linalg.vector_norm(anchors, dim=-1, keepdim=True).clamp_min(_TINY).neg()
        dots = view.dot_keys(anchors).transpose(-1, -2)
        return _own(dots, window) * inverse

    @property
    def _plain(self) -> bool:
        return self.metric == "cosine" and self.anchor_window is None

    def state_width(self, group: int) -> int:
        """One number per token, 1/‖k‖: a decode step then looks at all keys twice instead of three times."""
        return 1 if self._plain else 0

    def token_state(self, keys: Tensor, values: Tensor, group: int, output_weight: Tensor | None) -> Tensor:
        if not self._plain:
            return super().token_state(keys, values, group, output_weight)
        return _inverse_norm(keys.float()).unsqueeze(-1)

    def ranking(self, view: View) -> Tensor:
        """The plain score times its anchor's length, which is one for the whole head."""
        if not self._plain:
            return self.score(view)
        inverse = self._inverse_norms(view)
        if view.dots is not None:
            return view.dots * inverse
        anchor = view.sum_keys(view.masked(inverse)).neg_() if view.sums is None else self.probe(view.sums)
        assert anchor is not None
        return view.dot_keys(anchor.unsqueeze(2)).squeeze(2).mul_(inverse)

    @property
    def is_rotation_invariant(self) -> bool:
        return True

    @property
    def layerwise(self) -> bool:
        return False

    @property
    def traceable(self) -> bool:
        return self.anchor_window is None  # how many windows there are is looked up

    def sum_width(self, key_dim: int, value_dim: int) -> int:
        """The anchor, times the number of tokens."""
        return key_dim if self.anchor_window is None else 0

    def summand(self, keys: Tensor, values: Tensor, state: Tensor) -> Tensor:
        return keys * state[..., :1] if self._plain else keys

    def probe(self, sums: Tensor) -> Tensor | None:
        """Minus the anchor: times 1/‖k‖ its products rise with the score."""
        return sums.float().neg() if self._plain else None

    def _inverse_norms(self, view: View) -> Tensor:
        """[B, H, N]: 1/‖k‖, from the state where there is one."""
        return view.per_key(_inverse_norm) if view.state is None or not self._plain else view.state[..., 0]

    def _windows(self, view: View) -> tuple[Tensor | None, Tensor]:
        """Which anchor is each token's, [B, H, N], and each token's share in each mean, [B, H, M, N or 1]."""
        if self.anchor_window is None:
            return None, view.count.clamp_min(1.0).reciprocal()[:, :, None, None]
        window = view.positions.clamp_min(0).long() // self.anchor_window
        number = int(view.seen.max() - 1) // self.anchor_window + 1
        member = window.unsqueeze(2) == torch.arange(number, device=window.device)[:, None]
        if view.valid is not None:
            member = member & view.valid.unsqueeze(2)
        return window, member / member.sum(-1, keepdim=True).clamp_min(1)


def _inverse_norm(keys: Tensor) -> Tensor:
    """1/‖k‖ of keys [B, H, n, Dk], as [B, H, n]."""
    norms: Tensor = torch.linalg.vector_norm(keys, dim=-1)
    return norms.clamp_min_(_TINY).reciprocal_()


def _own(per_anchor: Tensor, window: Tensor | None) -> Tensor:
    """Each token's value for its own anchor: [B, H, N, M] -> [B, H, N]."""
    if window is None:
        return per_anchor.squeeze(-1)
    return per_anchor.gather(-1, window.unsqueeze(-1)).squeeze(-1)


alias("manifoldkv", "keydiff(metric='l2')")
