"""WeightOption: what the weights of a part of a layer may be: dense, a sparsity, or N of each M."""

from __future__ import annotations

import re
from dataclasses import dataclass

from modicum.errors import InputError

DENSE = "dense"


@dataclass(frozen=True)
class WeightOption:
    """One choice.

    Attributes:
        name: "dense", "60%", "2:4".
        sparsity: share of each row that is removed; None for dense weights and for a pattern.
        pattern: N:M; None for others.
    """

    name: str
    sparsity: float | None = None
    pattern: str | None = None

    @classmethod
    def parse(cls, text: str) -> WeightOption:
        """Read a name.

        Raises:
            InputError: it is not one.
        """
        name = text.strip()
        if name == DENSE:
            return cls(DENSE)
        if re.fullmatch(r"\d+:\d+", name):
            return cls(name, pattern=name)
        if match := re.fullmatch(r"(\d+(?:\.\d+)?)\s*%", name):
            share = float(match[1]) / 100
            if 0 < share < 1:
                return cls(f"{100 * share:g}%", sparsity=share)
        raise InputError(f"{text!r} is no choice for weights: write {DENSE}, a sparsity such as 60%, or 2:4")

    @property
    def is_dense(self) -> bool:
        """Whether nothing is removed."""
        return self.name == DENSE
