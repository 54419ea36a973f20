"""The mean of teachers' probabilities."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from modicum.distill import Ensemble
from modicum.distill.ensemble import Classifier
from modicum.errors import InputError, ModelError
from tests.bounds import FUNCTION, assert_within, gamma
from tests.distill import reference

WIDTH, CLASSES = 4, 6


def member(seed: int, classes: int = CLASSES) -> nn.Linear:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Linear(WIDTH, classes)


INPUTS = [torch.randn(3, WIDTH, generator=torch.Generator().manual_seed(i)) for i in range(2)]


@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_probabilities_are_averaged_and_not_logits(temperature: float) -> None:
    members = [member(seed) for seed in range(3)]
    found = Ensemble.of(members, temperature).probabilities(INPUTS)
    for x, probabilities in zip(INPUTS, found, strict=True):
        rows = [m(x).tolist() for m in members]
        for frame in range(len(x)):
            each = [reference.softmax(logits[frame], temperature) for logits in rows]
            expected = torch.tensor([sum(p) / 3 for p in zip(*each, strict=True)], dtype=torch.float64)
            assert_within(probabilities[frame], expected, gamma(2 * CLASSES + 4 * FUNCTION, torch.float32))


def test_a_class_that_one_member_rules_out_is_not_ruled_out() -> None:
    sure = [torch.tensor([[40.0, 0.0]]), torch.tensor([[0.0, 40.0]])]
    ensemble = Ensemble.of([lambda _, z=z: z for z in sure])
    (found,) = ensemble.probabilities([None])
    assert_within(found, torch.full((1, 2), 0.5), gamma(4 * FUNCTION, torch.float32))


def test_one_member_at_a_time_is_in_memory() -> None:
    alive: weakref.WeakSet[nn.Module] = weakref.WeakSet()
    most = 0

    def loader(seed: int) -> Callable[[], Classifier]:
        def load() -> Classifier:
            nonlocal most
            gc.collect()
            made = member(seed)
            alive.add(made)
            most = max(most, len(alive))
            return made

        return load

    one_by_one = Ensemble([loader(seed) for seed in range(4)]).probabilities(INPUTS)
    together = Ensemble.of([member(seed) for seed in range(4)]).probabilities(INPUTS)
    assert most == 1
    assert all(torch.equal(a, b) for a, b in zip(one_by_one, together, strict=True))


def test_bad_input() -> None:
    with pytest.raises(InputError, match="at least one teacher"):
        Ensemble([])
    with pytest.raises(InputError, match="temperature is 0"):
        Ensemble.of([member(0)], 0)
    with pytest.raises(ModelError, match="teachers 1 and 2 give probabilities"):
        Ensemble.of([member(0), member(1, CLASSES + 1)]).probabilities(INPUTS)


def test_half_precision_logits_are_widened() -> None:
    z = torch.randn(2, CLASSES).to(torch.bfloat16)
    (found,) = Ensemble.of([lambda _: z]).probabilities([None])
    assert found.dtype == torch.float32
    expected: Tensor = z.double().softmax(-1)
    assert_within(found, expected, gamma(2 * CLASSES + 4 * FUNCTION, torch.float32))
