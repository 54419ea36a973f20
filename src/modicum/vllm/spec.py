"""ArenaSpec: a layer whose requests have a fixed number of pages."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import TYPE_CHECKING

from vllm.v1.kv_cache_interface import FullAttentionSpec

from modicum.vllm.settings import Settings, whole_pages

if TYPE_CHECKING:
    from vllm.config import VllmConfig


@dataclass(frozen=True, kw_only=True)
class ArenaSpec(FullAttentionSpec):
    """Full attention over an arena of `budget` + `chunk` slots, in pages of `block_size`."""

    budget: int
    chunk: int

    @classmethod
    def around(cls, spec: FullAttentionSpec, settings: Settings) -> ArenaSpec:
        """The spec of a layer of full attention, with an arena's bounds."""
        given = {f.name: getattr(spec, f.name) for f in fields(FullAttentionSpec)}
        return cls(**given, budget=settings.budget, chunk=settings.chunk)

    @property
    def pages(self) -> int:
        """Pages that a request has at most."""
        return whole_pages(self.budget + self.chunk, self.block_size)

    @property
    def prefix_cacheable(self) -> bool:
        return False

    def max_memory_usage_bytes(self, vllm_config: VllmConfig) -> int:
        """A request of any length: so the server's own figures of concurrency are right."""
        whole = whole_pages(vllm_config.model_config.max_model_len, self.block_size)
        return int(min(self.pages, whole) * self.page_size_bytes)

    @classmethod
    def merge(cls, specs: list[ArenaSpec]) -> ArenaSpec:
        """One spec for all layers, which are alike."""
        first = specs[0]
        assert all(spec == first for spec in specs), "layers of unlike arenas cannot share pages"
        return first
