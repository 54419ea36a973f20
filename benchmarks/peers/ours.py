"""modicum's side of the comparison: its policies at the bytes that a press holds, chunked and in one shot."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from job import Ask, Setting
from torch import Tensor

from modicum.errors import BudgetError
from modicum.evaluation.row import Cell, Row
from modicum.evaluation.runner import Metric, Prompt, run
from modicum.generation.inputs import Block
from modicum.generation.interrupt import Interrupt
from modicum.generation.reader import Reader
from modicum.kv.budget import Budget
from modicum.kv.cache import BudgetCache
from modicum.kv.shape import Shape
from modicum.tasks.sample import Sample

N_SINK, RECENT = 4, 32
"""Protected tokens, the defaults of a cache."""
_KEPT = {"streamingllm": (N_SINK, 0), "auto": (N_SINK, RECENT)}
"""What a policy keeps by its nature. Like a press has it (`grown`), the others protect nothing."""


@dataclass(frozen=True)
class Case:
    """A sample with its tokens."""

    task: str
    sample: Sample
    prompt: Prompt

    @property
    def key(self) -> str:
        """What names it in a job."""
        return f"{self.task}#{self.sample.index}"

    def ask(self, logits: bool) -> Ask:
        """For a peer."""
        return Ask(self.key, self.prompt.context, self.prompt.question, self.sample.max_new_tokens, logits)


def bytes_per_token(model: Any) -> int:
    """Keys and values of one token in all layers: what a press stores for each token that it keeps."""
    shape = Shape.of(model)
    width = sum(layer.kv_heads * (layer.key_dim + layer.value_dim) for layer in shape.layers)
    return width * shape.dtype.itemsize


def allowance(model: Any, case: Case, setting: Setting) -> int:
    """Bytes of a setting: those that a press with its share holds once the context was read; if `grown`,
    those that it holds when the answer was as long as it may be.
    """
    assert setting.share is not None
    tokens = int(setting.share * len(case.prompt.context))
    if setting.grown:
        tokens += len(case.prompt.question) + case.sample.max_new_tokens
    return tokens * bytes_per_token(model)


def measure(
    model: Any, tokenizer: Any, case: Case, cell: Cell, setting: Setting, metric: Metric
) -> Row | str:
    """The row of a sample, or why there is none."""
    asked = cell
    if setting.share is not None:
        nbytes = allowance(model, case, setting)
        sinks, recent = _KEPT.get(setting.policy, (0, 0)) if setting.grown else (N_SINK, RECENT)
        asked = replace(cell, budget=f"{nbytes}B", n_sink=sinks, recent=recent, evict_every=1)
    try:
        row = run(model, tokenizer, case.sample, case.prompt, asked, metric)
    except BudgetError as error:
        return str(error)
    return replace(row, cell=replace(asked, budget=cell.budget))


@torch.no_grad()
def first_logits(model: Any, case: Case, chunk: int) -> Tensor:
    """Logits of the first new token with modicum's full cache, the context in chunks."""
    prompt = case.prompt
    total = len(prompt.context) + len(prompt.question)
    budget = Budget(tokens=total, chunk=chunk, n_sink=0, recent=0)
    reader = Reader(model, BudgetCache(model, "full", budget), 1, 0)
    for tokens in (prompt.context, prompt.question):
        reader.take(Block.of([tokens], 0), Interrupt(), lambda _: None)
    assert reader.transcript.logits is not None
    return reader.transcript.logits[0].float()
