"""Few sizes: against all ways to group small lists, and what holds for any list."""

from __future__ import annotations

from itertools import combinations, pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from modicum.kv.few_sizes import _cuts, few_sizes


def scatter(values: list[float], cuts: tuple[int, ...]) -> float:
    """Sum of squared distances from the groups' means."""
    total = 0.0
    for a, b in pairwise(cuts):
        mean = sum(values[a:b]) / (b - a)
        total += sum((x - mean) ** 2 for x in values[a:b])
    return total


@given(values=st.lists(st.floats(1, 1000), min_size=1, max_size=8), groups=st.integers(1, 5))
@settings(max_examples=100)
def test_groups_are_the_best_of_all_ways_to_cut(values: list[float], groups: int) -> None:
    values, count = sorted(values), min(groups, len(values))
    ways = [(0, *inner, len(values)) for inner in combinations(range(1, len(values)), count - 1)]
    best = min(scatter(values, way) for way in ways)
    found = tuple(_cuts(values, groups))
    assert found in ways
    # Sums of eight squares of at most 1000, each rounded.
    assert scatter(values, found) <= best + 100 * 8 * 1000**2 * 2**-53


@given(
    values=st.lists(st.integers(4, 900), min_size=1, max_size=60),
    most=st.integers(2, 9),
)
@settings(max_examples=200)
def test_sizes_are_few_in_order_and_take_no_more_than_there_is(values: list[int], most: int) -> None:
    total = sum(values)
    found = few_sizes([float(x) for x in values], total, most, 4)
    counts = {size: found.count(size) for size in found}
    assert len(counts) <= most
    assert min(found) >= 4
    assert len({found[i] for i, x in enumerate(values) if x == 4}) <= 1
    order = sorted(range(len(values)), key=lambda i: values[i])
    assert all(found[i] <= found[j] for i, j in pairwise(order))
    assert 0 <= total - sum(found) < max(counts.values())


@pytest.mark.parametrize("values", [[], [7.0], [3.0, 3.0]])
def test_lists_without_a_choice(values: list[float]) -> None:
    assert few_sizes(values, int(sum(values)), 8, 3) == [int(x) for x in values]
