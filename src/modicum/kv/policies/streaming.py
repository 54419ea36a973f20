"""StreamingLLM (Xiao et al., 2023): attention sinks and the most recent tokens."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from modicum.kv.policy import Policy
from modicum.kv.registry import register
from modicum.kv.view import View


@register
@dataclass(frozen=True)
class StreamingLLM(Policy):
    """s_j = position of j: the newest stay; the sinks beside them are the engine's `n_sink`.

    Keys stay at their original positions; the paper re-rotates them to their places in the cache.
    Source: arXiv 2309.17453; github.com/mit-han-lab/streaming-llm, kv_cache.py.
    """

    name: ClassVar[str] = "streamingllm"
    title: ClassVar[str] = "StreamingLLM"
    paper: ClassVar[str] = "https://arxiv.org/abs/2309.17453"
    summary: ClassVar[str] = "Keeps the first tokens (sinks) and the newest ones."

    @property
    def is_rotation_invariant(self) -> bool:
        return True

    @property
    def reads_slots(self) -> bool:
        return False

    @property
    def layerwise(self) -> bool:
        return False

    def score(self, view: View) -> Tensor:
        # Past 2^24 neighbours may round to one fp32 value; the tie then keeps the more recent, as it should.
        return view.positions.float()
