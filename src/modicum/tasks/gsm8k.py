"""Gsm8k: school mathematics with worked examples as the context.

GSM8K (openai/grade-school-math, MIT; arXiv 2110.14168): a solution ends with "#### n". The form of the
prompt, "Question:" and "Answer:" on lines of their own, is
that of lm-evaluation-harness; the examples are the context.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, ClassVar

from modicum.errors import InputError
from modicum.tasks.measure import count
from modicum.tasks.rows import Entry, Rows, text_of
from modicum.tasks.sample import Sample


@dataclass(frozen=True, kw_only=True)
class Gsm8k(Rows):
    """Rows of `question` and `answer`. Without a path and a dataset it is openai/gsm8k.

    The examples are drawn for each sample. Under a length there are as many as fit, none of them cut.
    """

    HUB: ClassVar = "openai/gsm8k"

    kind: str = "gsm8k"
    shots: int = 8
    """How many examples, at most; a great number fills the length."""
    examples: str | None = None
    """A JSONL file to draw them from. None: of a path the same file, the sample's own row left out; of a
    dataset its part "train"."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check("shots", 1)

    def default_config(self) -> str | None:
        return "main" if self.dataset in (None, self.HUB) else None

    def convert(self, row: dict[str, Any]) -> Entry | None:
        question, answer = text_of(row, "question").strip(), text_of(row, "answer").strip()
        _, mark, number = answer.rpartition("####")
        if not mark or not number.strip():
            raise ValueError("the field 'answer' has no '#### number' at its end")
        return Entry(
            context=f"Question: {question}\nAnswer: {answer}",  # as an example for others
            question=f"\n\nQuestion: {question}\nAnswer:",
            answers=(number.strip(),),
            metric="gsm8k",
            max_new_tokens=256,
        )

    def sample(self, index: int, length: int | None, tokenizer: Any, seed: int = 0) -> Sample:
        """See `Task.sample`.

        Raises:
            InputError: there is no sample of that index, no example beside it, or not one fits.
        """
        entry = self.entry(index)
        others = [shown for shown in self._shown if shown.question != entry.question]
        rng = random.Random(f"gsm8k/{index}/{seed}")
        drawn = [one.context for one in rng.sample(others, min(self.shots, len(others)))]
        if not drawn:
            raise InputError(f"{self.name}: there is no row to take as an example; give examples=FILE.jsonl")
        room_new = self.max_new_tokens or entry.max_new_tokens
        made = replace(super().sample(index, None, tokenizer, seed), context="\n\n".join(drawn))
        if length is None:
            return made
        taken = room_new + count(tokenizer, made.question, special=False)
        while drawn:
            made = replace(made, context="\n\n".join(drawn))
            size = taken + count(tokenizer, made.context, special=True)
            if size <= length:
                return made
            drawn.pop()
        raise InputError(
            f"sample {index} of {self.name} takes {size} tokens with one example, the length is "
            f"{length}: give a longer one"
        )

    @cached_property
    def _shown(self) -> list[Entry]:
        if self.examples is not None:
            return replace(self, path=self.examples, dataset=None, examples=None).entries
        if self.path is None:
            return replace(self, split="train").entries
        return self.entries
