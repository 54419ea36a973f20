"""Sequences: the tokens that a teacher reads and a student learns from."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from modicum.errors import InputError
from modicum.tasks.expression import parse_task
from modicum.tasks.sample import Task
from modicum.weights import calibration

_TRAINING_SEED = 1_000_003
"""Added to the seed of generated questions, so that an evaluation with a small seed asks others."""
Answer = Callable[[Sequence[Sequence[int]], int], list[list[int]]]
"""Gives greedy answers of at most so many tokens to prompts of tokens."""


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


@dataclass(frozen=True)
class Sequences:
    """What a student learns from.

    Attributes:
        ids: [n, T] int64
        answers: [n] int64, how many tokens at the end of each are a teacher's answer; 0 for text.
    """

    ids: Tensor
    answers: Tensor


@dataclass(frozen=True)
class Questions:
    """Generated questions that take the place of sequences.

    Attributes:
        tasks: such as "niah_single_2,vt:hops=2", asked in turns (see `modicum.tasks`).
        share: of the sequences, above 0 and at most 1.
        seed: of the questions, and of the order of all sequences.

    Raises:
        InputError: the share is out of range.
    """

    tasks: str
    share: float
    seed: int

    def __post_init__(self) -> None:
        if not 0 < self.share <= 1:
            raise InputError(f"the share of questions is {self.share}: give one above 0 and at most 1")

    def parse(self) -> list[Task]:
        """The tasks.

        Raises:
            InputError: one is not known, or asks nothing.
        """
        found = parse_task(self.tasks)
        for task in found:
            if task.metric == "loss":
                raise InputError(
                    f"{task.name} asks no questions: give a task with answers, such as niah_single_2"
                )
        return found

    def count(self, num_sequences: int) -> int:
        """How many sequences become questions."""
        return max(1, round(self.share * num_sequences))


def with_questions(
    ids: Tensor,
    tokenizer: Any,
    questions: Questions,
    answer: Answer,
    progress: Callable[[int, int], object] | None = None,
) -> Sequences:
    """Replace some of the sequences by questions with a teacher's answers.

    The answers are the teacher's own, as in sequence-level distillation (Kim and Rush 2016, arXiv
    1606.07947): after right answers in words that it would not use, a teacher may be wrong about what
    follows. A question is as long as fits with the task's room for an answer behind it; in front of it the
    sequence's own text stays.

    Args:
        ids: [n, T] int64
        tokenizer: the student's.
        answer: gives a teacher's greedy answers.
        progress: called with questions answered, and in all.

    Raises:
        InputError: a task is not known or needs longer sequences.
    """
    kinds = questions.parse()
    length, num = ids.shape[1], questions.count(len(ids))
    tell = progress or (lambda *_: None)
    rows, lengths, done = ids.clone(), torch.zeros(len(ids), dtype=torch.int64), 0
    tell(done, num)
    seed = questions.seed + _TRAINING_SEED
    # Questions of one task are answered together, as they have the same room for answers.
    for kind, task in enumerate(kinds):
        indices = range(kind, num, len(kinds))
        samples = [task.sample(index // len(kinds), length, tokenizer, seed) for index in indices]
        prompts = [list(tokenizer(x.context + x.question, verbose=False)["input_ids"]) for x in samples]
        answers = answer(prompts, samples[0].max_new_tokens) if samples else []
        for index, prompt, told in zip(indices, prompts, answers, strict=True):
            row = (prompt + told)[-length:]
            rows[index, length - len(row) :] = torch.tensor(row)
            lengths[index] = len(told)
        done += len(indices)
        tell(done, num)
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(questions.seed))
    return Sequences(rows[order], lengths[order])


def digest(ids: Tensor) -> str:
    """16 hex digits that stand for tokens [n, T]."""
    shape = str(tuple(ids.shape)).encode()
    return hashlib.sha256(shape + ids.contiguous().numpy().tobytes()).hexdigest()[:16]
