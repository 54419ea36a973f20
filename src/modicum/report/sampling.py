"""Sampling: from "policy@budget" to a trace on a sample of what was evaluated."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from modicum.errors import InputError
from modicum.evaluation.allowance import FULL, Allowance
from modicum.evaluation.row import Cell
from modicum.kv.registry import parse_policy
from modicum.report.results import OURS, Results
from modicum.report.trace import Trace, trace
from modicum.tasks.sample import Sample, Task


@dataclass(frozen=True)
class TracePlan:
    """One trace to be made."""

    cell: Cell
    index: int
    task: Task

    def run(self, model: Any, tokenizer: Any) -> Trace:
        """Make the sample again and trace it."""
        cell = self.cell
        sample: Sample = self.task.sample(self.index, cell.length, tokenizer, cell.seed)
        made = trace(
            model,
            tokenizer,
            sample.context,
            policy=cell.policy,
            budget=cell.budget,
            question=sample.question or None,
            chunk=cell.chunk,
            n_sink=4 if cell.n_sink is None else cell.n_sink,
            recent=32 if cell.recent is None else cell.recent,
            evict_every=cell.evict_every or 1,
            positions=cell.positions,
            store=cell.store,
        )
        return replace(made, model=cell.model, task=cell.task, sample=sample.index)


def parse_wish(text: str) -> tuple[str, str]:
    """Policy and budget of "policy@budget", each as an evaluation writes it.

    Raises:
        InputError, PolicyError, BudgetError: it is not that.
    """
    policy, at, budget = text.rpartition("@")
    if not at or not policy.strip() or not budget.strip():
        raise InputError(f"cannot read the trace {text!r}: write policy@budget, such as 'keydiff@25%'")
    return str(parse_policy(policy.strip())), Allowance.parse(budget).text


def plan_traces(
    results: Results, wishes: Sequence[tuple[str, str]], task: str | None = None, *, known: Task | None = None
) -> list[TracePlan]:
    """What to trace: one and the same sample under each policy and budget, with the settings of their rows.

    The sample is the first of the longest length of `task`, or of the first task. A policy and budget without
    rows of their own take the settings of other rows.

    Args:
        known: the task itself, where its name is not one that `parse_task` reads.

    Raises:
        InputError: no rows of ours on that task, or rows of several models.
    """
    rows = [row for row in results.rows if row.cell.system == OURS]
    models = list(dict.fromkeys((row.cell.model, row.cell.dtype) for row in rows))
    if not models:
        raise InputError("a trace needs rows that modicum itself made: give a folder of `modicum eval` first")
    if len(models) > 1:
        names = ", ".join(f"{model} ({dtype})" for model, dtype in models)
        raise InputError(f"a trace is of one model, the rows are of {names}: trace their folders one by one")
    tasks = list(dict.fromkeys(row.cell.task for row in rows))
    chosen = tasks[0] if task is None else task
    if chosen not in tasks:
        raise InputError(f"the task {chosen} has no rows: there are {', '.join(tasks)}")
    rows = [row for row in rows if row.cell.task == chosen]
    longest = max(row.cell.length or 0 for row in rows)
    rows = [row for row in rows if (row.cell.length or 0) == longest]
    evicting = [row for row in rows if row.cell.budget != FULL]
    source = known or _parsed(chosen)
    plans = []
    for policy, budget in wishes:
        own = [row for row in rows if (row.cell.policy, row.cell.budget) == (policy, budget)]
        cell = (own or evicting or rows)[0].cell
        plans.append(
            TracePlan(
                replace(cell, policy=policy, budget=budget, seed=rows[0].cell.seed), rows[0].index, source
            )
        )
    return plans


def _parsed(name: str) -> Task:
    from modicum.tasks import parse_task

    task: Task = next(iter(parse_task(name)))
    return task
