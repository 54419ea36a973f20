"""Prompts and questions: checked, encoded, and laid side by side."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from modicum.errors import InputError
from modicum.generation.turn import Turn


@dataclass(frozen=True)
class Block:
    """Tokens for every row of a cache, to be taken in as one call; shorter rows are padded on the left."""

    ids: Tensor
    """[B, n] int64 on the CPU."""
    valid: Tensor | None
    """[B, n] bool, False for padding; None when there is none."""
    turn: Turn | None = None
    """Where the conversation is after these tokens; None for text without a chat template."""

    @classmethod
    def of(cls, rows: Sequence[Sequence[int]], pad: int, turn: Turn | None = None) -> Block:
        """Lay rows of tokens side by side."""
        width = max(len(row) for row in rows)
        ids = torch.tensor([[pad] * (width - len(row)) + list(row) for row in rows], dtype=torch.int64)
        if all(len(row) == width for row in rows):
            return cls(ids, None, turn)
        lengths = torch.tensor([len(row) for row in rows])
        return cls(ids, torch.arange(width) >= (width - lengths)[:, None], turn)

    @property
    def counts(self) -> list[int]:
        """Tokens of each row."""
        if self.valid is None:
            return [self.ids.shape[1]] * self.ids.shape[0]
        return [int(n) for n in self.valid.sum(1)]

    def part(self, start: int, stop: int) -> Block:
        """Columns start:stop."""
        valid = None if self.valid is None else self.valid[:, start:stop]
        return Block(self.ids[:, start:stop], valid, self.turn if stop >= self.ids.shape[1] else None)


def check_text(text: object, what: str) -> str:
    """The text, if it is one that can be encoded."""
    if isinstance(text, bytes):
        raise InputError(f"the {what} is bytes: decode it first, as in data.decode('utf-8')")
    if not isinstance(text, str):
        raise InputError(f"the {what} is {type(text).__name__}, not text: give a str")
    if not text:
        raise InputError(f"the {what} is empty: give some text")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise InputError(
            f"the {what} is not UTF-8 text: character {error.start} is a lone surrogate, as bytes read with "
            "the wrong encoding leave behind"
        ) from error
    return text


def check_texts(texts: object, what: str) -> list[str]:
    """A list of texts, one or more."""
    if not isinstance(texts, list | tuple):
        raise InputError(f"the {what} is {type(texts).__name__}: give a str, or a list of them")
    if not texts:
        raise InputError(f"the list of {what}s is empty: give at least one")
    return [check_text(text, f"{what} {i}") for i, text in enumerate(texts)]


def encode(tokenizer: Any, texts: list[str], what: str, *, special: bool, vocabulary: int) -> list[list[int]]:
    """Token ids of each text; `special`: with the tokens that the tokenizer puts around a sequence (BOS)."""
    rows = []
    for text in texts:
        # verbose=False: a prompt past the tokenizer's idea of a maximum is what budgets are for.
        ids: list[int] = tokenizer(
            text,
            add_special_tokens=special,
            padding=False,
            truncation=False,
            return_attention_mask=False,
            verbose=False,
        )["input_ids"]
        if not ids:
            raise InputError(f"the {what} has no tokens: give some text")
        if max(ids) >= vocabulary:
            raise InputError(
                f"the tokenizer gives token {max(ids)}, the model knows {vocabulary}: use the model's own"
            )
        rows.append(ids)
    return rows


def check_count(value: object, what: str) -> int:
    """A whole number of at least 1."""
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise InputError(f"{what} is {value!r}: it must be a whole number of at least 1")
    return value
