"""The CPU backend with an arena of pages per request: vLLM's kernels over other lengths and slots."""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor
from vllm.config import get_current_vllm_config
from vllm.v1.attention.backend import AttentionType, CommonAttentionMetadata
from vllm.v1.attention.backends.cpu_attn import (
    CPUAttentionBackend,
    CPUAttentionBackendImpl,
    CPUAttentionMetadata,
    CPUAttentionMetadataBuilder,
)
from vllm.v1.kv_cache_interface import AttentionSpec, FullAttentionSpec

from modicum.errors import ModelError
from modicum.vllm.eviction import Eviction
from modicum.vllm.pages import ISA, Pages
from modicum.vllm.recent import Recent
from modicum.vllm.settings import Settings
from modicum.vllm.spec import ArenaSpec
from modicum.vllm.step import Ledger

_NEEDS = "modicum inside vLLM needs full causal attention in every layer"


class ArenaBuilder(CPUAttentionMetadataBuilder):
    """Turns the lengths and slots of requests into those of their arenas."""

    def __init__(
        self, kv_cache_spec: AttentionSpec, layer_names: list[str], vllm_config: Any, device: Any
    ) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        self.settings = Settings.of_config(vllm_config)
        if self.settings is not None:
            self.ledger = Ledger(self.settings)
            self.isa = ISA
            self._set_isa_to_layers(layer_names)

    def build(
        self,
        common_prefix_len: int,
        common_attn_metadata: CommonAttentionMetadata,
        fast_build: bool = False,
    ) -> CPUAttentionMetadata:
        given = common_attn_metadata
        if self.settings is None:
            return super().build(common_prefix_len, given, fast_build)
        step = self.ledger.step(given.block_table_tensor, given.query_start_loc, given.seq_lens)
        page, slot = step.place(self.block_size)
        # In place: it is by this very tensor that keys and values are written before attention.
        given.slot_mapping[: len(page)] = page * self.block_size + slot
        lengths = step.total.to(given.seq_lens.dtype)
        changed = given.replace(seq_lens=lengths, max_seq_len=int(lengths.max()))
        made = super().build(common_prefix_len, changed, fast_build)
        made.step = step
        return made


class ArenaImpl(CPUAttentionBackendImpl):
    """Attends, then lets go."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.config = get_current_vllm_config()
        self.settings = Settings.of_config(self.config)
        self.eviction: Eviction | None = None
        ArenaBackend.settings = self.settings
        if self.settings is None:
            return
        if self.sliding_window != -1 or self.alibi_slopes is not None or self.sinks is not None:
            raise ModelError(f"{_NEEDS}: this model has windows, ALiBi or sinks")
        if self.attn_type != AttentionType.DECODER:
            raise ModelError(f"{_NEEDS}: this model has encoder or cross attention")

    def forward(
        self,
        layer: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        kv_cache: Tensor,
        attn_metadata: CPUAttentionMetadata | None,
        output: Tensor,
        output_scale: Tensor | None = None,
        output_block_scale: Tensor | None = None,
    ) -> Tensor:
        """Attend by vLLM's kernel, then bring this layer's pages down to the budget."""
        out: Tensor = super().forward(
            layer, query, key, value, kv_cache, attn_metadata, output, output_scale, output_block_scale
        )
        step = getattr(attn_metadata, "step", None)
        if self.settings is None or step is None:
            return out
        if self.eviction is None:
            self.eviction = self._begin(layer, kv_cache, self.settings)
        self.eviction.take_in(step, query)
        self.eviction.let_go(step)
        return out

    def _begin(self, layer: Any, cache: Tensor, settings: Settings) -> Eviction:
        names = list(self.config.compilation_config.static_forward_context)
        group, window, recent = self.num_heads // self.num_kv_heads, settings.policy.query_rows, None
        if window:
            rows, dtype = self.config.scheduler_config.max_num_seqs, self.config.model_config.dtype
            recent = Recent(rows, cache.shape[0], group, self.num_kv_heads, window, self.head_size, dtype)
        where = names.index(layer.layer_name), len(names)
        softcap = self.logits_soft_cap or None
        return Eviction(settings, Pages(cache), *where, self.scale, softcap, group, recent)


class ArenaBackend(CPUAttentionBackend):
    """vLLM's CPU backend; as it is where the server was not given modicum's settings."""

    settings: ClassVar[Settings | None] = None
    """Of the model that was built last: specs are made after it, out of reach of the configuration."""

    @classmethod
    def customize_spec(cls, spec: AttentionSpec) -> AttentionSpec:
        if cls.settings is None:
            return spec
        if type(spec) is not FullAttentionSpec:
            raise ModelError(f"{_NEEDS}: this model has a {type(spec).__name__}")
        return ArenaSpec.around(spec, cls.settings)

    @staticmethod
    def get_impl_cls() -> type[ArenaImpl]:
        return ArenaImpl

    @staticmethod
    def get_builder_cls() -> type[ArenaBuilder]:
        return ArenaBuilder
