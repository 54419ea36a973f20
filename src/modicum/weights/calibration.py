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
        InputError: there are none, or one cannot be read or is not UTF-8.
    """
    if not path.exists():
        raise InputError(f"there is no {path} to calibrate on: give a text file, or a folder of *.txt files")
    files = sorted(path.rglob("*.txt")) if path.is_dir() else [path]
    if not files:
        raise InputError(f"the folder {path} holds no text files to calibrate on: give one with *.txt files")
    texts = []
    for file in files:
        try:
            texts.append(file.read_text(encoding="utf-8"))
        except OSError as error:
            raise InputError(f"cannot read {file}: {error.strerror or error}") from error
        except UnicodeDecodeError as error:
            raise InputError(
                f"{file} is not UTF-8 (byte {error.start}): convert it first, such as with iconv"
            ) from error
    return texts


def length_for(model: PreTrainedModel) -> int:
    """Tokens of a sequence where none are asked for: 2,048, or the model's context if that is shorter."""
    longest = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    return min(LONGEST, int(longest or LONGEST))


def tokens(
    text: str | Sequence[str],
    tokenizer: Any,
    sequences: int | None,
    length: int,
    seed: int = 0,
    held: int = 0,
) -> Tensor:
    """[sequences + held, length] windows of the text, without overlap, chosen by the seed; all there are
    for sequences=None.

    Raises:
        InputError: the text has fewer tokens than one window for each sequence.
    """
    parts = [text] if isinstance(text, str) else list(text)
    ids: list[int] = []
    for part in parts:
        ids += tokenizer(part, add_special_tokens=False, verbose=False)["input_ids"]
    number = len(ids) // length if sequences is None else sequences + held
    if len(ids) < number * length:
        more = f" and {held} to measure perplexity on" if held else ""
        shorter = len(ids) // number
        raise InputError(
            f"calibration needs {sequences} sequences of {length} tokens{more}, {number * length:,} tokens, "
            f"and the text has {len(ids):,}: give more text, fewer sequences"
            + (f", or shorter ones, length={shorter}" if shorter > 1 else "")
        )
    windows = torch.tensor(ids[: len(ids) // length * length]).view(-1, length)
    order = torch.randperm(len(windows), generator=torch.Generator().manual_seed(seed))
    return windows[order[:number]]
