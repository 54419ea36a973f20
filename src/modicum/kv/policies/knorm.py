"""Knorm (Devoto et al., 2024): keys of small norm tend to receive much attention."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from modicum.kv.policy import Policy
from modicum.kv.registry import register
from modicum.kv.view import View


@register
@dataclass(frozen=True)
class Knorm(Policy):
    """s_j = -‖k_j‖₂ per KV head; no queries needed. Source: arXiv 2406.11430."""

    name: ClassVar[str] = "knorm"
    title: ClassVar[str] = "Knorm"
    paper: ClassVar[str] = "https://arxiv.org/abs/2406.11430"
    summary: ClassVar[str] = "Keeps the keys of smallest L2 norm."

    @property
    def is_rotation_invariant(self) -> bool:
        return True

    @property
    def layerwise(self) -> bool:
        return False

    def score(self, view: View) -> Tensor:
        return -view.per_key(lambda k: torch.linalg.vector_norm(k, dim=-1))
