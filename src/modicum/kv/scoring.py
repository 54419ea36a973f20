"""Scoring: a policy asked to observe and to score, and its answers checked."""

from __future__ import annotations

import torch
from torch import Tensor

from modicum.errors import PolicyError
from modicum.kv.policy import Policy
from modicum.kv.view import View


def observed(policy: Policy, view: View) -> Tensor | None:
    """The new state [B, H, N, F] of the tokens at hand; None if the policy keeps none.

    Raises:
        PolicyError: it is not of the shape that the policy announced.
    """
    if not policy.accumulates:
        return None
    state = policy.observe(view)
    if view.state is None:
        return None
    if state is None or state.shape != view.state.shape:
        shape = None if state is None else tuple(state.shape)
        raise PolicyError(
            f"{policy}: observe gave {shape}, its state is {tuple(view.state.shape)}: make "
            "state_width and observe agree"
        )
    return state


def level(view: View, score: Tensor | None, policy: Policy) -> Tensor:
    """The score, or one that is the same for all where there is none (a tie keeps the newest).

    Raises:
        PolicyError: it is not of the view's shape.
    """
    if score is None:
        return torch.zeros(view.positions.shape, device=view.positions.device)
    if score.shape != view.positions.shape:
        raise PolicyError(
            f"{policy}: score gave {tuple(score.shape)}, it must be {tuple(view.positions.shape)}"
        )
    return score
