"""The latency oracle: what it chooses, what it keeps."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from modicum.errors import InputError
from modicum.measure import LatencyOracle, Operation, TimingSettings


@dataclass(frozen=True)
class Shape:
    rows: int


class Bench:
    """Gives samples that a test sets, and counts how often it is asked."""

    def __init__(self, samples: dict[str, list[float]]) -> None:
        self.samples, self.asked = samples, 0

    def __call__(
        self, runs: Mapping[str, Callable[[], object]], settings: TimingSettings
    ) -> dict[str, list[float]]:
        assert runs.keys() == self.samples.keys()
        self.asked += 1
        return self.samples


def oracle(
    folder: Path, samples: dict[str, list[float]], version: str = "1"
) -> tuple[LatencyOracle[Shape], Bench]:
    bench = Bench(samples)
    candidates = {name: lambda shape: lambda: None for name in samples}
    return LatencyOracle(Operation("product", candidates, version), folder, measure_samples=bench), bench


@pytest.mark.parametrize(
    ("samples", "chosen"),
    [
        ({"plain": [2.0] * 5, "fast": [1.0] * 5}, "fast"),
        ({"plain": [1.0] * 5, "fast": [1.0] * 5}, "plain"),
        ({"plain": [1.0] * 5, "fast": [2.0] * 5}, "plain"),
        # Faster in the median, but not in three rounds of four.
        ({"plain": [1.0] * 5, "fast": [0.5, 0.5, 0.5, 1.5, 1.5]}, "plain"),
        # A machine that slows down: round by round it wins, though its samples spread as widely.
        ({"plain": [1.0, 2.0, 4.0, 8.0, 16.0], "fast": [0.9, 1.8, 3.6, 7.2, 14.4]}, "fast"),
        ({"plain": [3.0] * 4, "fast": [2.0] * 4, "faster": [1.0] * 4}, "faster"),
        ({"plain": [1.0] * 3}, "plain"),
    ],
)
def test_choice(tmp_path: Path, samples: dict[str, list[float]], chosen: str) -> None:
    assert oracle(tmp_path, samples)[0].choose(Shape(3)) == chosen


@given(
    base=st.lists(st.floats(0.1, 10), min_size=4, max_size=12),
    factors=st.lists(st.floats(0.5, 2), min_size=12, max_size=12),
)
def test_what_is_chosen_won_in_most_rounds(
    tmp_path_factory: pytest.TempPathFactory, base: list[float], factors: list[float]
) -> None:
    other = [x * y for x, y in zip(base, factors, strict=False)]
    found, _ = oracle(tmp_path_factory.mktemp("latency"), {"plain": base, "other": other})
    if found.choose(Shape(1)) == "other":
        wins = sum(x < y for x, y in zip(other, base, strict=True))
        assert wins >= 0.75 * (len(base) - 1)


def test_each_shape_is_measured_once_and_kept_on_disk(tmp_path: Path) -> None:
    samples = {"plain": [2.0, 2.0, 4.0], "fast": [1.0, 1.0, 1.0]}
    first, bench = oracle(tmp_path, samples)
    for _ in range(2):
        assert first.choose(Shape(3)) == "fast"
    assert bench.asked == 1
    latency = first.measure(Shape(3))["fast"]
    assert (latency.seconds.median, latency.ratio.median) == (1.0, 0.5)
    assert first.choose(Shape(4)) == "fast"
    assert bench.asked == 2
    second, other = oracle(tmp_path, samples)
    assert second.measure(Shape(3)) == first.measure(Shape(3))
    assert other.asked == 0
    assert [path.name for path in tmp_path.iterdir()] == [first.path.name]  # no part is left


def test_results_of_two_processes_are_joined(tmp_path: Path) -> None:
    samples = {"plain": [1.0] * 3}
    first, _ = oracle(tmp_path, samples)
    second, _ = oracle(tmp_path, samples)
    first.measure(Shape(1))
    second.measure(Shape(2))
    first.measure(Shape(3))
    third, bench = oracle(tmp_path, samples)
    for rows in (1, 2, 3):
        third.measure(Shape(rows))
    assert bench.asked == 0


@pytest.mark.parametrize("text", ["", "{", "[]", '{"format": 1, "version": "1"}', '{"format": 99}', "\x00"])
def test_a_damaged_file_counts_as_none(tmp_path: Path, text: str) -> None:
    found, bench = oracle(tmp_path, {"plain": [1.0] * 3})
    found.path.parent.mkdir(parents=True, exist_ok=True)
    found.path.write_text(text)
    assert found.choose(Shape(1)) == "plain"
    assert bench.asked == 1
    assert json.loads(found.path.read_text())["version"] == "1"


@pytest.mark.parametrize("value", ["null", '"1.0"', "NaN", "true", "[1]"])
def test_a_file_with_other_than_numbers_counts_as_none(tmp_path: Path, value: str) -> None:
    first, _ = oracle(tmp_path, {"plain": [2.0] * 3, "fast": [1.0] * 3})
    first.measure(Shape(1))
    first.path.write_text(first.path.read_text().replace('"high": 0.5', f'"high": {value}'))
    second, bench = oracle(tmp_path, {"plain": [2.0] * 3, "fast": [1.0] * 3})
    assert second.choose(Shape(1)) == "fast"
    assert bench.asked == 1


def test_the_folder_may_be_a_str(tmp_path: Path) -> None:
    first, _ = oracle(tmp_path, {"plain": [1.0] * 3})
    second = LatencyOracle(first.operation, str(tmp_path), measure_samples=first.measure_samples)
    assert second.path == first.path
    assert second.choose(Shape(1)) == "plain"


def test_measurements_with_other_threads_are_kept_apart(tmp_path: Path) -> None:
    found, bench = oracle(tmp_path, {"plain": [2.0] * 3, "fast": [1.0] * 3})
    threads = torch.get_num_threads()
    try:
        for number, samples, chosen in ((1, [1.0] * 3, "fast"), (2, [3.0] * 3, "plain")):
            torch.set_num_threads(number)
            bench.samples = {"plain": [2.0] * 3, "fast": samples}
            assert found.choose(Shape(1)) == chosen
        torch.set_num_threads(1)
        assert found.choose(Shape(1)) == "fast"
    finally:
        torch.set_num_threads(threads)
    assert bench.asked == 2
    assert len(list(tmp_path.iterdir())) == 2


def test_another_version_or_another_candidate_is_measured_anew(tmp_path: Path) -> None:
    oracle(tmp_path, {"plain": [1.0] * 3})[0].measure(Shape(1))
    newer, bench = oracle(tmp_path, {"plain": [1.0] * 3}, "2")
    newer.measure(Shape(1))
    assert bench.asked == 1
    more, bench = oracle(tmp_path, {"plain": [1.0] * 3, "other": [2.0] * 3}, "2")
    more.measure(Shape(1))
    assert bench.asked == 1


def test_a_folder_that_cannot_be_written_is_no_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    found, bench = oracle(tmp_path / "file", {"plain": [1.0] * 3})
    assert found.choose(Shape(1)) == "plain"
    assert found.choose(Shape(1)) == "plain"
    assert bench.asked == 1


def test_real_candidates_are_timed(tmp_path: Path) -> None:
    """The slower one does a hundred times as much: no noise hides that."""

    def work(times: int) -> Callable[[Shape], Callable[[], object]]:
        return lambda shape: lambda: sum(range(shape.rows * times))

    operation = Operation("sum", {"slow": work(100), "quick": work(1)})
    assert LatencyOracle(operation, tmp_path, TimingSettings(5, 1e-4)).choose(Shape(200)) == "quick"


def test_with_one_thread_only_the_threads_own_time_counts(tmp_path: Path) -> None:
    """A candidate that waits takes longer on the wall, and no processor time."""
    operation = Operation(
        "wait",
        {"work": lambda shape: lambda: sum(range(50_000)), "wait": lambda shape: lambda: time.sleep(0.01)},
    )
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        found = LatencyOracle(operation, tmp_path, TimingSettings(3, 1e-4))
        assert found.choose(Shape(1)) == "wait"
        assert found.path.stem.endswith("-1")
    finally:
        torch.set_num_threads(threads)


def test_what_the_oracle_refuses(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="give an instance of a dataclass"):
        oracle(tmp_path, {"plain": [1.0] * 3})[0].choose({"rows": 3})  # type: ignore[arg-type]
    with pytest.raises(InputError, match="has 0 candidates"):
        Operation("product", {})
    with pytest.raises(InputError, match="a name of letters, digits"):
        Operation("../product", {"plain": lambda shape: lambda: None})
