"""The networks of a space that none is predicted to beat in both accuracy and time."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Literal

from modicum.search.milp import Option
from modicum.search.nsga2 import NSGA2Settings, nsga2
from modicum.search.pareto import exact_front
from modicum.search.predictor import Predictor
from modicum.search.space import Picks, SearchSpace


def predicted_front(
    space: SearchSpace,
    errors: Sequence[Mapping[str, float]],
    predictor: Predictor,
    seconds: Sequence[Sequence[float]],
    *,
    method: Literal["milp", "nsga2"] = "milp",
    points: int = 16,
    seed: int = 0,
) -> list[Picks]:
    """The front of predicted accuracy and the sum of block times, by rising time.

    Args:
        space: the blocks and their variants.
        errors: of each block, by variant. A variant without an error is left out.
        predictor: of the accuracy, from block errors.
        seconds: of each block's variants.
        method: "milp" finds the best network under each of some times exactly (`exact_front`), "nsga2"
            evolves all of them at once (`nsga2`).
        points: times that "milp" takes.
        seed: of "nsga2".

    Returns:
        A variant's index for each block, of each network.

    Raises:
        InputError: a package is missing.
    """
    usable = [[p for p, v in enumerate(own) if v.name in errors[n]] for n, own in enumerate(space.variants)]
    losses = [
        {p: -predictor.weights[n] * errors[n][space.variants[n][p].name] for p in own}
        for n, own in enumerate(usable)
    ]
    if method == "milp":
        groups = [
            [Option(losses[n][p], {"seconds": seconds[n][p]}) for p in own] for n, own in enumerate(usable)
        ]
        choices = exact_front(groups, "seconds", points)
        return [tuple(usable[n][place] for n, place in enumerate(choice.picks)) for choice in choices]

    def evaluate(picks: Picks) -> tuple[float, ...]:
        loss = math.fsum(losses[n][p] for n, p in enumerate(picks))
        return loss, math.fsum(seconds[n][p] for n, p in enumerate(picks))

    evolved = nsga2(usable, evaluate, NSGA2Settings(seed=seed))
    return sorted(evolved, key=lambda picks: evolved[picks][1])
