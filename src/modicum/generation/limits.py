"""How far a model's positions go."""

from __future__ import annotations

import warnings

import torch
from transformers import PreTrainedModel

from modicum.errors import InputError

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
