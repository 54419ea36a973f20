"""CAOTE and FastCAOTE (Goel et al., 2025): evict what changes the attention output least."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from modicum.errors import PolicyError
from modicum.kv.policy import GroupReduction, Wrapper, check_choice, check_flag, reduce_group
from modicum.kv.registry import register
from modicum.kv.view import View
from modicum.kv.weighting import normalised

_TINY = 1e-6
_KEPT = torch.finfo(torch.float32).max  # above every error, below the infinity that marks protected tokens


@register
@dataclass(frozen=True)
class CAOTE(Wrapper):
    """c_j = α_j/(1 - α_j) · ‖X - v_j‖₂, the change of the output X = Σ α_i v_i when token j is dropped.

    α is the base's score, normalised to sum 1 per query head (negative scores are first raised, see
    `modicum.kv.weighting`): exact where that is one attention row (TOVA), an estimate otherwise. A token with
    α ≥ 1 - 1e-6 is never dropped, and 1 - α is clamped there.

    Raises:
        PolicyError: `rows="window"` around a base that reads no attention rows, or together with `iterative`.
    """

    name: ClassVar[str] = "caote"
    title: ClassVar[str] = "CAOTE"
    paper: ClassVar[str] = "https://arxiv.org/abs/2504.14051"
    summary: ClassVar[str] = "Drops the tokens that change the attention output least, by the base's weights."

    group: GroupReduction = "rss"
    """How query heads of a group join; "rss" is the change of their concatenated outputs."""
    rows: Literal["base", "window"] = "base"
    """Weights from the base's score, or each row of its queries: √Σ_i c_ij², which ranks as DropKV."""
    iterative: bool = False
    """Rescale the weights after each of the drops down to the capacity, O(N·D) each."""
    x_over: Literal["auto", "held", "evictable"] = "auto"
    """α and X over all tokens held or those that may go; auto: all where α is attention itself."""
    fast: bool = False
    """X is the plain mean of the values (FastCAOTE)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice(self, "group", self.group, ("mean", "max", "rss"))
        check_choice(self, "rows", self.rows, ("base", "window"))
        check_choice(self, "x_over", self.x_over, ("auto", "held", "evictable"))
        check_flag(self, iterative=self.iterative, fast=self.fast)
        if self.rows == "window" and self.base.query_rows == 0:
            raise PolicyError(
                f"{self.name}: rows='window' needs a base that reads queries; {self.base} does not"
            )
        if self.rows == "window" and self.iterative:
            raise PolicyError(f"{self.name}: iterative goes with rows='base' only")

    @property
    def is_rotation_invariant(self) -> bool:
        return self.base.is_rotation_invariant

    @property
    def traceable(self) -> bool:
        return self.base.traceable and not self.iterative

    def score(self, view: View) -> Tensor:
        if self.iterative:
            return self._sequential(view)
        return self._joined(view, self.head_scores(view))

    def head_scores(self, view: View) -> Tensor:
        """c per query head, +inf for a token that is never dropped: [B, H, G, N]."""
        counted, origin = self._counted(view), _origin(view)
        if self.rows == "window":
            return self._window_errors(view, counted, origin)
        alpha = normalised(self.base.head_scores(view), counted.unsqueeze(2))
        shares = self._shares(alpha, counted)
        return _errors(view, alpha, shares, view.sum_values(shares, origin), origin)

    def _joined(self, view: View, errors: Tensor) -> Tensor:
        """The group joined, [B, H, N]; what is never dropped stays below the infinity of protected tokens."""
        return view.masked(reduce_group(errors, self.group).clamp_max(_KEPT))

    def _counted(self, view: View) -> Tensor:
        there = torch.ones_like(view.protected) if view.valid is None else view.valid
        exact = self.rows == "window" or self.base.query_rows == 1
        held = exact if self.x_over == "auto" else self.x_over == "held"
        return there if held else there & ~view.protected

    def _shares(self, alpha: Tensor, counted: Tensor) -> Tensor:
        """Each value's share in X: α, or equal ones, [B, H, G or 1, N]."""
        return normalised(torch.zeros_like(alpha[:, :, :1]), counted.unsqueeze(2)) if self.fast else alpha

    def _window_errors(self, view: View, counted: Tensor, origin: Tensor) -> Tensor:
        total: Tensor | float = 0.0
        for rows in view.row_tiles():  # [B, H, G, R, N]
            g, r = rows.shape[2:4]
            # A row without a query stays zero; so does one that sees nothing of what counts.
            rows = rows.masked_fill(~counted[:, :, None, None], 0.0)
            rows = (rows / rows.sum(-1, keepdim=True).clamp_min(torch.finfo(rows.dtype).tiny)).flatten(2, 3)
            shares = self._shares(rows, counted)
            errors = _errors(view, rows, shares, view.sum_values(shares, origin), origin)
            total = total + torch.unflatten(errors, 2, (g, r)).square().sum(3)
        assert isinstance(total, Tensor)
        return total.sqrt()

    def _sequential(self, view: View) -> Tensor:
        """Drop one token at a time until the capacity is met; the dropped score lowest, in their order.

        With A = Σ α over those dropped, the weights left are α/(1 - A) and X is (X₀ - Σ_dropped α v)/(1 - A):
        the one-by-one rule, its rounding errors added up instead of multiplied.
        """
        counted, origin = self._counted(view), _origin(view)
        alpha = normalised(self.base.head_scores(view), counted.unsqueeze(2))
        shares = self._shares(alpha, counted)
        x = view.sum_values(shares, origin)  # [B, H, G or 1, Dv]
        gone, lost = torch.zeros_like(alpha[..., :1]), torch.zeros_like(shares[..., :1])

        def errors() -> Tensor:
            left, part = (1 - gone).clamp_min(_TINY), (1 - lost).clamp_min(_TINY)
            return self._joined(view, _errors(view, alpha / left, shares / part, x / part, origin))

        open_ = ~view.protected if view.valid is None else ~view.protected & view.valid
        number = (view.count - view.capacity).clamp_min(0)  # [B, H] to drop
        steps = max(0, view.positions.shape[2] - view.capacity)
        order = torch.zeros_like(view.positions, dtype=torch.float32)
        for step in range(steps):
            hot = _lowest(errors(), open_, view.positions) & (step < number).unsqueeze(-1)
            taken = hot.unsqueeze(2)
            gone = gone + (alpha * taken).sum(-1, keepdim=True)
            lost = lost + (shares * taken).sum(-1, keepdim=True)
            x = x - view.sum_values(shares * taken, origin)
            alpha, shares = alpha.masked_fill(taken, 0.0), shares.masked_fill(taken, 0.0)
            order = torch.where(hot, float(step - steps), order)
            open_ = open_ & ~hot
        return torch.where(order < 0, order, errors())


@register
@dataclass(frozen=True)
class FastCAOTE(CAOTE):
    """CAOTE with X replaced by the mean value: c_j = α_j/(1 - α_j) · ‖v̄ - v_j‖₂."""

    name: ClassVar[str] = "fastcaote"
    title: ClassVar[str] = "FastCAOTE"
    summary: ClassVar[str] = "CAOTE with the mean value in the place of the attention output."

    fast: bool = True


def _origin(view: View) -> Tensor:
    """The newest token's value [B, H, 1, Dv]: less that, equal values vanish and none cancel badly."""
    return view.values_at(view.positions.argmax(-1, keepdim=True))


def _errors(view: View, alpha: Tensor, shares: Tensor, x: Tensor, origin: Tensor) -> Tensor:
    """α/(1 - α) · ‖X - v‖: alpha [B, H, M, N], shares in X [B, H, M or 1, N] -> [B, H, M, N].

    x is X less the origin. By ‖x‖² - 2 x·v + ‖v‖², several times as fast as differences, but blurred where v
    is near X. A small α makes that a small error all the same; the token with the largest share, which is
    near X for having it, is measured by its difference.
    """
    power = x.square().sum(-1, keepdim=True)

    def squares(v: Tensor) -> Tensor:
        v = v - origin
        norms: Tensor = torch.linalg.vector_norm(v, dim=-1)
        return (power - 2 * (x @ v.transpose(-1, -2)) + norms.square().unsqueeze(2)).transpose(-1, -2)

    apart = view.per_value(squares).transpose(-1, -2).clamp_min(0.0).sqrt()  # [B, H, M or 1, N]
    top = shares.argmax(-1)
    nearest: Tensor = torch.linalg.vector_norm(view.values_at(top) - origin - x, dim=-1)
    apart = apart.scatter(-1, top.unsqueeze(-1), nearest.unsqueeze(-1))
    errors = alpha / (1 - alpha).clamp_min(_TINY) * apart
    return errors.masked_fill(alpha >= 1 - _TINY, math.inf)


def _lowest(errors: Tensor, among: Tensor, positions: Tensor) -> Tensor:
    """[B, H, N] bool: the lowest `among` some, the oldest of equals; none where there is none."""
    errors = errors.masked_fill(~among, math.inf)
    lowest = (errors == errors.amin(-1, keepdim=True)) & among
    age = positions.masked_fill(~lowest, torch.iinfo(positions.dtype).max)
    return torch.zeros_like(among).scatter_(-1, age.argmin(-1, keepdim=True), True) & lowest
