"""Compiled decode steps, in turns with those of a compiled StaticCache of the budget's length + a chunk."""

from __future__ import annotations

import time
from typing import Any

import torch
from speed import Sample, Tell
from subject import Numbers, Settings, as_text, one_shot, plain, random_ids, split
from torch import Tensor
from transformers import PreTrainedModel, StaticCache

import modicum
from modicum.compat import cache_kwargs
from modicum.generation.reader import compiled


class Static:
    """transformers' StaticCache, filled to the budget."""

    def __init__(self, model: PreTrainedModel, settings: Settings) -> None:
        self.model, self.length = model, settings.budget - settings.block // 2
        self.cache = StaticCache(config=model.config, max_cache_len=settings.budget + settings.chunk)
        _, full = one_shot(model, random_ids(settings.budget, settings.seed))
        for number, layer in enumerate(full.layers):
            self.cache.update(layer.keys[:, :, : self.length], layer.values[:, :, : self.length], number)

    def decode(self, ids: Tensor) -> float:
        """Seconds per token, from the same length each time."""
        for layer in self.cache.layers:
            layer.cumulative_length.fill_(self.length)
        with plain(self.model):
            return _decode(self.model, self.cache, self.length, ids)


@torch.no_grad()
def _decode(model: PreTrainedModel, cache: Any, seen: int, ids: Tensor) -> float:
    given = cache_kwargs(model, cache)
    start = time.perf_counter()
    for number in range(ids.shape[1]):
        # Of the same strides at each step, as of the same shape: a graph is made for both.
        token, at = ids[:, number].clone()[:, None], torch.tensor([[seen + number]])
        if isinstance(cache, modicum.BudgetCache):
            cache.prepare()
        compiled(model)(input_ids=token, **given, use_cache=True, position_ids=at)
    return (time.perf_counter() - start) / ids.shape[1]


def decodes(model: PreTrainedModel, settings: Settings, tell: Tell) -> list[Sample]:
    """Samples of seconds per token, and what the first step took: it compiles.

    The budget's slots are seen twice over, not the whole prompt: a step's cost is the same.
    """
    text = as_text(random_ids(2 * settings.budget, settings.seed))
    ids = random_ids(settings.block, settings.seed + 1)
    static = Static(model, settings)
    static.decode(ids)
    samples: list[Sample] = []
    for policy in settings.compiled:
        given = {"budget": settings.budget, "chunk": settings.chunk, "compile": True}
        cache = modicum.prefill(model, Numbers(), text, policy=split(policy)[0], **given)
        first = _decode(model, cache, cache.seen, ids[:, :1])
        _decode(model, cache, cache.seen, ids)
        for number in range(settings.repeats):
            before = static.decode(ids)
            seconds = _decode(model, cache, cache.seen, ids)
            both = {"seconds": seconds, "static": (before + static.decode(ids)) / 2, "first": first}
            samples.append({"policy": policy, "round": number, **both})
        tell(f"compiled: {policy}")
    return samples
