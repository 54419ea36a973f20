"""ArenaScheduler: a request's prompt is read in whole chunks, whatever else runs.

vLLM cuts a prompt where the tokens of a step end, which depends on the company. What a policy lets go depends
on where chunks end; with chunks of one size a request's tokens are its own, and its arena needs no more room.
"""

from __future__ import annotations

from typing import Any

from vllm.v1.core.sched.scheduler import Scheduler

from modicum.errors import InputError
from modicum.vllm.settings import Settings
from modicum.vllm.spec import ArenaSpec


class ArenaScheduler(Scheduler):
    """`--scheduler-cls modicum.vllm.scheduler.ArenaScheduler`."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        settings = Settings.of_config(self.vllm_config)
        self._chunk = 0 if settings is None else settings.chunk
        groups = self.kv_cache_config.kv_cache_groups
        if settings is not None and not all(isinstance(g.kv_cache_spec, ArenaSpec) for g in groups):
            raise InputError(
                "the attention backend that vLLM chose knows no arenas, so nothing would be held to the "
                "budget: give --attention-backend FLASH_ATTN or TRITON_ATTN"
            )

    def _reserve_prefill_lookahead(self, request: Any, num_computed_tokens: int, num_new_tokens: int) -> int:
        """The last word on a request's tokens in a step: a whole chunk, or what is left of it, or none."""
        given = int(super()._reserve_prefill_lookahead(request, num_computed_tokens, num_new_tokens))
        if not self._chunk:
            return given
        left = request.num_tokens + request.num_output_placeholders - num_computed_tokens
        whole = min(self._chunk, left)
        return whole if given >= whole else 0
