"""RulerFile: samples that RULER's own scripts wrote, or that were put on the Hub."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from modicum.tasks.rows import Entry, Rows, text_of, texts_of

_QUESTIONS: dict[str, tuple[str, int]] = {
    r"What (?:is|are all) the special magic ": ("string_match_all", 128),
    r"Question: Find all variables that are assigned the value ": ("string_match_all", 30),
    r"Question: What are the \d+ most common words in the above list": ("string_match_all", 120),
    r"Question: Do not provide any explanation\. Please ignore the dots": ("string_match_all", 50),
    r"Answer the question based on the given documents\. Only give me the answer": ("string_match_part", 32),
}
"""How the question of each kind begins, how it is judged, and how many tokens are generated."""


@dataclass(frozen=True, kw_only=True)
class RulerFile(Rows):
    """RULER's rows: `input`, `outputs` and, of later versions, `answer_prefix`; the context ends where the
    question of RULER's wording begins. Or rows that have it apart: `context`, `question`, `answer_prefix`,
    `answer`."""

    kind: str = "ruler-file"
    task: str | None = None
    """Only rows whose field `task` says so."""

    def convert(self, row: dict[str, Any]) -> Entry | None:
        if self.task is not None and row.get("task") != self.task:
            return None
        answers = texts_of(
            row, next((name for name in ("outputs", "answer", "answers") if name in row), "outputs")
        )
        prefix = text_of(row, "answer_prefix") if row.get("answer_prefix") else ""
        if "context" in row and "question" in row:
            context = text_of(row, "context").rstrip("\n")
            question = "\n" + text_of(row, "question").lstrip("\n")
        else:
            whole = text_of(row, "input")
            places = [m.start() for p in _QUESTIONS for m in re.finditer(r"\s*" + p, whole)]
            if not places:
                raise ValueError("no question of RULER's wording in the field 'input'")
            context, question = whole[: max(places)], whole[max(places) :]
        prefix = prefix.rstrip(" ")
        question = (question + prefix).rstrip(" ")
        metric, new_tokens = next(
            (how for p, how in _QUESTIONS.items() if re.match(r"\s*" + p, question)),
            ("string_match_all", 128),
        )
        needles = _needles(context, answers)
        return Entry(context, question, answers, metric, new_tokens, needles, prefix)


def _needles(context: str, answers: tuple[str, ...]) -> tuple[tuple[int, int], ...]:
    """Where needles of RULER's wording give these answers."""
    found = []
    for answer in answers:
        needle = re.search(
            r"One of the special magic \w+ for [^:\n]* is: " + re.escape(answer) + r"\.", context
        )
        if needle:
            found.append(needle.span())
    return tuple(sorted(found))
