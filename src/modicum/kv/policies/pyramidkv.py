"""PyramidKV (Cai et al., 2024): more slots for lower layers, fewer for higher ones."""

from __future__ import annotations

import math
from dataclasses import dataclass
from fractions import Fraction
from typing import ClassVar

from modicum.errors import BudgetError
from modicum.kv.policy import Divider, check_between
from modicum.kv.registry import register


@register
@dataclass(frozen=True)
class PyramidKV(Divider):
    """The base's score; free slots fall linearly with depth, from 2f - f/β in the first layer to f/β at last.

    f is the budget without the slots that a head must have (sinks and recent tokens, the window's part in the
    paper). Integers: rounded down, what is left over goes to the lower layers, so that the sum is exact. The
    authors' code also bounds the top by the prompt's length; under a hard budget the length is not known.
    """

    name: ClassVar[str] = "pyramidkv"
    title: ClassVar[str] = "PyramidKV"
    paper: ClassVar[str] = "https://arxiv.org/abs/2406.02069"
    summary: ClassVar[str] = "The base's score, with budgets that shrink from the first layer to the last."

    beta: float = 20
    """The last layer's free slots are 1/β of the mean: 1 makes all layers equal."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_between(self, 1, math.inf, beta=self.beta)

    def layer_budgets(self, budget: int, layers: int, least: int) -> list[int]:
        if budget < least:
            raise BudgetError(
                f"a budget of {budget} tokens per KV head is below the {least} that each head needs"
            )
        if layers < 2:
            return [budget] * layers
        free = budget - least
        low = Fraction(free) / Fraction(self.beta)
        high = 2 * free - low
        slots = [int(high - (high - low) * i / (layers - 1)) for i in range(layers)]
        left = layers * free - sum(slots)
        return [least + s + (i < left) for i, s in enumerate(slots)]
