"""Essence: the classes of each frame that a teacher holds probable, and the training target made of them.

"Essence knowledge distillation" (Yang et al. 2019, arXiv 1906.10834) trains a student on a part of its
teacher's soft labels. The abstract does not say how the part is selected, nor what becomes of the rest; the
rules in `modicum.distill.rule` and the three choices of `Essence.target` are our reading.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from modicum.errors import InputError

Tail = Literal["renormalize", "drop", "bin"]
"""What becomes of the probability of the classes that are not kept: the kept ones are divided by their sum;
it is left out, so that a target sums to less than 1; or one more bin holds it."""


def check_tail(tail: str) -> Tail:
    """Raise unless it is one of the three.

    Raises:
        InputError: it is not.
    """
    for known in get_args(Tail):
        if tail == known:
            return known  # type: ignore[no-any-return]  # get_args has no types
    raise InputError(f"tail is {tail!r}; choose one of {', '.join(get_args(Tail))}")


@dataclass(frozen=True)
class SoftTarget:
    """What a student is trained on: a target distribution for each of N frames or tokens."""

    classes: Tensor
    """[N, K] int64"""
    probabilities: Tensor
    """[N, K] float; of the classes beside it."""
    tail: Tensor | None
    """[N] float: the probability of all other classes together; None where they are not trained on."""
    num_classes: int

    def to(self, device: torch.device) -> SoftTarget:
        """The same on a device."""
        tail = None if self.tail is None else self.tail.to(device)
        return SoftTarget(self.classes.to(device), self.probabilities.to(device), tail, self.num_classes)


@dataclass(frozen=True)
class Essence:
    """The kept classes of N frames or tokens, most probable first, with the teacher's probabilities.

    A frame that keeps fewer than K classes repeats its first one, with probability 0.
    """

    classes: Tensor
    """[N, K] int64"""
    probabilities: Tensor
    """[N, K] float, as the teacher gave them: not renormalised."""
    counts: Tensor
    """[N] int64, 1 to K: how many classes each frame keeps."""
    num_classes: int

    def __len__(self) -> int:
        return len(self.counts)

    @property
    def mass(self) -> Tensor:
        """[N] float64: the probability of the kept classes together."""
        return self.probabilities.double().sum(-1)

    def target(self, tail: Tail = "renormalize") -> SoftTarget:
        """The training target.

        Args:
            tail: see `Tail`. "bin" and "drop" scale probabilities whose sum is above 1, as rounding may make
                it, to a sum of 1.

        Raises:
            InputError: tail is not known, or the kept classes of a frame have no probability.
        """
        check_tail(tail)
        mass = self.mass[:, None]
        if tail == "renormalize" and bool((mass <= 0).any()):
            raise InputError(
                f"the kept classes of frame {int((mass <= 0).flatten().nonzero()[0])} have probability 0, "
                'which cannot be renormalised: give tail="drop", or keep more classes'
            )
        divisor = mass if tail == "renormalize" else mass.clamp_min(1.0)
        probabilities = (self.probabilities.double() / divisor).to(self.probabilities.dtype)
        rest = None
        if tail == "bin":
            rest = (1 - mass[:, 0]).clamp_min(0.0).to(self.probabilities.dtype)
            # Where all classes are kept there is no other that the bin could stand for.
            rest = torch.where(self.counts >= self.num_classes, 0.0, rest)
        return SoftTarget(self.classes, probabilities, rest, self.num_classes)
