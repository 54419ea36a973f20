"""ArenaManager: a request's pages, allocated until the arena is whole and never after."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from vllm.v1.core.single_type_kv_cache_manager import FullAttentionManager

from modicum.vllm.spec import ArenaSpec

if TYPE_CHECKING:
    from vllm.v1.core.kv_cache_utils import KVCacheBlock


class ArenaManager(FullAttentionManager):
    """Counts pages by the tokens of a request, up to the arena's."""

    supports_fine_grained_hash_lookup = False

    def _most(self) -> int:
        assert isinstance(self.kv_cache_spec, ArenaSpec)
        return int(self.kv_cache_spec.pages * self.block_size)

    def get_num_blocks_to_allocate(self, request_id: str, num_tokens: int, *args: Any, **kwargs: Any) -> int:
        """Pages that so many tokens still need."""
        return int(
            super().get_num_blocks_to_allocate(request_id, min(num_tokens, self._most()), *args, **kwargs)
        )

    def allocate_new_blocks(
        self, request_id: str, num_tokens: int, num_tokens_main_model: int
    ) -> list[KVCacheBlock]:
        """Those pages."""
        most = self._most()
        found: list[KVCacheBlock] = super().allocate_new_blocks(
            request_id, min(num_tokens, most), min(num_tokens_main_model, most)
        )
        return found

    @classmethod
    def find_longest_cache_hit(
        cls, block_hashes: Any, max_length: int, kv_cache_group_ids: Sequence[int], *args: Any, **kwargs: Any
    ) -> tuple[tuple[list[KVCacheBlock], ...], int]:
        """None: pages are rewritten as tokens go, so no prefix can be shared."""
        return tuple([] for _ in kv_cache_group_ids), 0

    def cache_blocks(self, *args: Any, **kwargs: Any) -> None:
        """Nothing is kept for others."""

    def get_num_common_prefix_blocks(self, running_request_id: str) -> int:
        """Requests share no pages."""
        return 0
