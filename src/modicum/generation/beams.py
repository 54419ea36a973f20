"""Beam search: transformers' own, on a copy of the cache, so that beams that lose leave nothing behind."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.generation.stopping_criteria import StoppingCriteria, StoppingCriteriaList

from modicum.compat import cache_kwargs
from modicum.generation.interrupt import Interrupt
from modicum.generation.reader import Reader
from modicum.generation.rules import Rules


def search(
    reader: Reader, rules: Rules, history: Tensor, valid: Tensor, interrupt: Interrupt
) -> tuple[list[list[int]], list[str | None], int]:
    """The best new tokens of each row, why it ended (None: interrupted), and the most bytes held meanwhile.

    history, valid: [B, n], of which the reader's cache has seen all but the last piece.
    """
    work = reader.cache.copy()
    if work.seen:
        work.batch_repeat_interleave(rules.beams)
    out = reader.model.generate(
        history,
        attention_mask=valid.long(),
        generation_config=rules.config,
        stopping_criteria=StoppingCriteriaList([*rules.given, _Asked(interrupt)]),
        **cache_kwargs(reader.model.generate, work),
    )
    rows, reasons = [], []
    for tokens in out[:, history.shape[1] :].tolist():
        rows.append(_trimmed(tokens, rules.eos, reader.pad))
        reasons.append(_reason(rows[-1], rules, interrupt))
    return rows, reasons, work.peak_nbytes


def _trimmed(tokens: list[int], eos: frozenset[int], pad: int) -> list[int]:
    """Tokens up to the one that ended the row, without the padding behind it."""
    for place, token in enumerate(tokens):
        if token in eos:
            return tokens[: place + 1]
    while len(tokens) > 1 and tokens[-1] == pad:
        tokens.pop()
    return tokens


def _reason(tokens: list[int], rules: Rules, interrupt: Interrupt) -> str | None:
    if tokens[-1] in rules.eos:
        return "stop"
    if len(tokens) == rules.config.max_new_tokens:
        return "length"
    return None if interrupt.asked else "stop"


class _Asked(StoppingCriteria):  # type: ignore[misc]  # transformers is not typed
    """Ends beam search when Ctrl-C was pressed."""

    def __init__(self, interrupt: Interrupt) -> None:
        self.interrupt = interrupt

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        return torch.full(input_ids.shape[:1], self.interrupt.asked, device=input_ids.device)
