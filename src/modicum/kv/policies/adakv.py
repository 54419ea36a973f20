"""Ada-KV (Feng et al., 2024): the heads of a layer compete for its slots."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from modicum.kv.policy import Divider, check_between
from modicum.kv.registry import register


@register
@dataclass(frozen=True)
class AdaKV(Divider):
    """The base's score, compared over all KV heads of a layer.

    Each head keeps its best `safeguard` share of the budget; the rest of the layer's slots go to the highest
    scores in whichever head (the form of NVIDIA's kvpress).
    """

    name: ClassVar[str] = "adakv"
    title: ClassVar[str] = "Ada-KV"
    paper: ClassVar[str] = "https://arxiv.org/abs/2407.11550"
    summary: ClassVar[str] = "Heads of a layer compete for its slots, each sure of a share of the budget."

    safeguard: float = 0.2
    """Share of the budget of which each head is sure: 1 makes all heads equal."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_between(self, 0, 1, safeguard=self.safeguard)

    def head_shares(self) -> float:
        return self.safeguard
