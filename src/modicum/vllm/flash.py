"""FlashAttention with an arena of pages per request, on GPUs. Written against vLLM 0.32, not yet run."""

from __future__ import annotations

from vllm.v1.attention.backends.flash_attn import (
    FlashAttentionBackend,
    FlashAttentionImpl,
    FlashAttentionMetadataBuilder,
)

from modicum.vllm.arena import Backend, Builder, Impl


class ArenaBuilder(Builder, FlashAttentionMetadataBuilder):
    """vLLM's, over arenas."""

    supports_update_block_table = False


class ArenaImpl(Impl, FlashAttentionImpl):
    """vLLM's, then modicum's."""


class ArenaBackend(Backend, FlashAttentionBackend):
    """In the place of vLLM's FLASH_ATTN."""

    impl, builder = ArenaImpl, ArenaBuilder
