"""HaystackQuestions: generated questions whose needles stand in a given text."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from modicum.distill.sequences import Questions
from modicum.tasks.sample import Task


@dataclass(frozen=True)
class HaystackQuestions(Questions):
    """Questions to learn from.

    Attributes:
        haystack: the text, for tasks that take one and name none.
    """

    haystack: Path

    def parse(self) -> list[Task]:
        """The tasks.

        Raises:
            InputError: one is not known, or asks nothing.
        """
        return [in_haystack(task, self.haystack) for task in super().parse()]


def in_haystack(task: Any, haystack: Path | None) -> Any:
    """A task with its needles in a text, if it takes one and names none; None leaves it as it is."""
    if haystack is None or getattr(task, "haystack", "") is not None:
        return task
    return replace(task, haystack=str(haystack))
