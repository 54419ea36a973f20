"""Sample: one context, one question about it, and what counts as right. Task: where samples come from."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol


@dataclass(frozen=True)
class Sample:
    """One thing to ask a model.

    A model reads `context + question` and goes on; with the question hidden, the context alone is read and
    compressed first. Generated answers are judged by `metric` against `answers`; with `metric` "loss" nothing
    is generated, and the mean loss of `target`'s tokens after `context` (the question is then empty) counts.
    """

    task: str
    """The task's full expression, such as "niah_single_2" or "vt:hops=2,chains=1"."""
    index: int
    """Which of the task's samples; with the task, length and seed it fixes everything else."""
    context: str
    question: str
    """Ends where the answer begins: no space at its end."""
    answers: tuple[str, ...]
    """All of them are wanted (or any, as the metric says)."""
    metric: str
    """A name in `modicum.tasks.metrics`."""
    max_new_tokens: int
    target: str = ""
    """What is predicted under the metric "loss"."""
    needles: tuple[tuple[int, int], ...] = ()
    """Where in `context` the answers' sentences are: character ranges (start, end)."""
    depth: float | None = None
    """Place of the first needle in the context, 0 to 1."""
    answer_prefix: str = ""
    """The end of `question` that begins the answer: a model with a chat template finds it in its own turn."""

    @property
    def asked(self) -> str:
        """`question` without the beginning of the answer."""
        return self.question.removesuffix(self.answer_prefix)


class Task(Protocol):
    """A source of samples.

    A task may also have a number `questions`: so many samples in a row, from a multiple of it on, ask about
    the same context. An evaluation then reads it once.
    """

    @property
    def name(self) -> str:
        """The full expression that `parse_task` reads back."""

    @property
    def metric(self) -> str:
        """How its samples are judged."""

    def sample(self, index: int, length: int | None, tokenizer: Any, seed: int = 0) -> Sample:
        """The sample of that index: context, question and room for the answer take at most `length` tokens
        of the tokenizer (special tokens counted) and, for generated tasks, come as near to it as a sentence
        allows. None: as long as the data has it.

        Raises:
            InputError: the length is too short for the task, or there is no sample of that index.
        """

    def __len__(self) -> int:
        """How many samples there are; generated tasks have 2**31 - 1."""
