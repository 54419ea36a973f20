"""Answers kept at a few percent of the bytes: calibrated head budgets and heads alike, in 16, 8 and 4 bits.

    python benchmarks/experiments/budgets.py --model smollm2 --minutes 60     # goes on where it stopped
    python benchmarks/experiments/budgets.py --model smollm2 --group scores --tasks keys
    python benchmarks/experiments/budgets.py --quick                          # writes nothing

The question is hidden, the prompt is read in chunks of 512, and all bytes held at the end of an answer count.
Contexts of all cells are taken in turns, so that whatever there is when the time is over compares like with
like. Rows are kept in --folder; a later call with the same folder adds to them and renews the page.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import re
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from common import DOCS, table

import modicum
from modicum.evaluation.evaluate import Progress, evaluate
from modicum.evaluation.grid import Grid
from modicum.evaluation.row import Row
from modicum.evaluation.store import Store
from modicum.evaluation.summary import Summary, summarise
from modicum.tasks import parse_task

Cell = tuple[str, str, tuple[str, ...]]
"""A policy, what its slots are stored in, and the budgets."""

AUTO: tuple[Cell, ...] = (
    ("full", "model", ("full",)),
    ("auto", "model", ("12.5%", "25%", "50%", "6.25%")),
    ("auto", "int8", ("12.5%", "6.25%")),
    ("auto", "int4", ("12.5%", "6.25%", "25%")),
)
SCORES = ("keydiff", "manifoldkv", "compactor(window=16)")
GROUPS: dict[str, tuple[Cell, ...]] = {
    "auto": AUTO,
    "scores": (
        ("full", "model", ("full",)),
        *((f"calibrated+{score}", "model", ("12.5%", "6.25%")) for score in SCORES),
        *((f"calibrated+{score}", "int4", ("12.5%", "6.25%")) for score in SCORES),
    ),
    "alike": tuple(
        (policy, "model", ("12.5%", "25%"))
        for policy in (*SCORES, "snapkv(window=16)", "razor(base=keydiff)", "streaming")
    ),
}
"""Settings that are compared with each other."""
TASKS = {
    "single": "niah_single_2:max_new_tokens=16",
    "keys": "niah_multikey_1:each=true,max_new_tokens=16",
    "eight": "niah_multikey_1:keys=8,each=true,max_new_tokens=16",
    "queries": "niah_multiquery:max_new_tokens=64",
}
"""RULER's single needle, one of four and one of eight keys (all asked for in turn), and four at once."""
RECENT = 16


class OutOfTimeError(Exception):
    """The minutes are over."""


@dataclass
class Clock:
    """Stops an evaluation between two rows."""

    end: float

    def __call__(self, progress: Progress) -> None:
        print(f"\r{progress.done} of {progress.total} rows", end="", file=sys.stderr, flush=True)
        if time.monotonic() > self.end:
            raise OutOfTimeError


def run(
    model: str,
    length: int,
    samples: int,
    folder: Path,
    minutes: float,
    cells: Sequence[Cell],
    tasks: Sequence[str],
) -> list[Row]:
    """Rows of all cells, context by context, until there are all or the time is over."""
    clock = Clock(time.monotonic() + 60 * minutes)
    load = functools.cache(modicum.load)  # one model for all the calls
    grids = [
        Grid(
            models=(model,),
            policies=(policy,),
            budgets=budgets,
            tasks=(TASKS[task],),
            lengths=(length,),
            recent=RECENT,
            store=store,
        )
        for task in tasks
        for policy, store, budgets in cells
    ]
    per = [parse_task(grid.tasks[0])[0].questions for grid in grids]  # type: ignore[attr-defined]  # needles
    with contextlib.suppress(OutOfTimeError):
        for done in range(0, samples, max(per)):
            for grid, questions in zip(grids, per, strict=True):
                limit = min(samples, done + max(per)) if questions == 1 else done + max(per)
                evaluate(replace(grid, limit=limit), folder, load=load, progress=clock)
    with Store(folder) as store_of_rows:
        return [row for row in store_of_rows.rows if (row.cell.model, row.cell.length) == (model, length)]


def results(rows: list[Row], model: str, length: int) -> str:
    """The page's table: right answers of each policy and store at each budget, and the bytes held."""
    by_cell: dict[tuple[str, str, str, str], Summary] = {}
    for s in summarise(rows, ("policy", "store", "budget", "task")):
        by_cell[s.key["policy"], s.key["store"], s.key["budget"], s.key["task"]] = s
    there = {row.cell.task for row in rows}
    names = {parse_task(text)[0].name: name for name, text in TASKS.items()}  # as rows have them
    tasks = [task for task in names if task in there]
    lines = []
    wide = 2 if any(row.cell.dtype == "float32" for row in rows) else 1
    for policy, store in dict.fromkeys((p, st) for p, st, _, _ in by_cell):
        for budget in dict.fromkeys(b for p, st, b, _ in by_cell if (p, st) == (policy, store)):
            cells = [by_cell.get((policy, store, budget, task)) for task in tasks]
            known = [cell for cell in cells if cell is not None]
            held = sum(cell.held_bytes for cell in known) / sum(cell.full_bytes for cell in known)
            if store != "model":
                held *= wide  # the full cache in 16 bits
            shown = [_right(cell) for cell in cells]
            lines.append([f"`{policy}`", store, budget, f"{held:.1%}", *shown])
    head = ["policy", "store", "budget", "bytes, of 16-bit", *(names[task] for task in tasks)]
    return f"**{model}**, {length} tokens:\n\n{table(head, lines)}"


def _right(cell: Summary | None) -> str:
    if cell is None:
        return "–"
    return f"{round(cell.score * cell.count)} of {cell.count} [{cell.low:.0%}, {cell.high:.0%}]"


def put_results(page: Path, name: str, text: str) -> None:
    """Renew one section of the page."""
    begin, end = f"<!-- {name}: begin -->", f"<!-- {name}: end -->"
    written = page.read_text(encoding="utf-8")
    if begin not in written:
        raise SystemExit(f"{page} has no section {name}")
    section = re.compile(f"{re.escape(begin)}.*?{re.escape(end)}", re.DOTALL)
    page.write_text(section.sub(lambda _: f"{begin}\n\n{text}\n\n{end}", written), encoding="utf-8")


def main() -> None:
    """Run, and renew the page."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0] if __doc__ else None)
    parser.add_argument("--model", default="reference")
    parser.add_argument("--length", type=int, default=1024)
    parser.add_argument("--group", default="auto", choices=sorted(GROUPS))
    parser.add_argument("--tasks", nargs="+", default=["single", "keys"], choices=sorted(TASKS))
    parser.add_argument("--samples", type=int, default=52, help="of each cell")
    parser.add_argument("--minutes", type=float, default=60, help="stop after so many; a later run goes on")
    parser.add_argument("--folder", type=Path, default=Path("results/budgets"), help="of the rows")
    parser.add_argument("--quick", action="store_true", help="few samples; prints and writes nothing")
    asked = parser.parse_args()
    cells = GROUPS[asked.group]
    if asked.quick:
        with tempfile.TemporaryDirectory() as folder:
            rows = run(asked.model, asked.length, 2, Path(folder), asked.minutes, cells, asked.tasks)
            print(results(rows, asked.model, asked.length))
        return
    rows = run(asked.model, asked.length, asked.samples, asked.folder, asked.minutes, cells, asked.tasks)
    text = results(rows, asked.model, asked.length)
    print(text)
    put_results(DOCS / "budgets.md", f"{asked.model} {asked.length}", text)


if __name__ == "__main__":
    main()
