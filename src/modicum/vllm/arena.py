"""Arena: what modicum adds to an attention backend of vLLM, whichever it is.

Three classes to inherit from before vLLM's own: its backend, its metadata builder, its implementation. All
leave things as they are where the server was not given modicum's settings.
"""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor
from vllm.config import get_current_vllm_config, get_layers_from_vllm_config
from vllm.model_executor.layers.attention import Attention as AttentionLayer
from vllm.v1.attention.backend import AttentionCGSupport, AttentionType, CommonAttentionMetadata
from vllm.v1.kv_cache_interface import AttentionSpec, FullAttentionSpec

from modicum.errors import ModelError
from modicum.vllm.eviction import Attention, Eviction
from modicum.vllm.pages import Pages
from modicum.vllm.settings import Settings
from modicum.vllm.spec import ArenaSpec
from modicum.vllm.step import Ledger, Step

_NEEDS = "modicum inside vLLM needs full causal attention in every layer"


class Backend:
    """Asks for an arena of pages per request."""

    settings: ClassVar[Settings | None] = None
    """Of the model that was built last: specs are made after it, out of reach of the configuration."""
    impl: ClassVar[type[Impl]]
    builder: ClassVar[type[Builder]]

    @classmethod
    def get_impl_cls(cls) -> type[Impl]:
        """What attends."""
        return cls.impl

    @classmethod
    def get_builder_cls(cls) -> type[Builder]:
        """What makes a step's metadata."""
        return cls.builder

    @classmethod
    def customize_spec(cls, spec: AttentionSpec) -> AttentionSpec:
        """A layer's pages."""
        if Backend.settings is None:
            made: AttentionSpec = super().customize_spec(spec)  # type: ignore[misc]
            return made
        if type(spec) is not FullAttentionSpec:
            raise ModelError(f"{_NEEDS}: this model has a {type(spec).__name__}")
        return ArenaSpec.around(spec, Backend.settings)


class Builder:
    """Turns the lengths and slots of requests into those of their arenas."""

    block_size: int

    def __init__(
        self, kv_cache_spec: AttentionSpec, layer_names: list[str], vllm_config: Any, device: Any
    ) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)  # type: ignore[call-arg]
        self.settings = Settings.of_config(vllm_config)
        if self.settings is None:
            return
        requests = vllm_config.scheduler_config.max_num_seqs
        self.ledger = Ledger(self.settings, requests)
        layers = get_layers_from_vllm_config(vllm_config, AttentionLayer, layer_names)
        first = next(iter(layers.values())).impl
        attention = Attention(
            layers=len(layer_names),
            scaling=first.scale,
            softcap=first.logits_soft_cap or None,
            group=first.num_heads // first.num_kv_heads,
        )
        self.eviction = Eviction(self.settings, attention, self.bind, requests)
        self.layer = {name: number for number, name in enumerate(layer_names)}

    def bind(self, cache: Tensor) -> Pages:
        """The pages of a layer: cache [pages, H, block, 2·D], in whatever order in memory."""
        return Pages(*cache.chunk(2, dim=-1))

    @classmethod
    def get_cudagraph_support(cls, vllm_config: Any, kv_cache_spec: Any) -> AttentionCGSupport:
        """None for attention itself: which requests let go differs from step to step."""
        if Settings.of_config(vllm_config) is not None:
            return AttentionCGSupport.NEVER
        found: AttentionCGSupport = super().get_cudagraph_support(vllm_config, kv_cache_spec)  # type: ignore[misc]
        return found

    def build(
        self,
        common_prefix_len: int,
        common_attn_metadata: CommonAttentionMetadata,
        fast_build: bool = False,
    ) -> Any:
        """vLLM's metadata for a step, over the arenas; the step goes with it."""
        given, build = common_attn_metadata, super().build  # type: ignore[misc]
        if self.settings is None:
            return build(common_prefix_len, given, fast_build)
        seen = given.seq_lens
        if seen.device.type != "cpu" and given.seq_lens_cpu_upper_bound is not None:
            seen = given.seq_lens_cpu_upper_bound  # exact: drafts, which alone exceed it, are refused
        step = self.ledger.step(given.block_table_tensor, given.query_start_loc_cpu, seen)
        page, slot = step.place(self.block_size)
        # In place: it is by this very tensor that keys and values are written before attention.
        given.slot_mapping[: len(page)] = page * self.block_size + slot
        lengths = step.total.to(given.seq_lens.dtype)
        made = build(common_prefix_len, given.replace(seq_lens=lengths, max_seq_len=step.most), fast_build)
        made.arena = self, step
        return made


class Impl:
    """Attends, then lets go."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.settings = Settings.of_config(get_current_vllm_config())
        Backend.settings = self.settings
        if self.settings is None:
            return
        impl: Any = self
        window = impl.sliding_window
        if any(w not in (-1, None) for w in (window if isinstance(window, tuple) else (window,))):
            raise ModelError(f"{_NEEDS}: this model has windows")
        if impl.alibi_slopes is not None or impl.sinks is not None:
            raise ModelError(f"{_NEEDS}, and no terms beside it: this model has ALiBi or sinks")
        if impl.attn_type != AttentionType.DECODER:
            raise ModelError(f"{_NEEDS}: this model has encoder or cross attention")
        if impl.kv_sharing_target_layer_name is not None:
            raise ModelError(f"{_NEEDS}: this model's layers share keys and values")

    def forward(
        self,
        layer: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        kv_cache: Tensor,
        attn_metadata: Any,
        output: Tensor,
        output_scale: Tensor | None = None,
        output_block_scale: Tensor | None = None,
    ) -> Tensor:
        """Attend by vLLM's kernel, then bring this layer's pages down to the budget."""
        out: Tensor = super().forward(  # type: ignore[misc]
            layer, query, key, value, kv_cache, attn_metadata, output, output_scale, output_block_scale
        )
        arena: tuple[Builder, Step] | None = getattr(attn_metadata, "arena", None)
        if arena is not None:
            builder, step = arena
            tokens = len(step.row)
            query, key, value = (x[:tokens] for x in (query, key, value))
            builder.eviction.after(step, builder.layer[layer.layer_name], query, key, value, kv_cache)
        return out
