"""What a model or its layers cannot do as well as one might think: said before the work begins."""

from __future__ import annotations

import warnings

import torch
from torch import Tensor
from transformers import PreTrainedModel

from modicum.errors import InputError
from modicum.kv.cache import BudgetCache

_TABLES = ("wpe", "embed_positions", "position_embeddings", "position_embedding")


def check_positions(model: PreTrainedModel, last: int) -> None:
    """Warn when position `last` (counted from 1) is beyond what the model was trained on.

    Raises:
        InputError: the model looks positions up in a table, and it ends before.
    """
    limit = getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None)
    if not isinstance(limit, int) or limit < 1 or last <= limit:
        return
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Embedding) and name.rsplit(".", 1)[-1] in _TABLES:
            raise InputError(
                f"prompt and answer reach position {last}, the model's table of positions ends at {limit} "
                "(max_position_embeddings): give a shorter prompt or a smaller max_new_tokens"
            )
    warnings.warn(
        f"prompt and answer reach position {last}, and the model was trained on positions up to {limit} "
        "(max_position_embeddings). A budget bounds memory, not positions: generation goes on at the true "
        f"positions, and beyond {limit} its quality falls",
        stacklevel=4,  # to the caller of modicum.generate,
    )


def check_padding(cache: BudgetCache, valid: Tensor) -> None:
    """Warn of padding inside rows where it tells: valid [B, n] of all columns, those to come included."""
    if len(cache.shape.full) == len(cache.shape.layers):
        return
    inside = valid.long().cummax(1).values.bool() & ~valid
    if bool(inside.any()):
        warnings.warn(
            "rows of this batch have padding between their turns, and this model's sliding-window layers "
            "count it, as transformers' own do: such rows look back less far than they would alone. Continue "
            "them one by one, or with turns of equal length",
            stacklevel=4,  # to the caller of modicum.generate
        )
