"""Rows of budgets.py: what each cell gave for each context, and tables of them."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common import table

from modicum.evaluation.summary import confidence

CHUNK = 512


@dataclass(frozen=True)
class Row:
    """What one cell gave for one context."""

    model: str
    length: int
    task: str
    haystack: str
    policy: str
    store: str
    budget: str
    context: int
    questions: int
    right: float
    """Answers of which every token ranked first."""
    nbytes: int
    """All that the cache holds."""
    full_nbytes: int
    """A full cache's, in 16 bits."""
    loss: float | None = None
    """Of the tokens of a long answer, mean, in nats."""
    tokens: float | None = None
    """Share of the answers' tokens that ranked first, each given those before it."""
    chunk: int = CHUNK
    """Tokens read at a time."""

    @property
    def cell(self) -> tuple[Any, ...]:
        """What is compared with other cells in a table."""
        return (self.policy, self.store, self.budget, self.chunk)

    @property
    def key(self) -> tuple[Any, ...]:
        return (
            self.model,
            self.length,
            self.task,
            self.haystack,
            self.policy,
            self.store,
            self.budget,
            self.chunk,
        )


def read(path: Path) -> list[Row]:
    """Rows of earlier calls."""
    return [Row(**json.loads(line)) for line in path.read_text().splitlines()] if path.exists() else []


def results(
    rows: Sequence[Row], tasks: Sequence[str], is_shown: Callable[[Row], bool], names: Mapping[str, str]
) -> str:
    """A table: right answers of each policy, store and chunk at each budget, and the bytes held.

    rows: of one model, length and haystack.
    tasks: in the order of the columns; those without a row are left out.
    names: shorter ones of some policies.
    """
    shown = [row for row in rows if is_shown(row)]
    columns = [task for task in tasks if any(row.task == task for row in shown)]
    lines = []
    for cell in dict.fromkeys(row.cell for row in shown):
        found = [row for row in shown if row.cell == cell]
        share = sum(r.nbytes for r in found) / sum(r.full_nbytes for r in found)
        first = found[0]
        name = f"`{names.get(first.policy, first.policy)}`"
        if first.chunk >= first.length:
            name += ", one shot"
        answers = [_right([r for r in found if r.task == task]) for task in columns]
        lines.append([name, first.store, first.budget, f"{share:.1%}", *answers])
    lines.sort(key=lambda line: (not line[0].startswith("`full`"), line[0], line[1], -float(line[3][:-1])))
    return table(["policy", "store", "budget", "bytes, of 16-bit", *columns], lines)


def _right(rows: list[Row]) -> str:
    """Answers right of those asked; the interval is over contexts."""
    if not rows:
        return "–"
    count, right = sum(row.questions for row in rows), sum(row.right for row in rows)
    low, high, _ = confidence([row.right / row.questions for row in rows])
    means = {}
    for name in ("tokens", "loss"):
        values = [getattr(row, name) for row in rows if getattr(row, name) is not None]
        if values:
            means[name] = sum(values) / len(values)
    said = f", tokens {means['tokens']:.0%}" if "tokens" in means else ""
    said += f", loss {means['loss']:.3f}" if "loss" in means else ""
    return f"{right:g} of {count} [{low:.0%}, {high:.0%}]{said}"
