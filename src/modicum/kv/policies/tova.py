"""TOVA (Oren et al., 2024): keep what the newest query attends to."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from modicum.kv.policy import Policy, check_choice
from modicum.kv.registry import register
from modicum.kv.view import View


@register
@dataclass(frozen=True)
class TOVA(Policy):
    """s_j = a_tj, the attention row of the newest query t, averaged over query heads; t itself is protected.

    heads "layer": the mean over all query heads of the layer, so that every KV head keeps the same tokens
    (the paper's rule). "each": the mean over a KV head's own group; wrappers always take this one.
    Source: arXiv 2401.06104; github.com/schwartz-lab-NLP/TOVA, tova_cache.py.
    """

    name: ClassVar[str] = "tova"
    title: ClassVar[str] = "TOVA"
    paper: ClassVar[str] = "https://arxiv.org/abs/2401.06104"
    summary: ClassVar[str] = "Keeps the tokens that the newest query attends to most."

    heads: Literal["layer", "each"] = "layer"

    def __post_init__(self) -> None:
        check_choice(self, "heads", self.heads, ("layer", "each"))

    @property
    def is_rotation_invariant(self) -> bool:
        return True

    @property
    def layerwise(self) -> bool:
        return False

    @property
    def query_rows(self) -> int:
        return 1

    @property
    def window(self) -> int:
        return 1

    def per_head(self) -> TOVA:
        return self.with_settings(heads="each")

    def head_scores(self, view: View) -> Tensor:
        return view.rows().squeeze(3)  # [B, H, G, N]

    def score(self, view: View) -> Tensor:
        score = self.head_scores(view).mean(2)
        return _mean_over_heads(score, view) if self.heads == "layer" else score


def _mean_over_heads(score: Tensor, view: View) -> Tensor:
    """Each token's mean over the KV heads, [B, H, N]; they hold the same tokens, perhaps in other slots."""
    at = view.positions
    # Nearly always the slots agree. Asking would make a GPU wait for its own answer: there, always sort.
    if not at.is_cuda and not torch.compiler.is_compiling() and torch.equal(at, at[:, :1].expand_as(at)):
        return score.mean(1, keepdim=True).expand_as(score)
    age = at.argsort(-1)  # empty slots, at -1, come first: as many in every head
    mean = score.gather(-1, age).mean(1, keepdim=True)
    return torch.empty_like(score).scatter_(-1, age, mean.expand_as(score))
