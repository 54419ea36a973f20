"""Grid: what an evaluation runs: models × policies × budgets × tasks × lengths × question modes × seeds."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

from modicum.errors import InputError
from modicum.evaluation.allowance import FULL, Allowance
from modicum.evaluation.row import Cell
from modicum.kv.budget import Budget
from modicum.kv.registry import parse_policy
from modicum.kv.store import Store
from modicum.kv.turning import check_numbering
from modicum.tasks.sample import Task

HIDDEN, SEEN = "hidden", "seen"


@dataclass(frozen=True)
class Grid:
    """The settings of an evaluation; checked, and written the one way that equal ones share.

    Raises:
        InputError, PolicyError, BudgetError: a value that cannot be used, with the remedy.
    """

    models: tuple[str, ...]
    """Names for `modicum.load`."""
    policies: tuple[str, ...]
    """Policy expressions; "full" is the whole cache, run once however many budgets there are."""
    budgets: tuple[str, ...]
    """"256" tokens per KV head, "64MiB", "25%" of the context, or "full"."""
    tasks: tuple[str, ...]
    """Task expressions, as `modicum.tasks` reads them."""
    lengths: tuple[int | None, ...] = (None,)
    """Most tokens of context, question and answer together; None: as long as the data has it."""
    questions: tuple[str, ...] = (HIDDEN,)
    """"hidden": the context is compressed before the question is known; "seen": both together."""
    seeds: tuple[int, ...] = (0,)
    limit: int = 20
    """Samples per cell, or as many as the task has."""
    chunk: int | None = 512
    """Tokens taken in at a time; None for all at once."""
    n_sink: int = 4
    recent: int = 32
    evict_every: int = 1
    positions: str = "original"
    """Or "renumbered", as `BudgetCache` has them."""
    store: str = "model"
    """Or "int8", "fp8", "k8v4" or "int4", for the full cache too."""
    dtype: str = "auto"
    """Of the weights; "auto" for what the model was saved in."""
    stop_at_newline: bool = False
    """End answers at the first line break; benchmarks end them at end-of-sequence or their length."""
    raw: bool = False
    """Read samples as they are, without the model's chat template."""

    def __post_init__(self) -> None:
        def keep(name: str, values: Iterable[Any]) -> None:
            unique = tuple(dict.fromkeys(values))
            if not unique:
                raise InputError(f"the grid has no {name}: give at least one")
            object.__setattr__(self, name, unique)

        keep("models", self.models)
        keep("policies", (str(parse_policy(text)) for text in self.policies))
        keep("budgets", (Allowance.parse(text).text for text in self.budgets))
        keep("tasks", self.tasks)
        keep("lengths", (_length(value) for value in self.lengths))
        keep("questions", (_question(value) for value in self.questions))
        keep("seeds", (_whole("seed", value, 0) for value in self.seeds))
        _whole("limit", self.limit, 1)
        check_numbering(self.positions)
        store = Store(self.store)
        for text in self.policies:
            store.check_policy(parse_policy(text))
        Budget(
            nbytes=1,
            chunk=512 if self.chunk is None else self.chunk,
            n_sink=self.n_sink,
            recent=self.recent,
            evict_every=self.evict_every,
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self)

    @property
    def endless(self) -> bool:
        """Whether samples may be longer than the model's positions: what is held never gets there."""
        return self.positions == "renumbered" and all(FULL not in pair for pair in self.settings())

    def settings(self) -> list[tuple[str, str]]:
        """Pairs of policy and budget: the full cache first and once, if it is asked for at all."""
        pairs = [
            (FULL, FULL) if FULL in (policy, budget) else (policy, budget)
            for policy in self.policies
            for budget in self.budgets
        ]
        return sorted(dict.fromkeys(pairs), key=lambda pair: pair != (FULL, FULL))

    def cells(self, model: str, dtype: str, task: Task, length: int | None, seed: int) -> list[Cell]:
        """The cells that share their samples."""
        # Without a question there is nothing to hide.
        modes = (HIDDEN,) if task.metric == "loss" else self.questions
        made = []
        for mode in modes:
            for policy, budget in self.settings():
                evicts = budget != FULL
                made.append(
                    Cell(
                        system="modicum",
                        model=model,
                        policy=policy,
                        budget=budget,
                        task=task.name,
                        length=length,
                        question=mode,
                        chunk=self.chunk,
                        seed=seed,
                        dtype=dtype,
                        n_sink=self.n_sink if evicts else None,
                        recent=self.recent if evicts else None,
                        evict_every=self.evict_every if evicts else None,
                        positions=self.positions if evicts else "original",
                        store=self.store,
                    )
                )
        return made


def _whole(name: str, value: Any, least: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise InputError(f"{name} is {value!r}: it must be a whole number of at least {least}")
    return value


def _length(value: Any) -> int | None:
    return None if value is None else _whole("length", value, 1)


def _question(value: Any) -> str:
    if value not in (HIDDEN, SEEN):
        raise InputError(f"the question mode is {value!r}: it is {HIDDEN!r} or {SEEN!r}")
    return str(value)
