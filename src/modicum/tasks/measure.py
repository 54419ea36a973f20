"""Measure: how many tokens a text takes, and how much of a thing fits into so many tokens."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


def encode(tokenizer: Any, text: str, *, special: bool) -> list[int]:
    """Token ids by a tokenizer of transformers or of `tokenizers`; `special` adds what opens a text."""
    if not text:
        return []
    if callable(tokenizer):
        ids: list[int] = tokenizer(text, add_special_tokens=special, verbose=False)["input_ids"]
        return ids
    found: list[int] = tokenizer.encode(text, add_special_tokens=special).ids
    return found


def count(tokenizer: Any, text: str, *, special: bool) -> int:
    """Tokens of a text."""
    return len(encode(tokenizer, text, special=special))


def decode(tokenizer: Any, ids: list[int]) -> str:
    """The text of token ids, special tokens left out."""
    text: str = tokenizer.decode(ids, skip_special_tokens=True)
    return text


def largest(size: Callable[[int], int], room: int, low: int, high: int) -> int | None:
    """The n in low..high with size(n) <= room < size(n + 1), for a size that grows with n; None if even
    size(low) is over the room.

    A guess along the straight line through what was measured comes first, so that few texts are tokenised.
    """
    best, at = low, size(low)
    if at > room:
        return None
    start = at
    over, past = high + 1, 0  # `past` is size(over), 0 while over was not measured
    margin = 0
    while over - best > 1:
        if past:
            guess = best + (over - best) * (room - at) / (past - at)
        elif best > low and at > start:
            guess = best + (room - at) * (best - low) / (at - start) + 1
        else:
            guess = 2.0 * best + 8
        n = min(over - 1, max(best + 1, round(guess) + margin))
        measured = size(n)
        if measured <= room:
            best, at = n, measured
            margin = 2 * margin if margin > 0 else 1
        else:
            over, past = n, measured
            margin = 2 * margin if margin < 0 else -1
    return best
