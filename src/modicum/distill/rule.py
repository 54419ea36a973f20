"""Rules: which classes of a frame or token are kept.

Yang et al. 2019 (arXiv 1906.10834) distil "the essence" of the soft labels; the abstract does not say by
which rule it is selected. These three are ours.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from modicum.distill.essence import Essence
from modicum.errors import InputError


class Rule(Protocol):
    """Selects classes."""

    def check(self, num_classes: int) -> None:
        """Raise if it cannot be used with so many classes.

        Raises:
            InputError: it keeps more classes than there are.
        """

    def select(self, probabilities: Tensor) -> Essence:
        """Select from probabilities [N, C], floating point, each row summing to 1.

        Raises:
            InputError: as `check`, or a probability is not a number.
        """


@dataclass(frozen=True)
class TopK:
    """Keep the k most probable classes.

    Raises:
        InputError: k is below 1.
    """

    k: int

    def __post_init__(self) -> None:
        if self.k < 1:
            raise InputError(f"k is {self.k}, and a frame keeps at least one class: give k of 1 or more")

    def __str__(self) -> str:
        return f"topk={self.k}"

    def check(self, num_classes: int) -> None:
        if self.k > num_classes:
            raise InputError(
                f"{self} keeps more classes than the {num_classes:,} there are: give k of at most "
                f"{num_classes}"
            )

    def select(self, probabilities: Tensor) -> Essence:
        _check(probabilities)
        self.check(probabilities.shape[-1])
        values, classes = probabilities.topk(self.k, -1)
        counts = torch.full((len(values),), self.k, device=values.device)
        return Essence(classes, values, counts, probabilities.shape[-1])


@dataclass(frozen=True)
class Threshold:
    """Keep the classes whose probability is at least p, and always the most probable one.

    Raises:
        InputError: p is not above 0 and at most 1.
    """

    p: float

    def __post_init__(self) -> None:
        if not 0 < self.p <= 1:
            raise InputError(f"the threshold is {self.p}: give a probability above 0 and at most 1")

    def __str__(self) -> str:
        return f"threshold={float(self.p)!r}"

    def check(self, num_classes: int) -> None:
        """Any number of classes will do."""

    def select(self, probabilities: Tensor) -> Essence:
        _check(probabilities)
        return _first(probabilities, (probabilities >= self.p).sum(-1).clamp_min(1))


@dataclass(frozen=True)
class Mass:
    """Keep the smallest set of classes whose probabilities sum to at least m.

    Raises:
        InputError: m is not above 0 and at most 1.
    """

    m: float

    def __post_init__(self) -> None:
        if not 0 < self.m <= 1:
            raise InputError(f"the mass is {self.m}: give a probability above 0 and at most 1")

    def __str__(self) -> str:
        return f"mass={float(self.m)!r}"

    def check(self, num_classes: int) -> None:
        """Any number of classes will do."""

    def select(self, probabilities: Tensor) -> Essence:
        _check(probabilities)
        # In float64, so that the sum of many small numbers does not stop short of m.
        captured = probabilities.double().sort(-1, descending=True).values.cumsum(-1)
        counts = (captured < self.m).sum(-1) + 1
        return _first(probabilities, counts.clamp_max(probabilities.shape[-1]))


_KINDS = {"topk": TopK, "threshold": Threshold, "mass": Mass}


def parse_rule(text: str) -> Rule:
    """A rule from "topk=16", "threshold=0.01" or "mass=0.95".

    Raises:
        InputError: the name is not known, or the number is none or out of range.
    """
    name, _, value = text.strip().partition("=")
    if name not in _KINDS:
        raise InputError(
            f"keep is {text!r}; give topk=16, threshold=0.01 or mass=0.95, with a number of your own"
        )
    number = int if name == "topk" else float
    try:
        parsed = number(value)
    except ValueError as error:
        kind = "a whole number" if name == "topk" else "a number"
        raise InputError(f"keep is {text!r}, and {value!r} is not {kind}: give one, as in topk=16") from error
    if name == "topk":
        return TopK(int(parsed))
    return Threshold(parsed) if name == "threshold" else Mass(parsed)


def _check(probabilities: Tensor) -> None:
    if probabilities.dim() != 2 or not probabilities.is_floating_point() or not probabilities.shape[-1]:
        raise InputError(
            f"probabilities are {tuple(probabilities.shape)} {probabilities.dtype}: give floating-point ones "
            "of shape [frames, classes]"
        )
    if not math.isfinite(float(probabilities.sum())):
        raise InputError(
            "a teacher's probabilities are not numbers (inf or nan): its weights or its dtype are broken; "
            "load it in float32"
        )


def _first(probabilities: Tensor, counts: Tensor) -> Essence:
    """The most probable classes of each row: probabilities [N, C], counts [N] of at least 1."""
    width = int(counts.max()) if len(counts) else 1
    values, classes = probabilities.topk(width, -1)
    is_kept = torch.arange(width, device=counts.device) < counts[:, None]
    classes = torch.where(is_kept, classes, classes[:, :1])
    return Essence(classes, torch.where(is_kept, values, 0.0), counts, probabilities.shape[-1])
