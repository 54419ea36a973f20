"""H2O (Zhang et al., 2023): heavy hitters, the tokens that all queries together attended to most."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from modicum.errors import PolicyError
from modicum.kv.policy import ALL, Policy
from modicum.kv.registry import register
from modicum.kv.view import View


@register
@dataclass(frozen=True)
class H2O(Policy):
    """s_j = Σ_i a_ij over every query i since j came, the mean over the group's query heads.

    The sum is kept beside the token (one fp32 number) and goes with it. Rows run over what was held when the
    query came, so chunks matter. No division by the number of queries, as in the paper: later tokens have had
    fewer chances, and the recent ones need protection. Source: arXiv 2306.14048; github.com/FMInference/H2O.
    """

    name: ClassVar[str] = "h2o"
    title: ClassVar[str] = "H2O"
    paper: ClassVar[str] = "https://arxiv.org/abs/2306.14048"
    summary: ClassVar[str] = "Keeps the tokens with the most attention accumulated over all queries."

    @property
    def is_rotation_invariant(self) -> bool:
        return True

    @property
    def layerwise(self) -> bool:
        return False

    @property
    def query_rows(self) -> int:
        return ALL

    def state_width(self, group: int) -> int:
        return 1

    @property
    def accumulates(self) -> bool:
        return True

    def observe(self, view: View) -> Tensor:
        state = self._state(view)
        state[..., 0] += view.row_sums().mean(2)  # over the call's queries
        return state

    def score(self, view: View) -> Tensor:
        return self._state(view)[..., 0]

    def _state(self, view: View) -> Tensor:
        if view.state is None:
            raise PolicyError("h2o: the view has no state: call `observe` with one of width 1 before `score`")
        return view.state
