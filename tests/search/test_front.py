"""The predicted front against every network of a small space."""

from __future__ import annotations

import itertools
import math
import random

import pytest
import torch

from modicum.search.front import predicted_front
from modicum.search.predictor import Predictor
from modicum.search.space import SearchSpace
from tests.search.networks import Conv, network

VARIANTS = [Conv(kernel, scale=scale) for kernel in (1, 3, 5) for scale in (1.0, 2.0)]


@pytest.mark.parametrize("method", ["milp", "nsga2"])
@pytest.mark.parametrize("seed", range(4))
def test_no_network_of_the_space_beats_one_of_the_front(method: str, seed: int) -> None:
    pytest.importorskip("scipy", reason="needs scipy: pip install 'modicum[search]'")
    chance = random.Random(seed)
    space = SearchSpace(network(3), torch.zeros(1, 3, 6, 6), VARIANTS)
    names = [[variant.name for variant in own] for own in space.variants]
    errors = [{name: chance.random() for name in own} for own in names]
    for own in errors:  # it failed: it is in no network
        del own[VARIANTS[seed].name]
    seconds = [[chance.randint(1, 50) / 1000 for _ in own] for own in names]
    predictor = Predictor((-0.3, -0.1, -0.2), 0.9, 1e-3, (), ())

    def scored(picks: tuple[int, ...]) -> tuple[float, float]:
        rows = [errors[n][names[n][p]] for n, p in enumerate(picks)]
        return -predictor.predict(rows), math.fsum(seconds[n][p] for n, p in enumerate(picks))

    places = [[p for p, name in enumerate(own) if name in errors[n]] for n, own in enumerate(names)]
    every = [scored(picks) for picks in itertools.product(*places)]
    found = [scored(picks) for picks in predicted_front(space, errors, predictor, seconds, method=method)]
    assert len(found) > 1
    assert [time for _, time in found] == sorted(time for _, time in found)
    slack = 1e-9  # of float64 sums in another order
    for loss, time in found:
        for other, than in every:
            assert other > loss - slack or than > time + slack
            assert other > loss + slack or than > time - slack
    assert min(loss for loss, _ in every) == pytest.approx(found[-1][0], abs=slack)
    assert min(time for _, time in every) == pytest.approx(found[0][1], abs=slack)
