"""Metrics: the plug-in's counts beside vLLM's own, at the server's `/metrics` (entry point
`vllm.stat_logger_plugins`).
"""

from __future__ import annotations

from typing import Any

from prometheus_client import REGISTRY, Counter, Gauge
from vllm.v1.metrics.loggers import StatLoggerBase

from modicum.vllm.counts import Counts, Page
from modicum.vllm.settings import Settings

_GAUGES = {
    "budget_tokens": "Tokens per KV head that a request holds between steps.",
    "held_tokens": "Tokens per KV head held by the requests of the last step.",
    "most_held_tokens": "The most tokens per KV head that any request has held after a step.",
}
_COUNTERS = {
    "seen_tokens": "Tokens taken in.",
    "evicted_tokens": "Tokens let go, for each KV head.",
}


class ArenaStatLogger(StatLoggerBase):
    """Reads the worker's counts whenever vLLM records its own."""

    def __init__(self, vllm_config: Any, engine_index: int = 0) -> None:
        self.settings = Settings.of_config(vllm_config)
        self.page, self.told = Page(), Counts()
        self.gauges: dict[str, Gauge] = {}
        self.counters: dict[str, Counter] = {}
        if self.settings is None or engine_index:
            return
        for name in [n for n in REGISTRY._names_to_collectors if n.startswith("modicum:")]:
            if (old := REGISTRY._names_to_collectors.get(name)) is not None:
                REGISTRY.unregister(old)
        self.gauges = {name: Gauge(f"modicum:{name}", text) for name, text in _GAUGES.items()}
        self.counters = {name: Counter(f"modicum:{name}", text) for name, text in _COUNTERS.items()}
        self.gauges["budget_tokens"].set(self.settings.budget)

    def record(self, *args: Any, **kwargs: Any) -> None:
        """Called by vLLM after each step."""
        if not self.gauges:
            return
        now = self.page.read()
        self.gauges["held_tokens"].set(now.held)
        self.gauges["most_held_tokens"].set(now.most)
        self.counters["seen_tokens"].inc(max(0, now.seen - self.told.seen))
        self.counters["evicted_tokens"].inc(max(0, now.gone - self.told.gone))
        self.told = now

    def log_engine_initialized(self) -> None:
        """Nothing to say: the engine has said what a request costs."""
