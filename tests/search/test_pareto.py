"""Fronts: exact ones against all networks of a space, evolution against pymoo's sorting and the exact one."""

from __future__ import annotations

import itertools
import math
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from modicum.errors import InputError
from modicum.search.milp import Option, choose
from modicum.search.nsga2 import NSGA2Settings, crowding_distances, nsga2, sorted_fronts
from modicum.search.pareto import dominates, exact_front, front
from modicum.search.predictor import Predictor
from modicum.search.samples import Sample, SampleFile, draw

POINTS = st.lists(
    st.tuples(st.integers(0, 6), st.integers(0, 6)).map(lambda p: tuple(map(float, p))), max_size=25
)


@given(points=POINTS)
def test_a_front_is_what_nothing_dominates(points: list[tuple[float, ...]]) -> None:
    expected = [
        i
        for i, a in enumerate(points)
        if not any(all(x <= y for x, y in zip(b, a, strict=True)) and b != a for b in points)
    ]
    assert front(points) == expected
    if points:
        assert sorted_fronts(points)[0] == expected


def space_of_10_000(seed: int) -> list[list[Option]]:
    """4 blocks of 10 variants: an error through a predictor's weights, and times in whole microseconds."""
    generator = random.Random(seed)
    weights = [-generator.uniform(2, 9) for _ in range(4)]
    return [
        [Option(-w * generator.uniform(0, 1), {"us": generator.randint(20, 400)}) for _ in range(10)]
        for w in weights
    ]


def every_network(groups: list[list[Option]]) -> list[tuple[float, int]]:
    return [
        (math.fsum(o.loss for o in one), sum(int(o.costs["us"]) for o in one))
        for one in itertools.product(*groups)
    ]


@pytest.mark.parametrize("seed", range(3))
def test_the_exact_optimum_is_that_of_10_000_networks(seed: int) -> None:
    pytest.importorskip("scipy", reason="needs scipy: pip install 'modicum[search]'")
    groups = space_of_10_000(seed)
    networks = every_network(groups)
    assert len(networks) == 10_000
    span = sum(max(o.loss for o in g) - min(o.loss for o in g) for g in groups)
    for limit in (180, 300, 450, 700, 1200):
        within = [loss for loss, us in networks if us <= limit]
        if within:
            found = choose(groups, {"us": limit})
            assert found.costs["us"] <= limit
            assert abs(found.loss - min(within)) <= 1e-9 * span
    points = exact_front(groups, "us", 12)
    on_front = {networks[i] for i in front([(loss, float(us)) for loss, us in networks])}
    for choice in points:
        assert any(
            us == choice.costs["us"] and abs(loss - choice.loss) <= 1e-9 * span for loss, us in on_front
        )
    costs = [choice.costs["us"] for choice in points]
    assert costs == sorted(set(costs))
    assert costs[0] == min(us for _, us in networks)
    assert len(points) >= 6


@pytest.mark.parametrize("seed", range(2))
def test_evolution_comes_near_the_exact_front(seed: int) -> None:
    groups = space_of_10_000(seed)
    networks = every_network(groups)

    def evaluate(picks: tuple[int, ...]) -> tuple[float, ...]:
        chosen = [g[p] for g, p in zip(groups, picks, strict=True)]
        return math.fsum(o.loss for o in chosen), float(sum(o.costs["us"] for o in chosen))

    calls: list[tuple[int, ...]] = []

    def counted(picks: tuple[int, ...]) -> tuple[float, ...]:
        calls.append(picks)
        return evaluate(picks)

    found = nsga2([list(range(10))] * 4, counted, NSGA2Settings(population=40, evaluations=800, seed=seed))
    assert len(calls) == len(set(calls)) == 800
    assert all(found[p] == evaluate(p) for p in found)
    assert not any(dominates(a, b) for a in found.values() for b in found.values())
    # The area it dominates is nearly all of what can be dominated.
    exact = [networks[i] for i in front([(loss, float(us)) for loss, us in networks])]
    corner = (max(loss for loss, _ in networks), float(max(us for _, us in networks)))
    best = _area([(loss, float(us)) for loss, us in exact], corner)
    assert _area(list(found.values()), corner) > 0.98 * best
    again = nsga2([list(range(10))] * 4, evaluate, NSGA2Settings(population=40, evaluations=800, seed=seed))
    assert again == found


def _area(points: list[tuple[float, ...]], corner: tuple[float, float]) -> float:
    """Of what the points dominate, up to a corner."""
    area, best = 0.0, corner[0]
    ordered = sorted(points, key=lambda p: (p[1], p[0]))
    for loss, cost in ordered:
        if loss < best:
            area += (best - loss) * (corner[1] - cost)
            best = loss
    return area


def test_a_small_space_is_gone_through_whole() -> None:
    found = nsga2([[0, 1], [3, 4]], lambda picks: tuple(map(float, picks)), NSGA2Settings(4, 100))
    assert found == {(0, 3): (0.0, 3.0)}


@given(points=POINTS.filter(bool))
def test_sorting_is_pymoos(points: list[tuple[float, ...]]) -> None:
    numpy = pytest.importorskip("numpy")
    module = pytest.importorskip("pymoo.util.nds.non_dominated_sorting", reason="needs pymoo")
    theirs = module.NonDominatedSorting().do(numpy.array(points))
    assert [sorted(int(i) for i in one) for one in theirs] == sorted_fronts(points)


def test_crowding_is_by_its_definition() -> None:
    found = crowding_distances([(0.0, 10.0), (1.0, 8.0), (4.0, 4.0), (10.0, 0.0)])
    assert found == [math.inf, pytest.approx(0.4 + 0.6), pytest.approx(0.9 + 0.8), math.inf]


@pytest.mark.parametrize("settings", [(2, 10, 1.0), (10, 5, 1.0), (10, 20, 0.0)])
def test_evolution_settings_are_checked(settings: tuple[int, int, float]) -> None:
    with pytest.raises(InputError, match="population of 4 or more"):
        NSGA2Settings(*settings)
    with pytest.raises(InputError, match="num_points is 1"):
        exact_front([[Option(0.0, {"us": 1})]], "us", 1)


def test_samples_are_spread_over_variants_and_differ() -> None:
    usable = [[0, 2, 5], [1, 3], [0, 1, 2, 3]]
    drawn = draw(usable, 12, 0)
    assert len(set(drawn)) == 12
    for place, own in enumerate(usable):
        counts = [sum(picks[place] == one for picks in drawn) for one in own]
        assert sum(counts) == 12
        assert max(counts) - min(counts) <= 2
    assert draw(usable, 12, 0) == drawn
    assert draw(usable, 12, 1) != drawn
    assert sorted(draw(usable, 100, 0)) == sorted(itertools.product(*usable))


def test_sample_files_go_on_after_a_kill(tmp_path) -> None:  # type: ignore[no-untyped-def]
    path = tmp_path / "samples.jsonl"
    first = Sample(("a", "b"), 0.5, 0.75, 1.0)
    SampleFile(path, "basis").add(first)
    with open(path, "a") as file:
        file.write('{"variants": ["a"')  # cut by a kill
    second = Sample(("a", "c"), 0.25, 0.5, 1.0)
    file_again = SampleFile(path, "basis")
    assert file_again.samples == {("a", "b"): first}
    file_again.add(second)
    assert SampleFile(path, "basis").samples == {("a", "b"): first, ("a", "c"): second}
    assert SampleFile(path, "another").samples == {}


def test_a_predictors_best_network_is_the_exact_choice() -> None:
    """Accuracy as a predictor gives it is a sum over blocks: minus it is the loss."""
    pytest.importorskip("scipy", reason="needs scipy: pip install 'modicum[search]'")
    generator = random.Random(3)
    errors = [[generator.random() for _ in range(6)] for _ in range(3)]
    rows = [[own[generator.randrange(6)] for own in errors] for _ in range(20)]
    predictor = Predictor.fit(rows, [0.9 - 0.2 * a - 0.1 * b - 0.3 * c for a, b, c in rows])
    groups = [[Option(-w * e) for e in own] for w, own in zip(predictor.weights, errors, strict=True)]
    best = max(itertools.product(*errors), key=predictor.predict)
    picks = choose(groups).picks
    assert tuple(own[p] for own, p in zip(errors, picks, strict=True)) == best
