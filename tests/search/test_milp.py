"""The exact choice against all choices, and what is refused."""

from __future__ import annotations

import itertools
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from modicum.errors import InputError
from modicum.search.milp import Choice, Option, UnreachableError, choose, smallest, total

pytest.importorskip("scipy", reason="needs scipy: pip install 'modicum[search]'")

Groups = list[list[Option]]


def all_choices(groups: Groups) -> list[tuple[tuple[int, ...], float, dict[str, float]]]:
    """Every choice with its loss and costs, summed in plain loops."""
    choices = []
    for picks in itertools.product(*(range(len(group)) for group in groups)):
        chosen = [group[pick] for group, pick in zip(groups, picks, strict=True)]
        loss = math.fsum(option.loss for option in chosen)
        costs = {name: sum(option.costs[name] for option in chosen) for name in chosen[0].costs}
        choices.append((picks, loss, costs))
    return choices


def best_loss(groups: Groups, limits: dict[str, float]) -> float | None:
    within = [loss for _, loss, costs in all_choices(groups) if all(costs[n] <= limits[n] for n in limits)]
    return min(within, default=None)


def loss_tolerance(groups: Groups) -> float:
    """What `choose` promises: 1e-9 of the range of the losses."""
    spans = [max(o.loss for o in group) - min(o.loss for o in group) for group in groups]
    return 1e-9 * sum(spans) + 1e-15 * sum(max(abs(o.loss) for o in group) for group in groups)


NUMBER = st.integers(0, 1000)
GROUPS = st.lists(
    st.lists(st.tuples(st.floats(-5, 5, width=32), NUMBER, NUMBER), min_size=1, max_size=5),
    min_size=1,
    max_size=5,
)


@given(data=GROUPS, share=st.floats(0, 1), other=st.floats(0, 1))
def test_it_is_the_best_of_all_choices(
    data: list[list[tuple[float, int, int]]], share: float, other: float
) -> None:
    groups = [[Option(loss, {"bytes": a, "ms": b}) for loss, a, b in group] for group in data]
    limits = {}
    for name, part in (("bytes", share), ("ms", other)):
        sums = [costs[name] for _, _, costs in all_choices(groups)]
        limits[name] = round(min(sums) + part * (max(sums) - min(sums)))
    expected = best_loss(groups, limits)
    if expected is None:
        with pytest.raises(UnreachableError):
            choose(groups, limits)
        return
    found = choose(groups, limits)
    assert abs(found.loss - expected) <= loss_tolerance(groups)
    assert found == total(groups, found.picks)
    assert all(found.costs[name] <= limits[name] for name in limits)


@given(data=GROUPS)
def test_the_smallest_is_the_smallest_of_all_and_of_those_the_best(
    data: list[list[tuple[float, int, int]]],
) -> None:
    groups = [[Option(loss, {"bytes": a}) for loss, a, _ in group] for group in data]
    least = min(costs["bytes"] for _, _, costs in all_choices(groups))
    found = smallest(groups, "bytes")
    assert found is not None
    assert found.costs["bytes"] == least
    expected = best_loss(groups, {"bytes": least})
    assert expected is not None
    assert abs(found.loss - expected) <= loss_tolerance(groups)


def test_a_limit_is_not_passed_by_a_single_byte() -> None:
    """The solver's tolerance is far more than a byte of a gigabyte."""
    big = 2**40
    groups = [[Option(1.0, {"bytes": big}), Option(0.0, {"bytes": big + 1})] for _ in range(8)]
    found = choose(groups, {"bytes": 8 * big + 3})
    assert found.costs["bytes"] == 8 * big + 3
    assert found.loss == 5


def test_an_unreachable_limit_names_the_smallest_and_its_loss() -> None:
    groups = [[Option(0.0, {"bytes": 100}), Option(2.0, {"bytes": 40})] for _ in range(3)]
    with pytest.raises(
        UnreachableError, match=r"limit of bytes is 100,.*smallest that can be is 120 .*loss of 6\)"
    ) as error:
        choose(groups, {"bytes": 100})
    assert error.value.smallest["bytes"] == Choice((1, 1, 1), 6.0, {"bytes": 120})


def test_limits_that_only_together_are_unreachable_are_named() -> None:
    groups = [[Option(0.0, {"bytes": 10, "ms": 1}), Option(0.0, {"bytes": 1, "ms": 10})]]
    with pytest.raises(UnreachableError, match=r"not all of them together.*bytes 10; ms 10") as error:
        choose(groups, {"bytes": 5, "ms": 5})
    assert error.value.smallest["bytes"].picks == (0,)
    assert error.value.smallest["ms"].picks == (1,)


def test_without_limits_each_group_has_its_best() -> None:
    groups = [[Option(3.0), Option(1.0)], [Option(-2.0)]]
    assert choose(groups) == Choice((1, 0), -1.0, {})


@pytest.mark.parametrize(
    ("groups", "limits", "message"),
    [
        ([], {}, "nothing to choose"),
        ([[Option(0.0)], []], {}, "group 1 has no options"),
        ([[Option(0.0, {"ms": 1})]], {"bytes": 3}, "does not say what it takes of 'bytes'"),
        ([[Option(math.nan)]], {}, "finite"),
        ([[Option(0.0, {"ms": 1})]], {"ms": math.inf}, "limit of ms is inf"),
    ],
)
def test_what_is_refused(groups: Groups, limits: dict[str, float], message: str) -> None:
    with pytest.raises(InputError, match=message):
        choose(groups, limits)
