"""LongBench: its 21 sets, LongBench-E's 13, and LongBench v2.

The prompts, the lengths of answers and the metrics are the benchmarks' definitions: THUDM/LongBench,
LongBench/config/dataset2{prompt,maxlen}.json, LongBench/{pred,eval}.py, prompts/0shot.txt and pred.py (MIT;
arXiv 2308.14508 and 2412.15204), wordings and slips of the pen included. The context ends where the prompt
goes on after the document. Difference: no space ends a prompt.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

from modicum.errors import InputError
from modicum.tasks.prompts import PROMPTS
from modicum.tasks.rows import Entry, Rows, text_of, texts_of

SETS_E = (
    "qasper",
    "multifieldqa_en",
    "hotpotqa",
    "2wikimqa",
    "gov_report",
    "multi_news",
    "trec",
    "triviaqa",
    "samsum",
    "passage_count",
    "passage_retrieval_en",
    "lcc",
    "repobench-p",
)
"""The sets of LongBench-E, whose lengths are evenly spread."""


@dataclass(frozen=True, kw_only=True)
class LongBench(Rows):
    """Rows of `context`, `input`, `answers`, `dataset` and, for classes, `all_classes`.

    Without a path and a dataset it is THUDM/LongBench. `path` may be the folder of the benchmark's data.
    """

    HUB: ClassVar = "THUDM/LongBench"

    kind: str = "longbench"
    task: str | None = None
    """One of the sets, such as "qasper". None: each set in the folder (or of the benchmark), or what the rows
    of the file say in `dataset`."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.task is not None:
            self.among("task", self.sets)

    @property
    def sets(self) -> tuple[str, ...]:
        """The sets there are."""
        return SETS_E if self._e else tuple(PROMPTS)

    @property
    def metric(self) -> str:
        return super().metric if self.task is None else PROMPTS[self.task].metric

    def expanded(self) -> Iterator[LongBench]:
        """One task for each set that is meant."""
        if self.task is not None or (self.path is not None and not self._folder):
            yield self
            return
        found = [replace(self, task=name) for name in self.sets]
        if self.path is not None:
            found = [one for one in found if one.file.is_file()]
            if not found:
                raise InputError(
                    f"the folder {self.path!r} holds no set of {self.kind}, such as "
                    f"{self.sets[0]}{self._e}.jsonl; give the folder of the benchmark's data"
                )
        yield from found

    @property
    def file(self) -> Path:
        """The file that `path` stands for."""
        if self._folder and self.task is not None:
            return super().file / f"{self.task}{self._e}.jsonl"
        return super().file

    def default_config(self) -> str | None:
        return f"{self.task}{self._e}"

    def convert(self, row: dict[str, Any]) -> Entry | None:
        name = self.task or text_of(row, "dataset").removesuffix("_e")
        if name not in PROMPTS:
            raise ValueError(f"the field 'dataset' is {name!r}, which is no set of LongBench")
        prompt = PROMPTS[name]
        answers = texts_of(row, "answers")
        if prompt.metric == "classification":
            answers = (*answers, "", *texts_of(row, "all_classes"))
        return Entry(
            context=prompt.before + text_of(row, "context"),
            question=prompt.after.replace("{input}", text_of(row, "input")).rstrip(" "),
            answers=answers,
            metric=prompt.metric,
            max_new_tokens=prompt.max_new_tokens,
        )

    @property
    def _e(self) -> str:
        return "_e" if self.kind == "longbench-e" else ""

    @cached_property
    def _folder(self) -> bool:
        return self.path is not None and Path(self.path).expanduser().is_dir()


@dataclass(frozen=True, kw_only=True)
class LongBench2(Rows):
    """LongBench v2: multiple choice. Rows of `context`, `question`, `choice_A` to `choice_D` and `answer`.

    Without a path and a dataset it is THUDM/LongBench-v2.
    """

    HUB: ClassVar = "THUDM/LongBench-v2"

    kind: str = "longbench-v2"
    domain: str | None = None
    """Only rows of this domain, such as "Single-Document QA"."""
    difficulty: str | None = None
    """Only "easy" or "hard" rows."""
    size: str | None = None
    """Only "short", "medium" or "long" rows (the field `length`)."""

    def default_split(self) -> str:
        return "train"

    def convert(self, row: dict[str, Any]) -> Entry | None:
        wanted = {"domain": self.domain, "difficulty": self.difficulty, "length": self.size}
        if any(value is not None and row.get(name) != value for name, value in wanted.items()):
            return None
        answer = text_of(row, "answer").strip()
        if answer not in {"A", "B", "C", "D"}:
            raise ValueError(f"the field 'answer' is {answer!r}, not A, B, C or D")
        choices = "\n".join(f"({letter}) {text_of(row, f'choice_{letter}').strip()}" for letter in "ABCD")
        return Entry(
            context="Please read the following text and answer the question below.\n\n<text>\n"
            + text_of(row, "context").strip()
            + "\n</text>",
            question=f"\n\nWhat is the correct answer to this question: {text_of(row, 'question').strip()}\n"
            f"Choices:\n{choices}\n\n"
            'Format your response as follows: "The correct answer is (insert answer here)".',
            answers=(answer,),
            metric="multiple_choice",
            max_new_tokens=128,
        )
