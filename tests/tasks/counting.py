"""What a sample takes, counted in another way than the tasks count."""

from __future__ import annotations

from typing import Any

from tokenizers import Tokenizer

from modicum.tasks import parse_task


def tokens(tokenizer: Any, text: str, *, special: bool) -> int:
    """Tokens of a text."""
    if isinstance(tokenizer, Tokenizer):
        return len(tokenizer.encode(text, add_special_tokens=special).tokens)
    return len(tokenizer.tokenize(text)) + (1 if special else 0)


def taken(tokenizer: Any, sample: Any) -> int:
    """Tokens of a sample, read as an evaluation reads it: context, question, answer (or target)."""
    return (
        tokens(tokenizer, sample.context, special=True)
        + tokens(tokenizer, sample.question, special=False)
        + tokens(tokenizer, sample.target, special=False)
        + sample.max_new_tokens
    )


def only(text: str) -> Any:
    """The one task of a text."""
    (task,) = parse_task(text)
    return task
