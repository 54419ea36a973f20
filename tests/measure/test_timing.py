"""Timing, with a clock of the test's own."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from modicum.errors import InputError
from modicum.measure import Spread, TimingSettings, interleaved


class Machine:
    """Calls take a set time on its clock."""

    def __init__(self) -> None:
        self.now, self.order = 0.0, ""

    def call(self, name: str, seconds: float) -> Callable[[], None]:
        def run() -> None:
            self.order += name
            self.now += seconds

        return run

    def clock(self) -> float:
        return self.now


def test_candidates_take_turns_and_samples_are_seconds_of_a_call() -> None:
    machine = Machine()
    found = interleaved(
        {"a": machine.call("a", 0.25), "b": machine.call("b", 0.5)}, TimingSettings(4, 0.5), machine.clock
    )
    assert found == {"a": [0.25] * 4, "b": [0.5] * 4}
    assert machine.order == "aabb" + "aab" + "baa" + "aab" + "baa"


def test_a_machine_that_slows_down_slows_all() -> None:
    machine = Machine()
    speed = iter(range(1, 1000))

    def call() -> None:
        machine.now += next(speed)

    found = interleaved({"a": call, "b": call}, TimingSettings(8, 1e-9), machine.clock)
    ratios = [x / y for x, y in zip(found["a"], found["b"], strict=True)]
    assert Spread.of(ratios).low < 1 < Spread.of(ratios).high


def test_quartiles() -> None:
    assert Spread.of([5.0, 1.0, 2.0, 4.0, 3.0]) == Spread(median=3.0, low=2.0, high=4.0)


def test_bad_timing() -> None:
    with pytest.raises(InputError, match="give at least one candidate"):
        interleaved({})
    for wrong in ({"rounds": 2}, {"sample_seconds": 0.0}):
        with pytest.raises(InputError, match="give at least 3 rounds and a time above 0"):
            TimingSettings(**wrong)  # type: ignore[arg-type]
