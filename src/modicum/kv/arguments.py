"""Arguments of a model call that a budget cache cannot serve, each refused with the setting's name."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from modicum.errors import InputError


def check_settings(arguments: Mapping[str, Any], config: Any, hides_use_cache: bool = False) -> None:
    """Refuse `use_cache=False` and `output_attentions=True`.

    Args:
        arguments: keyword arguments as the model passes them on to its attention.
        config: configuration of the decoder.
        hides_use_cache: whether the model tells its attention that `use_cache` is False whatever it is.

    Raises:
        InputError: one of them is set.
    """
    if arguments.get("use_cache") is False and not hides_use_cache:
        raise InputError(
            "use_cache is False in a call with a budget cache: generate would then read the whole text into "
            "the cache again at every step. The setting comes from the argument use_cache, from "
            "model.generation_config.use_cache or from model.config.use_cache (many training scripts save it "
            "so). Pass use_cache=True, or set both model.config.use_cache and "
            "model.generation_config.use_cache to True"
        )
    wanted = arguments.get("output_attentions")
    if getattr(config, "output_attentions", False) if wanted is None else wanted:
        raise InputError(
            "output_attentions is True in a call with a budget cache, which makes no whole attention maps: "
            "leave it out and model.config.output_attentions at False, or call without a budget cache"
        )


def check_positions(positions: Tensor | None, mask: Tensor | None, seen: Sequence[int], columns: int) -> None:
    """Refuse positions that start again, or fall within a call.

    Nothing is checked where the model tells its attention no positions, or several per token (as multimodal
    rotary embeddings do).

    Args:
        positions: [B|1, columns] at which the model rotated the new tokens.
        mask: [B, ≥ columns] whose last columns are this call's, 0 for padding; None where there is none.
        seen: tokens that each row has seen before this call, padding not counted.
        columns: of this call.

    Raises:
        InputError: a token's position is below the number of tokens before it, or below an earlier token's.
    """
    if positions is None or positions.dim() != 2 or positions.shape[1] != columns:
        return
    if len(positions) not in (1, len(seen)):
        return
    if mask is not None and (len(mask) != len(seen) or mask.shape[1] < columns):
        return  # refused when the call is laid out
    if columns == 1 and mask is None:  # most calls, so spared what follows
        first = positions[:, 0].tolist()
        if min(first) >= max(seen):
            return
    at = positions.to("cpu", torch.int64).expand(len(seen), -1)
    told = torch.ones_like(at, dtype=torch.bool) if mask is None else mask[:, -columns:].to("cpu", torch.bool)
    known = at.masked_fill(~told, -1)
    before = torch.cat([torch.tensor(seen)[:, None], known[:, :-1]], dim=1).cummax(1).values
    wrong = told & (at < before)
    if not bool(wrong.any()):
        return
    row, column = (int(i) for i in wrong.nonzero()[0])
    place = int(at[row, column])
    if place < seen[row]:
        raise InputError(
            f"position_ids start again: row {row} of this call has position {place}, and the cache has seen "
            f"{seen[row]} tokens of it. Give new tokens only (generate needs use_cache=True for that), at "
            f"positions from {seen[row]} on or without position_ids; for another text use cache.reset()"
        )
    raise InputError(
        f"position_ids fall from {int(before[row, column])} to {place} within row {row} of this call: give "
        "each sequence of a packed row a row of its own, and mark padding in attention_mask"
    )
