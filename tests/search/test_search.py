"""Searches over subsets, beside all subsets and plain definitions."""

from __future__ import annotations

import random
from collections.abc import Callable
from itertools import combinations
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from modicum.errors import InputError
from modicum.search import (
    CrossEntropySettings,
    FunctionProblem,
    SearchResult,
    cross_entropy_search,
    exhaustive_search,
    greedy_search,
    refined_search,
    value_of,
)

Search = Callable[..., SearchResult]
SEARCHES: list[Search] = [greedy_search, refined_search, cross_entropy_search]
ALL: list[Search] = [*SEARCHES, exhaustive_search]


def coverage(seed: int, num_items: int, cost: float = 0.7) -> FunctionProblem:
    """Items cover points and cost something: like expressions, each helps some utterances."""
    chance = random.Random(seed)
    covers = [frozenset(chance.sample(range(20), chance.randint(1, 6))) for _ in range(num_items)]

    def value(chosen: frozenset[int]) -> float:
        points = frozenset().union(*(covers[item] for item in chosen))
        return len(points) - cost * len(chosen)

    return FunctionProblem(num_items, value)


def pitfall() -> FunctionProblem:
    """Item 0 is best alone, 1 and 2 together are better, and 0 is then superfluous."""
    table = {(): 0, (0,): 5, (1,): 4, (2,): 4, (0, 1): 6, (0, 2): 6, (1, 2): 9, (0, 1, 2): 9}
    return FunctionProblem(3, lambda chosen: float(table[tuple(sorted(chosen))]))


def best_of_all(problem: FunctionProblem) -> float:
    """By the definition."""
    items = range(problem.num_items)
    return max(
        problem.function(frozenset(c)) for size in range(len(items) + 1) for c in combinations(items, size)
    )


@given(st.integers(0, 10**6), st.integers(0, 6))
def test_exhaustive_search_is_the_best_of_all_subsets(seed: int, num_items: int) -> None:
    problem = coverage(seed, num_items)
    found = exhaustive_search(problem)
    assert found.value == best_of_all(problem) == problem.function(frozenset(found.chosen))
    assert found.num_evaluations == 2**num_items


@pytest.mark.parametrize("num_items", range(13))
def test_cross_entropy_equals_all_subsets(num_items: int) -> None:
    for seed in range(5):
        problem = coverage(seed, num_items)
        assert cross_entropy_search(problem).value == exhaustive_search(problem).value


@given(st.lists(st.integers(-5, 5), max_size=12))
def test_all_searches_equal_all_subsets_where_items_do_not_interact(gains: list[int]) -> None:
    problem = FunctionProblem(len(gains), lambda chosen: float(sum(gains[item] for item in chosen)))
    best = exhaustive_search(problem)
    for search in (greedy_search, refined_search):
        found = search(problem)
        assert (found.chosen, found.value) == (best.chosen, best.value)
    assert cross_entropy_search(problem).value == best.value


@given(st.integers(0, 10**6), st.integers(1, 30))
def test_no_search_is_below_the_best_single_item_or_none(seed: int, num_items: int) -> None:
    problem = coverage(seed, num_items)
    single = max(problem.function(frozenset({item})) for item in range(num_items))
    for search in SEARCHES:
        found = search(problem)
        assert found.value >= max(single, problem.function(frozenset()))
        assert found.value == value_of(problem, found.chosen) == problem.function(frozenset(found.chosen))
        assert list(found.chosen) == sorted(set(found.chosen))
        assert found.history[-1] == (len(found.chosen), found.value)
        assert [value for _, value in found.history] == sorted(value for _, value in found.history)


def test_refinement_takes_back_what_became_superfluous() -> None:
    assert greedy_search(pitfall()).chosen == (0, 1, 2)
    assert refined_search(pitfall()).chosen == (1, 2)
    assert cross_entropy_search(pitfall()).chosen == exhaustive_search(pitfall()).chosen == (1, 2)


def test_refinement_leaves_nothing_to_add_or_remove() -> None:
    for seed in range(20):
        problem = coverage(seed, 25, cost=1.3)
        chosen = frozenset(refined_search(problem).chosen)
        value = problem.function(chosen)
        assert all(problem.function(chosen | {item}) <= value for item in range(25))
        assert all(problem.function(chosen - {item}) < value for item in chosen)


def test_greedy_follows_the_plain_rule() -> None:
    for seed in range(20):
        problem = coverage(seed, 15)
        chosen: list[int] = []
        while True:
            now = problem.function(frozenset(chosen))
            values = {i: problem.function(frozenset([*chosen, i])) for i in range(15) if i not in chosen}
            item = min(values, key=lambda i: (-values[i], i))
            if values[item] <= now:
                break
            chosen.append(item)
        assert greedy_search(problem).chosen == tuple(sorted(chosen))


@pytest.mark.parametrize("search", SEARCHES)
@pytest.mark.parametrize("limit", [0, 1, 2, 5])
def test_sets_keep_their_limit(search: Search, limit: int) -> None:
    sizes: list[int] = []

    def value(chosen: frozenset[int]) -> float:
        sizes.append(len(chosen))
        return float(len(chosen))

    found = search(FunctionProblem(20, value), max_items=limit)
    assert len(found.chosen) == found.value == limit
    assert max(sizes) == limit


def test_draws_repeat_with_their_seed_and_change_with_another() -> None:
    seen: dict[int, list[frozenset[int]]] = {}

    def run(seed: int) -> list[frozenset[int]]:
        sets: list[frozenset[int]] = []
        problem = FunctionProblem(30, lambda chosen: sets.append(chosen) or 0.0)  # type: ignore[func-returns-value]
        cross_entropy_search(problem, CrossEntropySettings(seed=seed, max_rounds=2))
        return sets

    for seed in (0, 1):
        seen[seed] = run(seed)
        assert seen[seed] == run(seed)
    assert seen[0] != seen[1]


def test_the_first_sets_have_ten_items_on_average() -> None:
    sizes: list[int] = []

    def value(chosen: frozenset[int]) -> float:
        sizes.append(len(chosen))
        return 0.0

    cross_entropy_search(FunctionProblem(1000, value), CrossEntropySettings(num_samples=2000, max_rounds=1))
    assert CrossEntropySettings().first(1000) == 0.01
    assert CrossEntropySettings().first(4) == 0.5
    # Each set is reached item by item, so the largest size tells: mean 10, standard deviation 3.1.
    assert 10 < max(sizes) < 40


@pytest.mark.parametrize(
    "bad",
    [
        {"num_samples": 1},
        {"elite_share": 0},
        {"smoothing": 1.1},
        {"start": 1.0},
        {"tolerance": 0.5},
        {"patience": 0},
        {"max_rounds": 0},
    ],
)
def test_settings_are_checked(bad: dict[str, Any]) -> None:
    with pytest.raises(InputError, match=next(iter(bad))):
        CrossEntropySettings(**bad)


def test_bad_limits_and_too_many_items_are_named() -> None:
    for search in SEARCHES:
        with pytest.raises(InputError, match="max_items is -1"):
            search(coverage(0, 3), max_items=-1)
    with pytest.raises(InputError, match="21 items"):
        exhaustive_search(FunctionProblem(21, lambda chosen: 0.0))
    with pytest.raises(InputError, match="-1 items"):
        FunctionProblem(-1, lambda chosen: 0.0)


@pytest.mark.parametrize("search", ALL)
def test_of_no_items_none_is_chosen(search: Search) -> None:
    assert search(FunctionProblem(0, lambda chosen: 1.0)) == SearchResult((), 1.0, 1, ((0, 1.0),))
