"""What may be chosen for weights, and settings that check themselves."""

from __future__ import annotations

from typing import Any

import pytest

from modicum.errors import InputError
from modicum.fit.settings import FitSettings, Target
from modicum.fit.weight_option import WeightOption


@pytest.mark.parametrize(
    ("text", "sparsity", "pattern"),
    [("dense", None, None), ("60%", 0.6, None), (" 62.5 % ", 0.625, None), ("2:4", None, "2:4")],
)
def test_an_option_is_read_from_its_name(text: str, sparsity: float | None, pattern: str | None) -> None:
    option = WeightOption.parse(text)
    assert option.sparsity == (None if sparsity is None else pytest.approx(sparsity))
    assert option.pattern == pattern
    assert option.is_dense == (text == "dense")
    assert WeightOption.parse(option.name) == option


@pytest.mark.parametrize("text", ["", "0%", "100%", "half", "0.6", "-5%"])
def test_what_is_no_option_is_refused(text: str) -> None:
    with pytest.raises(InputError, match="write dense, a sparsity such as 60%, or 2:4"):
        WeightOption.parse(text)


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        ({"weights": ("dense", "50%", "50.0%")}, "once"),
        ({"weights": ()}, "names no option"),
        ({"weights": ("5:4",)}, "5:4"),
        ({"stores": ("int3",)}, "int3"),
        ({"stores": ()}, "choose some"),
        ({"method": "magic"}, "magic"),
        ({"task_share": 1.5}, "1.5"),
        ({"probes": 0}, "at least 1"),
        ({"samples": True}, "whole number"),
        ({"seed": 2**62}, "seed is 4611686018427387904"),
        ({"seed": -1}, "seed is -1"),
    ],
)
def test_settings_out_of_range_are_refused(wrong: dict[str, Any], told: str) -> None:
    with pytest.raises(InputError, match=told):
        FitSettings(**wrong)


@pytest.mark.parametrize(
    "wrong", [{"memory": 0}, {"memory": True}, {"memory": "much"}, {"memory": 9, "context": 0}]
)
def test_a_target_out_of_range_is_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(InputError):
        Target(**wrong)


def test_a_memory_is_a_size_or_bytes() -> None:
    assert Target("64MiB").nbytes == Target(64 * 2**20).nbytes == Target(str(64 * 2**20)).nbytes
