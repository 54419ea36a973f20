"""Measure: a peer's cache fed and asked, with the bytes of live storage counted at every layer's update."""

from __future__ import annotations

import inspect
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from job import Ask, Job, Result
from torch import Tensor


def storages(value: Any) -> Iterator[torch.UntypedStorage]:
    """Every storage that a value is made of: tensors, tensors inside a quantised tensor, lists of them."""
    if isinstance(value, Tensor):
        names = value.__tensor_flatten__()[0] if hasattr(value, "__tensor_flatten__") else None
        if names:
            for name in names:
                yield from storages(getattr(value, name))
        else:
            yield value.untyped_storage()
    elif isinstance(value, dict):
        for inner in value.values():
            yield from storages(inner)
    elif isinstance(value, list | tuple):
        for inner in value:
            yield from storages(inner)


def nbytes(*values: Any) -> int:
    """Bytes of live storage, shared storage once."""
    return sum({s.data_ptr(): s.nbytes() for v in values for s in storages(v) if s.nbytes()}.values())


def layer_state(layer: Any) -> list[Any]:
    """All that a layer of a cache holds, by whatever name; a scalar that says a window's width is no data."""
    return [value for name, value in vars(layer).items() if name != "_sliding_window_tensor"]


class Watch:
    """Counts what a cache holds, at its most too.

    cache: of transformers. model: whose attention layers may hold indices of entries that are masked.
    """

    def __init__(self, cache: Any, model: Any) -> None:
        self.cache, self.model = cache, model
        self.peak = 0

    def now(self, *more: Any) -> int:
        """Bytes held, with `more` that are in hand."""
        masks = [getattr(m, "masked_key_indices", None) for m in self.model.modules()]
        return nbytes([layer_state(layer) for layer in self.cache.layers], masks, list(more))

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Look after every layer's update: then it holds what is stored and hands out what is attended to."""
        update = self.cache.update

        def watched(*args: Any, **kwargs: Any) -> Any:
            out = update(*args, **kwargs)
            self.peak = max(self.peak, self.now(out))
            return out

        self.cache.update = watched
        try:
            yield
        finally:
            del self.cache.update


@torch.no_grad()
def take(model: Any, cache: Any, tokens: list[int], start: int, body: bool = False) -> Tensor:
    """One call at explicit positions; the logits of the last token, or nothing of use if `body`: then the
    language-model head is left out, as it is in kvpress' own pipeline.
    """
    ids = torch.tensor([tokens])
    where = torch.arange(start, start + len(tokens))[None]
    # transformers 5.24 renamed the argument. Peers run without modicum, which has a helper for this.
    name = "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"
    given = {name: cache}
    if body:
        model.model(input_ids=ids, position_ids=where, use_cache=True, **given)
        return torch.empty(0)
    out = model(input_ids=ids, position_ids=where, use_cache=True, logits_to_keep=1, **given)
    return out.logits[0, -1].float()


def answer(
    job: Job, ask: Ask, model: Any, cache: Any, watch: Watch, logits: Tensor, seconds: float, **facts: Any
) -> Result:
    """Go on greedily from `logits`; `seconds` were spent before, `facts` are known from then."""
    at = len(ask.context) + len(ask.question)
    clock, first = time.perf_counter(), logits
    tokens: list[int] = []
    while True:
        tokens.append(int(logits.argmax()))
        if tokens[-1] in job.ends or len(tokens) >= ask.most:
            break
        logits = take(model, cache, tokens[-1:], at + len(tokens) - 1)
    return Result(
        ask=0,
        setting=0,
        tokens=tokens,
        held_bytes=watch.now(),
        peak_bytes=watch.peak,
        prefill_seconds=seconds,
        decode_seconds=time.perf_counter() - clock,
        logits=first.tolist() if ask.logits else [],
        **facts,
    )
