"""Ensemble: the mean of several teachers' probabilities."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from modicum.errors import InputError, ModelError

Classifier = Callable[[Any], Tensor]
"""Gives logits [..., C] for an input of any kind."""


@dataclass(frozen=True)
class Ensemble:
    """Teachers whose probabilities are averaged: p(c) = 1/M · Σ_m softmax(z_m / temperature)_c.

    Probabilities, never logits: the mean of logits is a geometric mean, in which a class that one member
    rules out is ruled out. A single teacher is an ensemble of one. The paper's teacher is an ensemble (Yang
    et al. 2019, arXiv 1906.10834); that its probabilities are averaged is our reading.

    Attributes:
        loaders: each gives a member when called, and is called once for each call of `probabilities`; what it
            gives is not held longer than it is used, so that one member at a time is in memory.
        temperature: the logits are divided by it (Hinton et al. 2015, arXiv 1503.02531).

    Raises:
        InputError: there is no member, or the temperature is not above 0.
    """

    loaders: Sequence[Callable[[], Classifier]]
    temperature: float = 1.0

    def __post_init__(self) -> None:
        if not self.loaders:
            raise InputError("an ensemble without members teaches nothing: give at least one teacher")
        if not 0 < self.temperature < float("inf"):
            raise InputError(f"the temperature is {self.temperature}: give a number above 0")

    @classmethod
    def of(cls, members: Sequence[Classifier], temperature: float = 1.0) -> Ensemble:
        """Of members that are in memory, all together."""
        return cls([_always(member) for member in members], temperature)

    @torch.no_grad()
    def probabilities(self, inputs: Sequence[Any]) -> list[Tensor]:
        """Mean probabilities for each input, [..., C] float32 (float64 where logits are), on the CPU.

        One member after the other reads all inputs. So many probabilities are in memory, at once: divide long
        inputs into several calls.

        Raises:
            ModelError: members give different numbers of classes or of frames for an input.
        """
        sums: list[Tensor] = []
        for number, load in enumerate(self.loaders):
            member = load()
            for index, one in enumerate(inputs):
                logits = member(one)
                wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
                found = (wide / self.temperature).softmax(-1).cpu()
                if not number:
                    sums.append(found)
                elif sums[index].shape != found.shape:
                    raise ModelError(
                        f"teachers 1 and {number + 1} give probabilities {tuple(sums[index].shape)} and "
                        f"{tuple(found.shape)} for the same input: give teachers of the same classes and "
                        "frames"
                    )
                else:
                    sums[index] += found
            del member
        return [total / len(self.loaders) for total in sums]


def _always(member: Classifier) -> Callable[[], Classifier]:
    return lambda: member
