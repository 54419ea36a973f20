"""Calibration: the tokens on which a model's inputs are looked at."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from modicum.errors import InputError

SEQUENCES = 128
LONGEST = 2048


def texts_in(path: Path) -> list[str]:
    """The text files of a folder, in the order of their names, or one file.

    Raises:
        InputError: there are none, or they are not UTF-8.
    """
    files = sorted(path.rglob("*.txt")) if path.is_dir() else [path]
    if not files or not files[0].is_file():
        raise InputError(f"{path} holds no text files (*.txt) to calibrate on")
    try:
        return [file.read_text(encoding="utf-8") for file in files]
    except UnicodeDecodeError as error:
        raise InputError(f"{path} holds a file that is not UTF-8: {error}") from error


def length_for(model: PreTrainedModel) -> int:
    """Tokens of a sequence where none are asked for: 2,048, or the model's context if that is shorter."""
    longest = getattr(model.config.get_text_config(), "max_position_embeddings", LONGEST)
    return min(LONGEST, int(longest))


def tokens(text: str | Sequence[str], tokenizer: Any, sequences: int, length: int, seed: int = 0) -> Tensor:
    """[sequences, length] windows of the text, without overlap, chosen by the seed.

    Raises:
        InputError: the text has fewer tokens than one window for each sequence.
    """
    parts = [text] if isinstance(text, str) else list(text)
    ids: list[int] = []
    for part in parts:
        ids += tokenizer(part, add_special_tokens=False, verbose=False)["input_ids"]
    needed = sequences * length
    if len(ids) < needed:
        raise InputError(
            f"calibration asks for {sequences} sequences of {length} tokens, {needed:,}; the text has "
            f"{len(ids):,}: give more text, fewer sequences or shorter ones"
        )
    windows = torch.tensor(ids[: len(ids) // length * length]).view(-1, length)
    order = torch.randperm(len(windows), generator=torch.Generator().manual_seed(seed))
    return windows[order[:sequences]]
