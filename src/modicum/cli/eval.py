"""`modicum eval`: accuracy of policies at budgets, on tasks, against the bytes that they hold."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from modicum.cli.console import complain, load, print_json, print_table
from modicum.cli.options import (
    DeviceOption,
    DtypeOption,
    EvictEveryOption,
    JsonOption,
    PositionsOption,
    RecentOption,
    SinkOption,
    StoreOption,
)
from modicum.errors import InputError

if TYPE_CHECKING:
    from modicum.evaluation.evaluate import Progress
    from modicum.evaluation.grid import Grid
    from modicum.evaluation.summary import Summary
    from modicum.tasks.sample import Task

_QUIET_SECONDS = 60  # between two lines of progress where stderr is no terminal
_SHOWN = ("model", "task", "length", "question", "policy", "budget", "chunk", "seed", "dtype")


def evaluate(
    policy: Annotated[
        str,
        typer.Option("--policy", "-p", help="Policies, such as 'keydiff,caote+snapkv'; full is no eviction."),
    ],
    task: Annotated[str, typer.Option("--task", "-t", help="Tasks, such as 'niah_single_2,vt'.")],
    out: Annotated[
        Path,
        typer.Option("--out", "-o", help="Folder of results; what it has is not run again.", metavar="DIR"),
    ],
    budget: Annotated[
        str,
        typer.Option(
            "--budget",
            "-b",
            help="Tokens per KV head (256), sizes (64MiB), shares of the context (25%), or full.",
        ),
    ] = "25%",
    model: Annotated[
        str,
        typer.Option("--model", "-m", help="Folders, names on the Hub, or embedded models.", metavar="NAMES"),
    ] = "reference",
    length: Annotated[
        str | None,
        typer.Option("--length", "-l", help="Tokens of a sample; left out, as many as the task's data has."),
    ] = None,
    question: Annotated[
        str,
        typer.Option(
            "--question", "-q", help="hidden: the context is compressed before the question is known; seen."
        ),
    ] = "hidden",
    haystack: Annotated[
        Path | None,
        typer.Option(
            help="A text or a folder of texts to hide needles in; else the sample text.", metavar="PATH"
        ),
    ] = None,
    limit: Annotated[int, typer.Option("--limit", "-n", help="Samples of each task and length.")] = 20,
    seed: Annotated[str, typer.Option(help="Of the samples.")] = "0",
    chunk: Annotated[str, typer.Option(help="Tokens taken in at a time, or all.")] = "512",
    n_sink: SinkOption = 4,
    recent: RecentOption = 32,
    evict_every: EvictEveryOption = 1,
    positions: PositionsOption = "original",
    store: StoreOption = "model",
    stop_at_newline: Annotated[
        bool, typer.Option("--stop-at-newline", help="End answers at the first line break.")
    ] = False,
    raw: Annotated[
        bool, typer.Option("--raw", help="Read samples as they are, without the model's chat template.")
    ] = False,
    dtype: DtypeOption = "auto",
    device: DeviceOption = "auto",
    as_json: JsonOption = False,
) -> None:
    """Measure what policies cost in accuracy and save in bytes.

    Several values of an option are separated by commas, and every combination is run. Each sample's row goes
    to rows.jsonl in the folder at once: run the same command again after Ctrl-C or a kill and it goes on, or
    with more values and only those are added.
    """
    from modicum.evaluation.grid import Grid

    tasks = _tasks(task, haystack)
    grid = Grid(
        models=tuple(split(model)),
        policies=tuple(split(policy)),
        budgets=tuple(split(budget)),
        tasks=tuple(one.name for one in tasks),
        lengths=(None,) if length is None else tuple(numbers("length", length)),
        questions=tuple(split(question)),
        seeds=tuple(numbers("seed", seed)),
        limit=limit,
        chunk=None if chunk.strip().lower() == "all" else numbers("chunk", chunk, several=False)[0],
        n_sink=n_sink,
        recent=recent,
        evict_every=evict_every,
        positions=positions,
        store=store,
        dtype=dtype,
        stop_at_newline=stop_at_newline,
        raw=raw,
    )
    summaries = _run(grid, tasks, out, device)
    if as_json:
        print_json({"out": str(out), "rows": sum(s.count for s in summaries), "cells": _plain(summaries)})
    else:
        _table(summaries)


def _run(grid: Grid, tasks: list[Task], out: Path, device: str) -> list[Summary]:
    from modicum.evaluation.evaluate import evaluate as run_grid
    from modicum.evaluation.summary import summarise

    def load_model(name: str, dtype: str) -> tuple[Any, Any]:
        return load(name, dtype, device)

    with _meter() as tell:
        try:
            rows = run_grid(grid, out, tasks=tasks, load=load_model, progress=tell)
        except KeyboardInterrupt:
            complain(f"what was done is in {out}: run the same command again to go on")
            raise
    return summarise(rows)


def _tasks(text: str, haystack: Path | None) -> list[Task]:
    """The tasks of a text, each once; their running text is that of `haystack`, if given."""
    from modicum.tasks import parse_task

    tasks: list[Any] = parse_task(text)
    if haystack is not None:
        takes = [getattr(one, "hay", None) == "essay" and one.haystack is None for one in tasks]
        if not any(takes):
            raise InputError(f"--haystack: none of {text} has running text to take from there; leave it out")
        tasks = [
            replace(one, haystack=str(haystack)) if wants else one
            for one, wants in zip(tasks, takes, strict=True)
        ]
    return list({one.name: one for one in tasks}.values())


def split(text: str) -> list[str]:
    """Values between commas, but for those in brackets or quotes, or before a setting: "vt:a=2,b=1"."""
    parts, depth, quote = [""], 0, ""
    for mark in text:
        if mark == "," and not depth and not quote:
            parts.append("")
            continue
        parts[-1] += mark
        if quote:
            quote = "" if mark == quote else quote
        elif mark in "\"'":
            quote = mark
        else:
            depth += (mark in "([{") - (mark in ")]}")
    values: list[str] = []
    for part in map(str.strip, parts):
        if values and re.match(r"\w+\s*=", part):
            values[-1] += "," + part
        elif part:
            values.append(part)
    return values


def numbers(name: str, text: str, several: bool = True) -> list[int]:
    """Whole numbers between commas."""
    found = split(text)
    if not found or not all(re.fullmatch(r"[-+]?\d+", value) for value in found) or len(found) > 1 > several:
        wanted = "whole numbers, as in 1024,2048" if several else "a whole number, or all"
        raise InputError(f"--{name} is {text!r}: give {wanted}")
    return [int(value) for value in found]


@contextmanager
def _meter() -> Iterator[Callable[[Progress], None]]:
    """A bar on stderr, or a line now and then where that is no terminal."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn
    from rich.progress import Progress as Bar

    console = Console(stderr=True)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[left]}"),
    )
    last = time.monotonic()
    with Bar(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        shown = bar.add_task("loading", total=None, left="")

        def tell(progress: Progress) -> None:
            nonlocal last
            left = "" if progress.seconds_left is None else f"about {duration(progress.seconds_left)} left"
            cell = progress.row.cell if progress.row else None
            text = f"{cell.task} {cell.policy}" if cell else "evaluating"
            bar.update(shown, description=text, total=progress.total, completed=progress.done, left=left)
            if not console.is_terminal and time.monotonic() - last >= _QUIET_SECONDS:
                last = time.monotonic()
                complain(f"{progress.done:,} of {progress.total:,} rows, {left}")

        yield tell


def duration(seconds: float) -> str:
    """A time for people: 45 s, 12 min, 3.4 h."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def _plain(summaries: list[Summary]) -> list[dict[str, Any]]:
    return [summary.to_dict() for summary in summaries]


def _table(summaries: list[Summary]) -> None:
    """What all cells share goes into the title."""
    from modicum.kv.budget import format_size

    def shown(summary: Summary, name: str) -> str:
        value = summary.key[name]
        return {"chunk": "all", "length": "all"}.get(name, "–") if value is None else str(value)

    varying = [name for name in _SHOWN if len({shown(s, name) for s in summaries}) > 1]
    fixed = [f"{name} {shown(summaries[0], name)}" for name in _SHOWN if name not in varying]
    rows = []
    for s in summaries:
        low, high = s.held_tokens
        rows.append(
            [
                *(shown(s, name) for name in varying),
                _score(s),
                str(s.count),
                f"{low:,.0f}" if low == high else f"{low:,.0f} to {high:,.0f}",
                f"{format_size(int(s.held_bytes))}, {s.held_bytes / s.full_bytes:.0%}",
                format_size(int(s.peak_bytes)),
                f"{s.prefill_seconds:.2f}",
                f"{s.decode_seconds:.2f}",
            ]
        )
    columns = ["score (95 %)", "n", "tokens held", "held, of full", "peak", "prefill s", "decode s"]
    print_table([*varying, *columns], rows, title=", ".join(fixed))


def _score(s: Summary) -> str:
    if s.metric == "loss":
        return f"{s.score:.3f} nats ({s.low:.3f} to {s.high:.3f})"
    return f"{s.score:.1%} ({100 * s.low:.1f} to {100 * s.high:.1f})"
