"""The noise-to-signal ratio, batch statistics and costs against plain loops."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from modicum.search.batchnorm import reset_statistics, statistics_rows
from modicum.search.costs import num_macs, num_parameters
from modicum.search.noise import ErrorSums, noise_to_signal
from tests.bounds import gamma

F64 = torch.float64


def rows_of(features: Tensor) -> list[list[float]]:
    """Each channel's values."""
    moved = features if features.dim() == 3 else features.permute(0, 2, 3, 1)
    return moved.reshape(-1, moved.shape[-1]).T.double().tolist()


def reference(found: Tensor, expected: Tensor) -> float:
    """Mean over channels of mean square error over variance, in plain loops."""
    total = 0.0
    pairs = list(zip(rows_of(found), rows_of(expected), strict=True))
    for ours, theirs in pairs:
        mean = math.fsum(theirs) / len(theirs)
        variance = math.fsum((x - mean) ** 2 for x in theirs) / len(theirs)
        total += math.fsum((a - b) ** 2 for a, b in zip(ours, theirs, strict=True)) / len(theirs) / variance
    return total / len(pairs)


def features(shape: tuple[int, ...], seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=F64) + 3


@pytest.mark.parametrize("shape", [(5, 3, 4, 2), (5, 7, 3)], ids=["images", "tokens"])
def test_it_is_the_loops(shape: tuple[int, ...]) -> None:
    expected, found = features(shape, 0), features(shape, 1)
    told = reference(found, expected)
    sums = ErrorSums(3)
    for part in range(0, 5, 2):
        sums.add(expected[part : part + 2], found[part : part + 2])
    # Sums of squares of numbers near 3 about their mean: relative errors grow by (3 / 1)², and a little more.
    bound = 100 * gamma(8 * expected.numel(), F64)
    assert sums.value == pytest.approx(told, rel=bound)
    assert float(noise_to_signal(found, expected, sums.variance)) == pytest.approx(told, rel=bound)


def test_means_of_channels_have_ratio_1_and_the_same_output_0() -> None:
    expected = features((6, 3, 4, 4), 0)
    means = expected.mean((0, 2, 3), keepdim=True).expand_as(expected)
    sums, same = ErrorSums(3), ErrorSums(3)
    sums.add(expected, means)
    same.add(expected, expected)
    assert sums.value == pytest.approx(1, rel=1e-12)
    assert same.value == 0


def test_dead_channels_are_left_out() -> None:
    expected, found = features((6, 3, 4, 4), 0), features((6, 3, 4, 4), 1)
    expected[:, 1] = 7.0
    sums = ErrorSums(3)
    sums.add(expected, found)
    kept = [0, 2]
    assert sums.value == pytest.approx(reference(found[:, kept], expected[:, kept]), rel=1e-12)
    loss = noise_to_signal(found, expected, sums.variance)
    assert float(loss) == pytest.approx(sums.value, rel=1e-12)
    dead = ErrorSums(3)
    dead.add(torch.ones(2, 3, 1, 1), torch.zeros(2, 3, 1, 1))
    assert dead.value == 0


def test_an_output_that_is_not_finite_has_no_ratio() -> None:
    sums = ErrorSums(3)
    sums.add(features((2, 3, 2, 2), 0), torch.full((2, 3, 2, 2), math.nan))
    assert math.isnan(sums.value)


def test_statistics_are_the_mean_over_batches() -> None:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(2, 3, 1), nn.BatchNorm2d(3, momentum=0.3), nn.Dropout(0.5)).double()
    network[0].train()
    network[2].eval()
    batches = [torch.randn(4, 2, 3, 3, dtype=F64) for _ in range(3)]
    outputs = [network[0](batch).detach() for batch in batches]
    reset_statistics(network, batches)
    norm = network[1]
    mean = sum(out.mean((0, 2, 3)) for out in outputs) / 3
    variance = sum(out.var((0, 2, 3), unbiased=True) for out in outputs) / 3
    assert isinstance(norm, nn.BatchNorm2d)
    bound = gamma(1000, F64)
    torch.testing.assert_close(norm.running_mean, mean, rtol=bound, atol=bound)
    torch.testing.assert_close(norm.running_var, variance, rtol=bound, atol=bound)
    assert norm.momentum == 0.3
    assert network[0].training
    assert not network[2].training


@given(num=st.integers(1, 200), size=st.integers(1, 20))
def test_rows_for_statistics_are_of_all_inputs_and_no_row_twice(num: int, size: int) -> None:
    batches = [rows.tolist() for rows in statistics_rows(num, size)]
    rows = [row for batch in batches for row in batch]
    assert len(set(rows)) == len(rows)
    assert set(rows) <= set(range(num))
    assert len(batches) == (1 if num < size else min(16, num // size))
    assert all(len(batch) == min(size, num) for batch in batches)
    assert rows == [row for batch in statistics_rows(num, size) for row in batch.tolist()]


def test_rows_for_statistics_come_from_everywhere() -> None:
    rows = torch.cat(list(statistics_rows(10_000, 10)))
    assert min(torch.histc(rows.double(), 4, 0, 10_000).tolist()) > 20  # of 160, 40 in each quarter


def test_costs_are_counted() -> None:
    network = nn.Sequential(
        nn.Conv2d(4, 6, 3, stride=2, padding=1, groups=2), nn.BatchNorm2d(6), nn.Flatten(), nn.Linear(54, 5)
    )
    # 3×3 outputs of 6 channels, each of 2 input channels × 9; then 54 × 5.
    assert num_macs(network, torch.zeros(1, 4, 6, 6)) == 9 * 6 * 2 * 9 + 54 * 5
    assert num_parameters(network) == (6 * 2 * 9 + 6) + 2 * 6 + (54 * 5 + 5)
