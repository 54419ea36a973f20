"""Sequences: the tokens that a teacher reads and a student learns from."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from modicum.errors import InputError
from modicum.tasks.expression import parse_task
from modicum.weights import calibration

_TRAINING_SEED = 1_000_003
"""Added to the seed of generated questions, so that an evaluation with a small seed asks others."""


def split(
    texts: Sequence[str], tokenizer: Any, num: int | None, length: int, seed: int
) -> tuple[Tensor, Tensor]:
    """Windows of the text to learn from, [n, length] int64, and an eighth as many others to measure on.

    Args:
        num: windows to learn from; None for all there are, less those to measure on.

    Raises:
        InputError: the text has too few tokens.
    """
    if num is not None:
        held = max(1, num // 8)
        ids = calibration.tokens(texts, tokenizer, num, length, seed, held)
        return ids[:num], ids[num:]
    ids = calibration.tokens(texts, tokenizer, None, length, seed)
    if len(ids) < 2:
        raise InputError(
            f"the text has {len(ids) * length:,} tokens in whole sequences of {length}: give text for two at "
            f"least, or shorter ones, length={length // 2}"
        )
    held = max(1, len(ids) // 9)
    return ids[:-held], ids[-held:]


def with_questions(ids: Tensor, tokenizer: Any, tasks: str, share: float, seed: int) -> Tensor:
    """Replace a share of the sequences by generated questions with their answers.

    A question is as long as fits with its answer behind it; in front it is filled up with what was there.

    Args:
        ids: [n, T] int64
        tokenizer: the student's.
        tasks: such as "niah_single_2,vt:hops=2", in turns (see `modicum.tasks`).
        share: above 0, at most 1.

    Raises:
        InputError: a task is not known or needs longer sequences, or the share is out of range.
    """
    if not 0 < share <= 1:
        raise InputError(f"the share of questions is {share}: give one above 0 and at most 1")
    kinds = parse_task(tasks)
    length, num = ids.shape[1], max(1, round(share * len(ids)))
    rows = ids.clone()
    for index in range(num):
        task = kinds[index % len(kinds)]
        sample = task.sample(index // len(kinds), length, tokenizer, seed + _TRAINING_SEED)
        answer = ", ".join(sample.answers)
        text = f"{sample.context}{sample.question} {answer}"
        row = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"][-length:]
        rows[index, length - len(row) :] = torch.tensor(row)
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed))
    return rows[order]


def digest(ids: Tensor) -> str:
    """16 hex digits that stand for tokens [n, T]."""
    shape = str(tuple(ids.shape)).encode()
    return hashlib.sha256(shape + ids.contiguous().numpy().tobytes()).hexdigest()[:16]
