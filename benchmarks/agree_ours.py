"""Our side of `agree_kvpress.py`: what is compared with what, and what a cache of ours keeps."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from agree_models import padding
from transformers import PreTrainedModel

import modicum
from modicum.compat import cache_kwargs

TOKENS, WINDOW = 320, 16


@dataclass(frozen=True)
class Case:
    """A policy of ours, a press of theirs, and presses of theirs with rules changed to ours one by one."""

    title: str
    policy: str
    press: str
    changed: tuple[tuple[str, str], ...] = ()
    n_sink: int = 0

    @property
    def presses(self) -> tuple[tuple[str, str], ...]:
        return (("as it is", self.press), *self.changed)


SNAPKV = f"snapkv(window={WINDOW})"
CASES = (
    Case("KeyDiff", "keydiff", "keydiff"),
    Case("Knorm", "knorm", "knorm"),
    Case("TOVA", "tova", "tova"),
    Case("StreamingLLM", "streamingllm", "streamingllm", n_sink=4),
    Case("SnapKV", SNAPKV, "snapkv", (("edges", "snapkv-edges"),)),
    Case("Ada-KV(SnapKV)", f"adakv+{SNAPKV}", "adakv+snapkv", (("edges", "adakv+snapkv-edges"),)),
    Case(
        "CriticalKV(SnapKV)",
        f"criticalkv+{SNAPKV}",
        "criticalkv+snapkv",
        (("edges", "criticalkv+snapkv-edges"), ("edges, sum", "criticalkv+snapkv-summed")),
    ),
    Case("PyramidKV", f"pyramidkv+{SNAPKV}", "pyramidkv"),
    Case("H2O", "h2o", "observed", (("no division", "observed-summed"),)),
)


@torch.no_grad()
def fill(
    model: PreTrainedModel, policy: str, ids: list[list[int]], pads: list[int], budget: int, **settings: int
) -> modicum.BudgetCache:
    """Our cache after a one-shot prefill."""
    tokens = torch.tensor(ids)
    cache = modicum.BudgetCache(
        model, policy, budget, **{"chunk": tokens.shape[1], "n_sink": 0, "recent": 0, **settings}
    )
    mask = {"attention_mask": padding(pads, tokens.shape[1])} if any(pads) else {}
    model(tokens, **cache_kwargs(model, cache), use_cache=True, logits_to_keep=1, **mask)
    cache.check_integrity()
    return cache


def kept_by(cache: modicum.BudgetCache) -> list[list[list[list[int]]]]:
    """[layers][B][H]: positions held, in order."""
    layers = [cache.positions(i) for i in range(len(cache.layers))]
    return [[[sorted(at[at >= 0].tolist()) for at in row] for row in layer] for layer in layers]
