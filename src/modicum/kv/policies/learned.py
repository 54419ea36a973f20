"""Learned score: what a calibration's regression says of a token's keys and values, once, when it comes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from modicum.errors import PolicyError
from modicum.kv.policy import Policy
from modicum.kv.registry import register
from modicum.kv.view import View


@register
@dataclass(frozen=True)
class Learned(Policy):
    """s_hj = x_j · w_h + c_h, x_j the keys (before RoPE) and values of token j in all KV heads of the layer.

    x has the L2 norms of these keys and values too. w_h and c_h [F] come from the model's calibration
    (`TokenRegression`), where they predict the logarithm of the largest contribution that a token makes when
    the text is read again (KVzip+'s score). A token is scored from the keys and values that the model gives,
    before they are coded or renumbered. Its score is kept beside it (one fp32 number) and never changes, so a
    decode step reads no keys to decide what goes.

    The regression is ours; the score that it predicts is of arXiv 2505.23416.
    """

    name: ClassVar[str] = "learned"
    title: ClassVar[str] = "Learned score"
    paper: ClassVar[str] = "https://arxiv.org/abs/2505.23416"  # KVzip, whose score is predicted
    summary: ClassVar[str] = (
        "Keeps the tokens that a regression, calibrated per model, expects to be read again."
    )

    @property
    def needs_regression(self) -> bool:
        return True

    @property
    def is_rotation_invariant(self) -> bool:
        """True: what lies in the slots is not read."""
        return True

    @property
    def reads_slots(self) -> bool:
        return False

    @property
    def layerwise(self) -> bool:
        return False

    @property
    def accumulates(self) -> bool:
        return True

    def state_width(self, group: int) -> int:
        """One number per token, its score."""
        return 1

    def observe(self, view: View) -> Tensor:
        state = self._state(view)
        if view.newcomer_scores is None or view.newcomer_slots is None:
            raise PolicyError("learned: the view has no scores of newcomers: the engine makes them")
        state[..., 0].scatter_(-1, view.newcomer_slots, view.newcomer_scores)
        return state

    def score(self, view: View) -> Tensor:
        return self._state(view)[..., 0]

    def _state(self, view: View) -> Tensor:
        if view.state is None:
            raise PolicyError("learned: the view has no state: call `observe` with one of width 1 first")
        return view.state
