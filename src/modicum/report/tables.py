"""Tables: what rows came to, for people (text) and for programs (CSV)."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from modicum.evaluation.allowance import FULL
from modicum.kv.budget import format_size
from modicum.report.points import Point, pareto
from modicum.report.results import Results, View, budget_order


@dataclass(frozen=True)
class Cell:
    """What is shown, and what is written to CSV."""

    text: str
    value: Any
    note: str = ""
    """Smaller, behind the text."""
    order: float | None = None
    """What it is sorted by, where that is not the value."""

    @property
    def number(self) -> float | None:
        """What it is sorted by as a number; None to sort by the text."""
        return self.value if self.order is None and isinstance(self.value, int | float) else self.order


@dataclass(frozen=True)
class Table:
    """Columns and rows."""

    name: str
    """Of its CSV file, without the ending."""
    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]
    extra: tuple[tuple[str, tuple[Any, ...]], ...] = ()
    """Columns for the CSV only."""

    def csv(self) -> str:
        """Comma-separated, with a header; numbers in full."""
        file = io.StringIO()
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow([*self.columns, *(name for name, _ in self.extra)])
        for index, row in enumerate(self.rows):
            writer.writerow([*(cell.value for cell in row), *(values[index] for _, values in self.extra)])
        return file.getvalue()


def by_task(results: Results, *, loss: bool) -> Table | None:
    """Policy × budget × task × length, with intervals, bytes and times; None where there is nothing."""
    found = [(view, s) for view in results.views for s in view.strata if s.loss is loss]
    if not found:
        return None
    rows = []
    for view, s in found:
        m = s.summary
        low, high = m.held_tokens
        per_second = m.new_tokens / m.decode_seconds if m.decode_seconds > 0 else math.nan
        rows.append(
            (
                Cell(s.series, s.series),
                _budget(s.budget),
                Cell(s.task, s.task),
                Cell(f"{s.length:,}" if s.length else "as it is", s.length or 0),
                *(() if loss else (Cell(view.question, view.question),)),
                Cell(f"{view.model}", view.model, view.dtype),
                Cell(f"{m.count:,}", m.count),
                *_score(m.score, m.low, m.high, loss),
                Cell(
                    f"{low:,.0f}" if round(low) == round(high) else f"{low:,.0f}–{high:,.0f}",
                    (low + high) / 2,
                ),
                Cell(size(m.context_bytes), m.context_bytes, f"{m.context_bytes / m.full_bytes:.0%}"),
                Cell(size(m.peak_bytes), m.peak_bytes),
                Cell(seconds(m.prefill_seconds), m.prefill_seconds),
                Cell(seconds(m.decode_seconds), m.decode_seconds),
                Cell("–" if math.isnan(per_second) else f"{per_second:,.3g}", per_second),
            )
        )
    return Table(
        name="loss" if loss else "scores",
        title="Loss and perplexity by text" if loss else "Every policy, budget, task and length",
        columns=(
            "policy",
            "budget",
            "task",
            "length",
            *(() if loss else ("question",)),
            "model",
            "samples",
            *(("loss (nats)", "perplexity") if loss else ("score",)),
            "tokens held",
            "bytes held",
            "peak bytes",
            "prefill (s)",
            "decode (s)",
            "tokens/s",
        ),
        rows=tuple(rows),
        extra=(
            ("low", tuple(s.summary.low for _, s in found)),
            ("high", tuple(s.summary.high for _, s in found)),
            ("interval", tuple(s.summary.interval for _, s in found)),
            ("full bytes", tuple(s.summary.full_bytes for _, s in found)),
            ("nominal bytes", tuple(s.nominal for _, s in found)),
        ),
    )


def overview(view: View, found: Sequence[Point], axis: str, name: str) -> Table:
    """Means over tasks; marks what is on the Pareto front. found: not empty, of one view."""
    front = {p.name for p in pareto(found, axis)}
    loss = found[0].loss
    best = sorted(found, key=lambda p: p.score if loss else -p.score)
    return Table(
        name=name,
        title="Means",
        columns=(
            "policy",
            "budget",
            *(("loss (nats)", "perplexity") if loss else ("score",)),
            "bytes held",
            "peak bytes",
            "samples",
            "Pareto",
        ),
        rows=tuple(
            (
                Cell(p.series, p.series),
                _budget(p.budget),
                *_score(p.score, p.low, p.high, loss),
                Cell(size(p.held), p.held, f"{p.held / p.full_bytes:.0%}"),
                Cell(size(p.peak), p.peak, f"{p.peak / p.full_bytes:.0%}"),
                Cell(f"{p.count:,}", p.count),
                Cell("on the front" if p.name in front else "", int(p.name in front)),
            )
            for p in best
        ),
        extra=(("low", tuple(p.low for p in best)), ("high", tuple(p.high for p in best))),
    )


def size(nbytes: float) -> str:
    """Bytes for people, three figures at most."""
    text, unit = format_size(round(nbytes)).split()
    return f"{float(text):.0f} {unit}" if len(text) > 4 or text.endswith(".0") else f"{text} {unit}"


def seconds(value: float) -> str:
    """A time in seconds, to what can be told apart."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def _budget(text: str) -> Cell:
    """Sorted by kind, then by size."""
    kind, amount = budget_order(text)
    shown = "–" if text == FULL else f"{int(text):,} tokens" if text.isdigit() else text
    return Cell(shown, text, order=100 * kind + math.log1p(amount))


def _score(score: float, low: float, high: float, loss: bool) -> tuple[Cell, ...]:
    if loss:
        # Beyond e^700 there is no float; and no one asks.
        return (
            Cell(f"{score:.3f}", score, f"{low:.3f}–{high:.3f}"),
            Cell(f"{math.exp(min(score, 700)):,.2f}", math.exp(min(score, 700))),
        )
    return (Cell(f"{score:.1%}".replace("%", " %"), score, f"{100 * low:.1f}–{100 * high:.1f}"),)
