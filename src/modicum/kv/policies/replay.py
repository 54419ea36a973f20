"""Replay (KVzip, 2025): what a text's tokens are looked at for when the text is read a second time."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from modicum.errors import PolicyError
from modicum.kv.policy import ALL, Policy, check_flag, check_positive
from modicum.kv.registry import register
from modicum.kv.value_norms import value_norms
from modicum.kv.view import Replay as SecondReading
from modicum.kv.view import View

_ROW_BYTES = 32 * 2**20  # attention rows made at a time
_TINY = 1e-12  # of a vector's length


@register
@dataclass(frozen=True)
class Replay(Policy):
    """s_j = the largest weight that any query of a second reading, in the group, has ever given to token j.

    Each chunk of a prompt is read twice in one call: its tokens C after the survivors S, then the same tokens
    again after S and C, at the positions that follow. The second reading is not held. Its rows are softmaxes
    over S, C and itself (causally). s_j ← max(s_j, new), one fp32 number beside the token.

    KVzip reads a whole prompt, and then again after a request to repeat it, in chunks; here the bound holds
    all the while, so a chunk is read again before it is cut down, without the request. A call that is not
    read twice (a decode step, a loop of one's own without `BudgetCache.replaying`) counts the weights that
    its own queries give to tokens before them. The newest `window` tokens are protected. These rules are
    ours.

    With `plus` a weight a_ij counts by what it contributes: a_ij · ‖W_O v_j‖ / ‖h_i‖, for query head by query
    head, where h_i is the hidden state that the layer is given at the query's token (KVzip+, arXiv
    2601.07891, as in NVIDIA's kvpress). The norm of each projected value is kept beside the token, one fp32
    number per query head of the group. A call that is not read twice has no h_i: the mean norm of all second
    readings of the layer stands for it (1 before the first). That is ours.

    Source: Kim et al. 2025, arXiv 2505.23416; in blocks under a budget: github.com/apple/ml-epicache.
    """

    name: ClassVar[str] = "replay"
    title: ClassVar[str] = "Replay (KVzip)"
    paper: ClassVar[str] = "https://arxiv.org/abs/2505.23416"
    summary: ClassVar[str] = "Reads each chunk twice and keeps what the second reading looks at most."

    window: int = 32
    plus: bool = False

    def __post_init__(self) -> None:
        check_positive(self, window=self.window)
        check_flag(self, plus=self.plus)

    @property
    def replays(self) -> bool:
        return True

    @property
    def is_rotation_invariant(self) -> bool:
        return True

    @property
    def layerwise(self) -> bool:
        return False

    @property
    def query_rows(self) -> int:
        return ALL

    @property
    def kept_queries(self) -> int:
        return 0

    @property
    def accumulates(self) -> bool:
        return True

    @property
    def needs_output_weight(self) -> bool:
        return self.plus

    @property
    def needs_residual_norms(self) -> bool:
        return self.plus

    def state_width(self, group: int) -> int:
        """One number per token, its best weight; with `plus` norms of its value, one per query head."""
        return 1 + group * self.plus

    def tally_width(self, group: int, key_dim: int) -> int:
        """With `plus`: how many tokens were read a second time, and the sum of their ‖h‖."""
        return 2 * self.plus

    def token_state(self, keys: Tensor, values: Tensor, group: int, output_weight: Tensor | None) -> Tensor:
        state = super().token_state(keys, values, group, output_weight)
        if self.plus:
            if output_weight is None:
                raise PolicyError("replay: plus needs the output projection of the layer, and there is none")
            state[..., 1:] = value_norms(values, output_weight).transpose(2, 3)
        return state

    def observe(self, view: View) -> Tensor:
        state = self._state(view)
        # [B, H, G, 1, N], by which weights are multiplied
        lengths = state[..., 1:].transpose(2, 3).unsqueeze(3) if self.plus else None
        if view.replay is None:
            found = _by_own_queries(view, None if lengths is None else lengths / _mean_norm(view))
        else:
            found = _by_replay(view, view.replay, lengths)
            if self.plus:
                _count_norms(view, view.replay)
        state[..., 0] = torch.maximum(state[..., 0], found)
        return state

    def score(self, view: View) -> Tensor:
        return self._state(view)[..., 0]

    def _state(self, view: View) -> Tensor:
        if view.state is None:
            raise PolicyError("replay: the view has no state: call `observe` with one of `state_width`")
        return view.state


def _mean_norm(view: View) -> Tensor:
    """Mean ‖h‖ of the tokens read twice so far: [B, H, 1, 1, 1] fp32."""
    if view.tally is None:
        raise PolicyError("replay: the view has no tally")
    count, total = torch.split(view.tally, 1, -1)
    return torch.where(count > 0, total / count.clamp_min(1), 1.0).float().clamp_min(_TINY)[..., None, None]


def _norms(again: SecondReading) -> Tensor:
    """‖h‖ of the tokens read again: [B, m'] fp32."""
    if again.residual_norms is None:
        raise PolicyError("replay: plus needs the norms of the second reading's hidden states")
    return again.residual_norms


def _count_norms(view: View, again: SecondReading) -> None:
    """Add a second reading to the tally."""
    norms, tally = _norms(again), view.tally
    if tally is None:
        raise PolicyError("replay: the view has no tally")
    there = torch.ones_like(norms) if again.valid is None else again.valid.to(norms.dtype)
    tally[..., 0] += there.sum(-1)[:, None]
    tally[..., 1] += (norms * there).sum(-1, dtype=tally.dtype)[:, None]


def _by_own_queries(view: View, factor: Tensor | None) -> Tensor:
    """The largest weight, times a factor [B, H, G, 1, N], that each token gets from the call's queries after
    it: [B, H, N] fp32.
    """
    _, at = view.asked
    best, first = torch.zeros(view.positions.shape, device=view.positions.device), 0
    for rows in view.row_tiles():  # [B, H, G, r, N]
        last = first + rows.shape[3]
        later = view.positions[:, :, None] < at[:, None, first:last, None]  # [B, H, r, N]
        if factor is not None:
            rows = rows * factor
        best = torch.maximum(best, rows.amax(2).masked_fill(~later, 0.0).amax(2))
        first = last
    return best


def _by_replay(view: View, again: SecondReading, lengths: Tensor | None) -> Tensor:
    """The largest weight, or contribution, that each token gets from a query of the second reading:
    [B, H, N] fp32.
    """
    b, h, g, m = again.queries.shape[:4]
    keys = again.keys.float().unsqueeze(2)  # [B, H, 1, m, Dk]
    column = torch.arange(m, device=keys.device)
    best = torch.zeros(view.positions.shape, device=keys.device)
    tile = max(1, _ROW_BYTES // (4 * b * h * g * (view.positions.shape[2] + m)))
    for first in range(0, m, tile):
        last = min(m, first + tile)
        q = again.queries[:, :, :, first:last].float() * view.scaling  # [B, H, G, r, Dk]
        z = torch.unflatten(view.dot_keys(q.flatten(2, 3)), 2, (g, -1))  # [B, H, G, r, N]
        own = q @ keys.transpose(-1, -2)  # [B, H, G, r, m]
        if view.softcap is not None:
            z, own = (view.softcap * torch.tanh(x / view.softcap) for x in (z, own))
        if view.valid is not None:
            z = z.masked_fill(~view.valid[:, :, None, None], -torch.inf)
        unseen = (column > column[first:last, None]).expand(b, -1, -1)  # [B, r, m]
        if again.valid is not None:
            # A pad sees itself, so that its row has a softmax.
            pad = ~again.valid[:, None] & (column != column[first:last, None])
            unseen = unseen | pad
        own = own.masked_fill(unseen[:, None, None], -torch.inf)
        total = torch.logaddexp(z.logsumexp(-1), own.logsumexp(-1))
        if view.sink_logits is not None:
            total = torch.logaddexp(total, view.sink_logits.float()[None, :, :, None])
        weights = torch.exp(z - total[..., None])
        if lengths is not None:
            asking = _norms(again)[:, None, None, first:last, None].clamp_min(_TINY)
            weights = weights * lengths / asking
        rows = weights.amax(2)  # [B, H, r, N]
        if again.valid is not None:
            rows = rows.masked_fill(~again.valid[:, None, first:last, None], 0.0)
        best = torch.maximum(best, rows.amax(2))
    return best
