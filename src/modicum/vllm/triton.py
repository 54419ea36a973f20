"""The Triton backend with an arena of pages per request, on GPUs. Written against vLLM 0.32, not yet run."""

from __future__ import annotations

from vllm.v1.attention.backends.triton_attn import (
    TritonAttentionBackend,
    TritonAttentionImpl,
    TritonAttentionMetadataBuilder,
)

from modicum.vllm.arena import Backend, Builder, Impl


class ArenaBuilder(Builder, TritonAttentionMetadataBuilder):
    """vLLM's, over arenas."""


class ArenaImpl(Impl, TritonAttentionImpl):
    """vLLM's, then modicum's."""


class ArenaBackend(Backend, TritonAttentionBackend):
    """In the place of vLLM's TRITON_ATTN."""

    impl, builder = ArenaImpl, ArenaBuilder
