"""Reader: takes tokens into a cache, chunk by chunk."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from modicum.compat import cache_argument
from modicum.errors import InputError
from modicum.float32_products import float32_products
from modicum.generation.inputs import Block
from modicum.generation.interrupt import Interrupt
from modicum.generation.transcript import Transcript
from modicum.generation.turn import Turn
from modicum.kv.cache import BudgetCache
from modicum.kv.call import cuts
from modicum.kv.offload import execution_device

_GRAPHS = 64  # of one class of model: each policy and each size of cache has its own


@cache
def _graph(kind: Any, cuda: bool) -> Callable[..., Any]:
    # The function of the class, not of a model: what is compiled keeps no model alive.
    options: dict[str, Any] = {"mode": "reduce-overhead" if cuda else None}
    if "recompile_limit" in inspect.signature(torch.compile).parameters:  # torch 2.11 has but the global one
        options["recompile_limit"] = _GRAPHS
    run: Callable[..., Any] = torch.compile(kind.forward, fullgraph=True, dynamic=False, **options)
    return run


def compiled(model: PreTrainedModel) -> Callable[..., Any]:
    """The model's decode step, compiled as one graph; on a GPU captured as a CUDA graph."""
    kind: Any = type(model)
    run = _graph(kind, model.device.type == "cuda")
    torch.compiler.cudagraph_mark_step_begin()  # type: ignore[no-untyped-call]
    return partial(run, model)


class Reader:
    """A model, its cache, and what the cache has been told."""

    def __init__(self, model: PreTrainedModel, cache: BudgetCache, rows: int, pad: int) -> None:
        if cache.batch_size and cache.batch_size != rows:
            raise InputError(
                f"the cache holds {cache.batch_size} rows and {rows} came: give a list of {cache.batch_size} "
                "prompts, or a new cache"
            )
        self.model: Any = model
        self.cache, self.rows, self.pad = cache, rows, pad
        self.transcript = Transcript.of(cache, rows, pad)
        self.turn = Turn.of(cache)
        """Where the cache's conversation is; None while it has read nothing, or text without a template."""
        self.counts = self.transcript.valid.sum(1)
        """[B] tokens that each row has been told, padding left out."""
        self.taken = 0
        """Tokens taken in by `take`, padding left out."""
        self.device = execution_device(model)
        accepted = inspect.signature(model.forward).parameters
        self._cache_argument = cache_argument(model)
        self._positions = "position_ids" in accepted
        # Logits of one token: those of a whole chunk would be many times the size of what the cache holds.
        self._extra: dict[str, Any] = {"logits_to_keep": 1} if "logits_to_keep" in accepted else {}
        # [B, columns] on the model's device; None while there is no padding, as the model is quicker without.
        self._mask: Tensor | None = None
        if not bool(self.transcript.valid.all()):
            self._mask = self.transcript.valid.long().to(self.device)

    @property
    def chunk(self) -> int:
        """Tokens taken in at a time."""
        return self.cache.budget.chunk

    def take(self, block: Block, interrupt: Interrupt, tell: Callable[[int], None]) -> bool:
        """Prefill: take in a block, chunk by chunk; False if interrupted (between two chunks) on the way."""
        ids = block.ids.to(self.device)
        self.reserve(ids.shape[1])
        self._set_turn(None)  # an interrupted block leaves the conversation nowhere
        for start, stop in self._cuts(ids.shape[1]):
            if interrupt.asked:
                return False
            part = block.part(start, stop)
            self.forward(ids[:, start:stop], part, again=self.cache.policy.replays)
            self.taken += sum(part.counts)
            tell(stop - start)
        self._set_turn(block.turn)
        return True

    def _cuts(self, length: int) -> list[tuple[int, int]]:
        """Where to cut a block into calls of the model.

        A model whose recurrent layers begin anew in each call of several tokens takes its first block in one
        call, which the layers with attention cut for themselves, and later ones token by token.
        """
        if self.cache.policy.replays:  # a call has its tokens twice
            return cuts(length, max(1, self.chunk // 2))
        if self.cache.shape.continues:
            return cuts(length, self.chunk)
        return cuts(length, length if self.cache.seen == 0 else 1)

    def _set_turn(self, turn: Turn | None) -> None:
        if turn is None:
            self.turn = None
            Turn.drop(self.cache)
            return
        self.turn = replace(turn, last=self.transcript.ids[:, -1].tolist())
        self.turn.keep(self.cache)

    def reserve(self, more: int) -> None:
        """Make room for so many columns more, all at once."""
        self.transcript.reserve(more)
        width = self.transcript.length + more
        if self._mask is not None and self._mask.shape[1] < width:
            grown = self._mask.new_ones(self.rows, width)
            grown[:, : self._mask.shape[1]] = self._mask
            self._mask = grown

    @torch.no_grad()
    def forward(self, ids: Tensor, block: Block, again: bool = False) -> None:
        """One call of the model. ids: [B, m] on the model's device; block: the same on the CPU.

        again: read them twice, the second time without keeping anything (`BudgetCache.replaying`).
        """
        told, m = self.transcript, ids.shape[1]
        seen = told.length
        valid = block.valid
        if valid is not None and bool(valid.all()):
            valid = None
        if valid is not None and self._mask is None:
            self._mask = torch.ones(self.rows, seen, dtype=torch.int64, device=self.device)
        inputs: dict[str, Any] = {self._cache_argument: self.cache, **self._extra}
        columns = 2 * m if again else m
        positions = torch.arange(seen, seen + columns, device=self.device)[None]
        if self._mask is not None:
            self.reserve(m)
            new = torch.ones_like(block.ids, dtype=torch.bool) if valid is None else valid
            self._mask[:, seen : seen + m] = new.to(self.device)
            inputs["attention_mask"] = self._mask[:, : seen + m]
            if again:
                there = self._mask[:, seen : seen + m]
                inputs["attention_mask"] = torch.cat([inputs["attention_mask"], there], dim=1)
                new = torch.cat([new, new], dim=1)
            # Positions count tokens, not columns: so a row is at the positions it would have alone.
            positions = (self.counts[:, None] + new.cumsum(1) - 1).clamp_min(0).to(self.device)
        if self._positions:
            inputs["position_ids"] = positions
        run = self.model
        if m == 1 and self.cache.compiled and self.cache.prepare():
            # Of the same strides at each step, as of the same shape: a graph is made for both.
            run, ids = compiled(self.model), ids.flatten().clone()[:, None]
            if "attention_mask" in inputs:
                inputs["attention_mask"] = inputs["attention_mask"][:, -1:].clone()
        if again:
            ids = torch.cat([ids, ids], dim=1)
            if self._extra:
                inputs["logits_to_keep"] = torch.tensor([m - 1], device=self.device)
        reading = float32_products(self.model.dtype) if m > 1 else nullcontext()
        with reading, self.cache.replaying(m) if again else nullcontext():
            out = run(input_ids=ids, use_cache=True, return_dict=True, **inputs)
        logits = out.logits[:, m - 1 if again and not self._extra else -1]
        if valid is not None and told.logits is not None:
            # A row that ends in padding goes on from where it was.
            logits = torch.where(valid[:, -1:].to(self.device), logits, told.logits)
        told.logits = logits.clone()
        told.add(block.ids, valid)
        self.counts += m if valid is None else valid.sum(1)
        if self.turn is not None:
            self.turn.read(block.ids, valid)
            self.turn.keep(self.cache)
