"""The CPU backend with an arena of pages per request."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from vllm.v1.attention.backends.cpu_attn import (
    CPUAttentionBackend,
    CPUAttentionBackendImpl,
    CPUAttentionMetadataBuilder,
)

from modicum.vllm.arena import Backend, Builder, Impl
from modicum.vllm.pages import ISA, Pages, Room, VecPages


class ArenaBuilder(Builder, CPUAttentionMetadataBuilder):
    """Of vLLM's kernels for CPUs, the one whose pages are read here."""

    def __init__(self, kv_cache_spec: Any, layer_names: list[str], vllm_config: Any, device: Any) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        if self.settings is not None:
            self.isa = ISA
            self._set_isa_to_layers(layer_names)
            self.room = Room()

    def bind(self, cache: Tensor) -> Pages:
        return VecPages(cache, self.room)


class ArenaImpl(Impl, CPUAttentionBackendImpl):
    """vLLM's, then modicum's."""


class ArenaBackend(Backend, CPUAttentionBackend):
    """In the place of vLLM's CPU_ATTN."""

    impl, builder = ArenaImpl, ArenaBuilder
