"""modicum inside vLLM: each request's KV cache held in a fixed set of pages, however long it grows.

`register` is vLLM's entry point `vllm.general_plugins`, called in each of its processes. It changes nothing
unless the server was given modicum's settings:

    --additional-config '{"modicum": {"policy": "keydiff", "budget": 2048}}'
"""

from __future__ import annotations

import logging
import sys


def register() -> None:
    """Register the arena's pages, their manager and the attention backends with vLLM.

    With a vLLM whose insides are not known it does nothing, unless the server is asked for modicum.
    """
    from modicum.errors import ModicumError
    from modicum.vllm import counts, version

    try:
        version.check()
    except ModicumError as error:
        if any('"modicum"' in word for word in sys.argv):
            raise
        logging.getLogger("vllm").debug("modicum stays out: %s", error)
        return
    counts.announce()
    from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend
    from vllm.v1.kv_cache_interface import FullAttentionSpec
    from vllm.v1.kv_cache_spec_registry import KVCacheSpecRegistry

    from modicum.vllm.manager import ArenaManager
    from modicum.vllm.spec import ArenaSpec

    # vLLM registers its own kinds when first asked, and not at all once another is there.
    KVCacheSpecRegistry.check_kv_cache_spec_registry({})
    KVCacheSpecRegistry.register(ArenaSpec, ArenaManager, FullAttentionSpec)
    for name, room in {"CPU_ATTN": "cpu", "FLASH_ATTN": "flash", "TRITON_ATTN": "triton"}.items():
        register_backend(AttentionBackendEnum[name], f"modicum.vllm.{room}.ArenaBackend")
