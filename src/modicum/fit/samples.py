"""Samples: plans of many sizes, to which a predictor is fitted and on which it is checked."""

from __future__ import annotations

import math
import random

from modicum.fit.fit_plan import FitPlan, Planner
from modicum.fit.loss import Loss
from modicum.fit.settings import Target


def sample_plans(planner: Planner, target: Target, loss: Loss, num: int, seed: int) -> list[FitPlan]:
    """Optima of losses that are disturbed at random (by factors whose logarithm is normal, deviation 1), for
    memories from the least to that of the dense model in equal ratios: what is predicted later is near an
    optimum, too.

    Args:
        target: its context and batch.
    """
    draw = random.Random(seed)
    full = planner.dense_nbytes(target)
    grid = planner.sizes.grid(planner.stores, target.context)
    parts = [part.name for part in planner.library.parts]
    least = planner.fixed_nbytes + target.batch * min(map(planner.cache_nbytes, grid))
    least += sum(min(variant.nbytes for variant in planner.variants(part)) for part in parts)
    found = []
    for number in range(num):
        memory = math.ceil(least * (full / least) ** ((number + 0.5) / num))
        scales = {key: math.exp(draw.gauss(0, 1)) for key in planner.library.variants}
        scales |= {("cache", store): math.exp(draw.gauss(0, 1)) for store in planner.stores}
        within = Target(memory, target.context, target.batch)
        found.append(planner.best(within, loss, scales=scales, how="sample"))
    return found
