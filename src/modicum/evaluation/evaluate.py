"""Evaluate: run what of a grid has not been run, sample by sample, into a folder."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

from modicum.errors import InputError
from modicum.evaluation.fingerprint import fingerprint, sample_fingerprint
from modicum.evaluation.grid import HIDDEN, Grid
from modicum.evaluation.row import Cell, Row
from modicum.evaluation.runner import Metric, Prompt, Reading, cache_for, max_positions, run
from modicum.evaluation.store import Store
from modicum.tasks.sample import Sample, Task

Loader = Callable[..., tuple[Any, Any]]


@dataclass(frozen=True)
class Progress:
    """How far an evaluation is."""

    done: int
    """Rows there are, those of earlier runs included."""
    total: int
    seconds_left: float | None
    """Estimated from the rows of this run and their lengths; None before the first."""
    row: Row | None
    """The newest."""


def evaluate(
    grid: Grid,
    out: str | Path,
    *,
    tasks: Sequence[Task] | None = None,
    metrics: Mapping[str, Metric] | None = None,
    load: Loader | None = None,
    settings: Mapping[str, Any] | None = None,
    progress: Callable[[Progress], object] | None = None,
) -> list[Row]:
    """Run a grid into a folder and return its rows, those of earlier runs there included.

    Samples that the folder has are not run again, so a run that was killed goes on where it was, and a larger
    grid only adds. Everything is checked before the first sample: policies, budgets, tasks, lengths, and that
    the folder's rows are of the same models and version.

    Args:
        tasks: those to run; by default the ones that `grid.tasks` names.
        metrics: by name, for tasks of your own; by default `modicum.tasks.metrics.METRICS`.
        load: (name, dtype=...) -> model and tokenizer; `modicum.load` by default.
        settings: what else decides about the results without being in the grid; must be the same for all
            rows of a folder. Plain JSON values.
        progress: told after each row, and once before the first.

    Raises:
        ModicumError: what cannot be run, and the remedy.
        KeyboardInterrupt: Ctrl-C; what was done is in the folder.
    """
    chosen = _tasks(grid) if tasks is None else list(tasks)
    judges = _metrics(chosen, metrics)
    models = _Models(grid, load)
    with Store(out) as store:
        facts = {name: _check(grid, name, models, chosen, judges) for name in grid.models}
        store.admit(
            {f"{name} {fact.dtype}": fact.mark for name, fact in facts.items()},
            {name: mark for fact in facts.values() for name, mark in fact.samples.items()},
            grid.to_dict() | {"tasks": [task.name for task in chosen]},
            {"stop_at_newline": grid.stop_at_newline, "raw": grid.raw} | dict(settings or {}),
        )
        batches = [b for name in grid.models for b in _batches(grid, name, facts[name].dtype, chosen)]
        meter = _Meter(store, batches, progress)
        for batch in batches:
            cells = [cell for cell in batch.cells if batch.missing(store, cell)]
            if not cells:
                continue
            model, tokenizer = models.get(batch.cells[0].model)
            samples = {index: batch.sample(index, tokenizer) for index in batch.indices}
            prompts = {
                index: Prompt.of(sample, model, tokenizer, endless=grid.endless, raw=grid.raw)
                for index, sample in samples.items()
            }
            total = max(prompts[index].total(sample) for index, sample in samples.items())
            for cell in cells:
                reading: Reading | None = None
                for index in batch.missing(store, cell):
                    sample, prompt = samples[index], prompts[index]
                    shared = len(samples) > 1 and cell.question == HIDDEN
                    if shared and (reading is None or reading.tokens != prompt.before(cell)):
                        reading = Reading.of(model, prompt, cell, total)
                    row = run(
                        model,
                        tokenizer,
                        sample,
                        prompt,
                        cell,
                        judges[sample.metric],
                        stop_at_newline=grid.stop_at_newline,
                        reading=reading,
                    )
                    store.add(row)
                    meter.step(row, batch.weight)
        asked = {(cell, index) for batch in batches for cell in batch.cells for index in batch.indices}
        return [row for row in store.rows if (row.cell, row.index) in asked]


@dataclass(frozen=True)
class _Batch:
    """Samples of one context, and the cells that they are run in."""

    task: Task
    indices: tuple[int, ...]
    length: int | None
    seed: int
    cells: list[Cell]

    def sample(self, index: int, tokenizer: Any) -> Sample:
        return self.task.sample(index, self.length, tokenizer, self.seed)

    def missing(self, store: Store, cell: Cell) -> list[int]:
        """Those that the folder does not have."""
        return [index for index in self.indices if not store.has(cell, index)]

    @property
    def weight(self) -> int:
        """About in proportion to the time of a row."""
        return self.length or 1000


def _batches(grid: Grid, model: str, dtype: str, tasks: Sequence[Task]) -> Iterator[_Batch]:
    """A context's cells one after the other, so that what is there at any moment compares like with like."""
    for length in grid.lengths:
        for task in tasks:
            for indices in _contexts(task, min(grid.limit, len(task))):
                for seed in grid.seeds:
                    yield _Batch(task, indices, length, seed, grid.cells(model, dtype, task, length, seed))


def _contexts(task: Task, count: int) -> Iterator[tuple[int, ...]]:
    """The first `count` indices; together those that ask about one context."""
    per = getattr(task, "questions", 1)  # a user's own task need not say so
    for first in range(0, count, per):
        yield tuple(range(first, min(first + per, count)))


class _Meter:
    """Counts rows and estimates what is left."""

    def __init__(
        self, store: Store, batches: list[_Batch], tell: Callable[[Progress], object] | None
    ) -> None:
        self.tell = tell or (lambda _: None)
        missing = [b.weight for b in batches for cell in b.cells for _ in b.missing(store, cell)]
        self.total = sum(len(batch.cells) * len(batch.indices) for batch in batches)
        self.done, self.left, self.worked = self.total - len(missing), sum(missing), 0
        self.start = time.perf_counter()
        self.tell(Progress(self.done, self.total, None, None))

    def step(self, row: Row, weight: int) -> None:
        self.done, self.left, self.worked = self.done + 1, self.left - weight, self.worked + weight
        seconds = (time.perf_counter() - self.start) * self.left / self.worked
        self.tell(Progress(self.done, self.total, seconds, row))


class _Models:
    """Loads models by name, and holds one at a time."""

    def __init__(self, grid: Grid, load: Loader | None) -> None:
        from modicum.loading import load as load_model

        self.load, self.dtype = load or load_model, grid.dtype
        self.name: str | None = None
        self.pair: tuple[Any, Any] = (None, None)

    def get(self, name: str) -> tuple[Any, Any]:
        if name != self.name:
            self.pair = (None, None)  # before the next one comes
            self.pair = self.load(name, dtype=self.dtype)
            self.name = name
        return self.pair


@dataclass(frozen=True)
class _Facts:
    dtype: str
    mark: str
    """The fingerprint."""
    samples: dict[str, str]
    """Those of the tasks' first samples."""


def _check(
    grid: Grid, name: str, models: _Models, tasks: Sequence[Task], judges: Mapping[str, Metric | None]
) -> _Facts:
    """Refuse what could not be run, before anything is."""
    model, tokenizer = models.get(name)
    dtype = str(model.dtype).removeprefix("torch.")
    most = None if grid.endless else max_positions(model)
    for length in grid.lengths:
        if most is not None and length is not None and length > most:
            raise InputError(
                f"the length {length} is beyond the {most} positions of {name}: give lengths up to {most}"
            )
    samples = {}
    for task, length, seed in product(tasks, grid.lengths, grid.seeds):
        sample = task.sample(0, length, tokenizer, seed)
        Prompt.of(sample, model, tokenizer, endless=grid.endless, raw=grid.raw)
        judge = judges[sample.metric]
        if judge is not None:
            judge("", sample.answers)  # says what it lacks, if it lacks a package
        samples[f"{task.name}, length {length}, seed {seed}, {name}"] = sample_fingerprint(sample)
    for cell in grid.cells(name, dtype, tasks[0], grid.lengths[0], grid.seeds[0]):
        cache_for(model, cell, 1, 1)
    return _Facts(dtype, fingerprint(model, tokenizer), samples)


def _tasks(grid: Grid) -> list[Task]:
    from modicum.tasks import parse_task

    found = {task.name: task for text in grid.tasks for task in parse_task(text)}
    return list(found.values())


def _metrics(tasks: Sequence[Task], known: Mapping[str, Metric] | None) -> dict[str, Metric | None]:
    if known is None:
        from modicum.tasks.metrics import METRICS

        known = METRICS
    if not tasks:
        raise InputError("the grid has no tasks: give at least one")
    for task in tasks:
        if task.metric != "loss" and task.metric not in known:
            raise InputError(
                f"the task {task.name} asks for the metric {task.metric!r}: there are "
                f"{', '.join(sorted(known))} and loss"
            )
    return {**known, "loss": None}
