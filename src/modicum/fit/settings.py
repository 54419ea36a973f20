"""Settings: what a model must fit into, and how the choice is made."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass

from modicum.errors import BudgetError, InputError
from modicum.fit.weight_option import DENSE, WeightOption
from modicum.kv.budget import parse_size
from modicum.kv.store import STORES
from modicum.weights.plan import plan

_SEEDS = 2**62
"""Below it: what torch's generators take, with room for what is added."""
METHODS = ("wanda", "sparsegpt", "alps")
TASKS = "niah_single_2:max_new_tokens=24,niah_multikey_1:keys=8,each=true,max_new_tokens=24"
"""Questions that a fitted model should still answer; each needle stands in the user's own text: those that
are measured on in what is held back, those that are learned from in the rest."""


@dataclass(frozen=True)
class Target:
    """What the weights and the cache must fit into.

    Attributes:
        memory: bytes, or a size such as "64MiB", of the weights as a run holds them and the cache between
            calls. Activations, the chunk in hand and the program come on top.
        context: tokens of the longest text that is read, with its question and answer.
        batch: sequences at a time; each has a cache of its own.

    Raises:
        InputError: a value out of range.
    """

    memory: int | str
    context: int = 8192
    batch: int = 1

    def __post_init__(self) -> None:
        object.__setattr__(self, "memory", _bytes(self.memory))
        for name in ("context", "batch"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise InputError(f"{name} is {value!r}: give a whole number of at least 1")

    @property
    def nbytes(self) -> int:
        """The memory in bytes."""
        assert isinstance(self.memory, int)
        return self.memory


@dataclass(frozen=True)
class FitSettings:
    """How block errors are measured and what may be chosen.

    Attributes:
        weights: what each part of a layer may be: "dense", a sparsity such as "60%", or "2:4".
        stores: forms of the cache's slots that may be chosen (see `modicum.kv.store`).
        policy: of the cache; None for "auto", which divides slots by the calibrated head profile.
        method: how weights are pruned: "wanda" and "sparsegpt" with kept weights solved for, or "alps".
        tasks: generated questions that are asked of the text, as `modicum.tasks` reads them; "" for none.
        task_share: weight of the answers' error against that of running text, 0 to 1; also the share of
            calibration sequences that are questions.
        sequences: calibration sequences, for the pruning.
        length: tokens of each, and of the probes that single parts are measured on; less where the model's
            context is shorter.
        probes: texts of running text, and as many with questions, that errors are measured on.
        probe_length: tokens of those that caches and assembled models are measured on; at most the context.
        samples: assembled models that the predictor is fitted to and checked on.
        candidates: assembled models that are measured before one is taken.
        seed: of texts, questions and samples.

    Raises:
        InputError: a value out of range, or a name that is not known.
    """

    weights: tuple[str, ...] = (DENSE, "50%", "60%", "70%", "2:4")
    stores: tuple[str, ...] = ("model", "int8", "k8v4", "int4")
    policy: str = "auto"
    method: str = "wanda"
    tasks: str = TASKS
    task_share: float = 0.5
    sequences: int = 64
    length: int = 512
    probes: int = 4
    probe_length: int = 2048
    samples: int = 15
    candidates: int = 6
    seed: int = 0

    def __post_init__(self) -> None:
        for name, least in (
            ("sequences", 1),
            ("length", 2),
            ("probes", 1),
            ("probe_length", 64),
            ("samples", 0),
            ("candidates", 1),
        ):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise InputError(f"{name} is {value!r}: give a whole number of at least {least}")
        if not 0 <= self.seed < _SEEDS:
            raise InputError(f"seed is {self.seed}: give a whole number from 0 to {_SEEDS - 1:,}")
        if not 0 <= self.task_share <= 1:
            raise InputError(f"task_share is {self.task_share}: give a number from 0 to 1")
        if self.method not in METHODS:
            raise InputError(f"method is {self.method!r}; choose one of {', '.join(METHODS)}")
        unknown = [name for name in self.stores if name not in STORES]
        if unknown or not self.stores:
            raise InputError(f"stores are {self.stores!r}; choose some of {', '.join(STORES)}")
        self.options()  # checks them

    def options(self) -> tuple[WeightOption, ...]:
        """What the weights of a part of a layer may be."""
        found = tuple(WeightOption.parse(text) for text in self.weights)
        if not found:
            raise InputError(f"weights names no option: give some of {DENSE}, 50%, 2:4")
        if len({option.name for option in found}) < len(found):
            raise InputError(f"weights are {self.weights!r}: name each option once")
        for option in found:
            if not option.is_dense:
                self.pruning(option)
        return found

    def pruning(self, option: WeightOption) -> object:
        """How an option's weights are made: a `modicum.weights.plan.Plan`."""
        return plan(
            self.method,
            None,
            option.sparsity,
            option.pattern,
            update="obs" if self.method == "sparsegpt" else "lsq",
        )


def _bytes(value: int | str) -> int:
    found = value
    if isinstance(value, str):
        with suppress(BudgetError):
            found = parse_size(f"{value} B" if value.strip().isdecimal() else value)
    if isinstance(found, bool) or not isinstance(found, int) or found < 1:
        raise InputError(f"memory is {value!r}: give a size such as '64MiB', or bytes")
    return found
