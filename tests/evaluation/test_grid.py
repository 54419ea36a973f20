"""What a grid asks for, and what a budget comes to."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import pytest

import modicum
from modicum.compat import cache_kwargs
from modicum.errors import BudgetError, InputError, PolicyError
from modicum.evaluation.allowance import Allowance
from modicum.evaluation.grid import Grid
from modicum.evaluation.row import Cell
from modicum.evaluation.runner import cache_for
from modicum.kv.registry import parse_policy
from tests.evaluation.colours import Colours, Continued
from tests.kv.profiles import give_profile

SMALL: dict[str, Any] = {"models": ("m",), "policies": ("keydiff",), "budgets": ("64",), "tasks": ("t",)}
SETTINGS: dict[str, int] = {"chunk": 64, "n_sink": 4, "recent": 8, "evict_every": 1}


@pytest.mark.parametrize(
    ("given", "text"),
    [
        ("256", "256"),
        (256, "256"),
        (" 064 ", "64"),
        ("64 MiB", "64MiB"),
        ("025.0 %", "25%"),
        ("FULL", "full"),
    ],
)
def test_budgets_are_written_one_way(given: str | int, text: str) -> None:
    assert Allowance.parse(given).text == text


@pytest.mark.parametrize("given", ["", "many", "0", "-3", "0%", "101%", "-5%", "%", "12 apples", "0MiB"])
def test_budgets_that_are_none_are_refused(given: str) -> None:
    with pytest.raises(BudgetError):
        Allowance.parse(given)


def test_a_share_is_of_the_context_and_never_below_what_the_policy_needs() -> None:
    keydiff, snapkv = parse_policy("keydiff"), parse_policy("snapkv(window=32)")
    quarter = Allowance.parse("25%")
    assert quarter.budget(keydiff, 1000, 1200, **SETTINGS).tokens == 250
    assert quarter.budget(keydiff, 20, 40, **SETTINGS).tokens == 4 + 8
    assert quarter.budget(snapkv, 20, 40, **SETTINGS).tokens == 4 + 32
    assert quarter.budget(parse_policy("auto"), 20, 40, **SETTINGS).tokens == 4 + 8
    slack = SETTINGS | {"evict_every": 5}
    assert quarter.budget(keydiff, 20, 40, **slack).tokens == 4 + 8 + 4


def test_the_least_share_is_one_that_every_policy_works_with(tiny: Any) -> None:
    model, tokenizer = tiny
    give_profile(model)
    names = [info.name for info in modicum.policies() if info.name not in ("full", "razor")]
    bare = {info.name for info in modicum.policies() if not info.wrapper}
    ids = tokenizer("Once upon a time there was a dog. " * 14, return_tensors="pt")["input_ids"]
    for name in names:
        policy = name if name in bare else f"{name}+snapkv"
        grid = Grid(**SMALL | {"policies": (policy,), "budgets": ("1%",)}, chunk=16, recent=8)
        cache = cache_for(model, grid.cells("m", "float32", Colours(), None, 0)[0], ids.shape[1], 200)
        model(ids, **cache_kwargs(model, cache))
        cache.check_integrity()
        assert cache.plan.tokens < ids.shape[1], policy


def test_the_full_cache_has_room_for_everything_and_is_run_once() -> None:
    budget = Allowance.parse("full").budget(parse_policy("full"), 100, 130, **SETTINGS)
    assert (budget.tokens, budget.n_sink, budget.recent) == (130, 0, 0)
    grid = Grid(**SMALL | {"policies": ("keydiff", "full", "h2o"), "budgets": ("64", "full", "25%")})
    assert grid.settings() == [
        ("full", "full"),
        ("keydiff", "64"),
        ("keydiff", "25%"),
        ("h2o", "64"),
        ("h2o", "25%"),
    ]
    cells = grid.cells("m", "float32", Colours(), 100, 0)
    assert [cell.recent for cell in cells] == [None, 32, 32, 32, 32]


def test_equal_settings_are_one() -> None:
    one = Grid(**SMALL | {"policies": ("caote+snapkv", "caote(snapkv)"), "budgets": ("64", " 64")})
    assert len(one.policies) == len(one.budgets) == 1
    assert one == Grid(**SMALL | {"policies": ("caote(snapkv)",), "budgets": ("64",)})


def test_positions_and_store_are_settings_of_a_cell(tiny: Any) -> None:
    grid = Grid(**SMALL | {"budgets": ("64", "full")}, recent=8, positions="renumbered", store="int8")
    full, keydiff = grid.cells("m", "float32", Colours(), 100, 0)
    assert (full.positions, full.store) == ("original", "int8")  # of all tokens a rank is a position
    assert (keydiff.positions, keydiff.store) == ("renumbered", "int8")
    cache = cache_for(tiny[0], keydiff, 80, 100)
    assert (cache.numbering, cache.store.name) == ("renumbered", "int8")
    assert not grid.endless
    assert Grid(**SMALL, positions="renumbered").endless
    assert not Grid(**SMALL).endless
    plain = Grid(**SMALL).cells("m", "float32", Colours(), 100, 0)[0]
    older = asdict(plain)  # as rows were written before there was a choice
    del older["positions"], older["store"]
    assert Cell(**older) == plain


def test_a_loss_is_not_asked_with_the_question_seen() -> None:
    grid = Grid(**SMALL, questions=("hidden", "seen"))
    assert [cell.question for cell in grid.cells("m", "float32", Colours(), None, 0)] == ["hidden", "seen"]
    assert [cell.question for cell in grid.cells("m", "float32", Continued(), None, 0)] == ["hidden"]


@pytest.mark.parametrize(
    ("more", "error", "says"),
    [
        ({"policies": ("keydif",)}, PolicyError, "keydiff"),
        ({"policies": ()}, InputError, "policies"),
        ({"budgets": ("lots",)}, BudgetError, "25%"),
        ({"tasks": ()}, InputError, "tasks"),
        ({"lengths": (0,)}, InputError, "length"),
        ({"questions": ("maybe",)}, InputError, "'hidden' or 'seen'"),
        ({"seeds": (-1,)}, InputError, "seed"),
        ({"limit": 0}, InputError, "limit"),
        ({"chunk": 0}, BudgetError, "chunk"),
        ({"recent": -1}, BudgetError, "recent"),
        ({"positions": "new"}, InputError, "original, renumbered"),
        ({"store": "int3"}, InputError, "model, int8, fp8, k8v4, int4"),
    ],
)
def test_bad_settings_are_refused(more: dict[str, Any], error: type[Exception], says: str) -> None:
    with pytest.raises(error, match=says):
        Grid(**SMALL | more)
