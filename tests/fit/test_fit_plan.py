"""Plans: the exact optimum within a memory, uniform choices, and errors that say what could be."""

from __future__ import annotations

import itertools
from types import SimpleNamespace
from typing import Any

import pytest

from modicum.errors import InputError
from modicum.fit.cache_option import CacheErrors, CacheOption
from modicum.fit.fit_plan import Planner
from modicum.fit.library import Variant
from modicum.fit.loss import Loss
from modicum.fit.probe import Errors
from modicum.fit.settings import Target
from modicum.fit.weight_option import WeightOption

pytest.importorskip("scipy")

FIXED, CONTEXT = 1000, 64
OPTIONS = ("dense", "50%", "70%")
PARTS = ("0.attention", "0.mlp", "1.attention", "1.mlp")


class Sizes:
    """Caches of 8 bytes a slot, or 4 in int8."""

    least, length = 8, CONTEXT

    def smallest(self, context: int) -> int:
        return self.least

    def nbytes(self, option: CacheOption) -> int:
        return option.tokens * (8 if option.store == "model" else 4)

    def full_nbytes(self, context: int) -> int:
        return 8 * context

    def grid(self, stores: Any, context: int) -> list[CacheOption]:
        return [CacheOption(store, tokens, context) for store in stores for tokens in (64, 40, 24, 12, 8)]


def planner() -> Planner:
    variants = {}
    for place, part in enumerate(PARTS):
        for rank, option in enumerate(OPTIONS):
            error = rank**2 * 0.01 * (1 + (7 * place) % 5)
            variants[part, option] = Variant(
                part, option, (200, 110, 70)[rank], Errors(error, 2 * error, 1.0)
            )
    library: Any = SimpleNamespace(
        parts=[SimpleNamespace(name=name) for name in PARTS],
        options=[WeightOption.parse(option) for option in OPTIONS],
        variants=variants,
    )
    measured = {
        CacheOption(store, tokens, CONTEXT): Errors(1 / tokens + extra, 0.5 / tokens + extra, 1.0)
        for store, extra in (("model", 0.0), ("int8", 0.004))
        for tokens in (64, 40, 24, 12, 8)
    }
    sizes: Any = Sizes()
    return Planner(library, FIXED, sizes, CacheErrors(measured), ("model", "int8"))


def every(plans: Planner, batch: int) -> list[tuple[int, float]]:
    """Bytes and loss of each choice there is, by plain loops."""
    found = []
    grid = plans.sizes.grid(plans.stores, CONTEXT)
    for picks in itertools.product(OPTIONS, repeat=len(PARTS)):
        chosen = [plans.library.variants[part, option] for part, option in zip(PARTS, picks, strict=True)]
        for cache in grid:
            errors = [variant.errors for variant in chosen] + [plans.errors.of(cache)]
            loss = sum(0.75 * e.text + 0.25 * e.answers for e in errors)
            nbytes = FIXED + sum(v.nbytes for v in chosen) + batch * plans.sizes.nbytes(cache)
            found.append((nbytes, loss))
    return found


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("memory", [1400, 1500, 1700, 2000, 3500])
def test_the_optimum_is_the_best_of_all_choices(memory: int, batch: int) -> None:
    plans = planner()
    fitting = [loss for nbytes, loss in every(plans, batch) if nbytes <= memory]
    target = Target(memory, CONTEXT, batch)
    found = plans.best(target, Loss(0.25))
    assert found.predicted == pytest.approx(min(fitting), rel=1e-9)
    assert found.nbytes(batch) <= memory


def test_a_memory_that_nothing_reaches_names_the_least_and_its_loss() -> None:
    plans = planner()
    least = min(nbytes for nbytes, _ in every(plans, 1))
    with pytest.raises(InputError, match=rf"{least} bytes.*70%.*8 slots.*int8.*predicted loss") as caught:
        plans.best(Target(least - 1, CONTEXT), Loss(0.25))
    assert "\n" not in str(caught.value)
    assert plans.best(Target(least, CONTEXT), Loss(0.25)).nbytes(1) == least


def test_what_is_left_goes_to_the_cache() -> None:
    plans = planner()
    target = Target(1737, CONTEXT)
    plan = plans.best(target, Loss(0.25))
    filled = plans.filled(plan, target, Loss(0.25))
    assert plan.nbytes(1) <= filled.nbytes(1) <= 1737
    one_more = CacheOption(filled.cache.store, filled.cache.tokens + 1, CONTEXT)
    assert filled.cache.tokens == CONTEXT or filled.weights_nbytes + plans.sizes.nbytes(one_more) > 1737
    assert filled.predicted <= plan.predicted


FITTED = Loss(0.25, (0.5, 2.0, 1.5), (1.5, 1.0, 0.5), (0.03, 0.07))
INTERCEPT = 0.75 * 0.03 + 0.25 * 0.07


@pytest.mark.parametrize("memory", [1500, 1700, 2000])
def test_a_predicted_loss_is_the_predictors_with_its_intercept(memory: int) -> None:
    plans, target = planner(), Target(memory, CONTEXT)
    uniform = plans.uniform(target, FITTED, "70%", "int8")
    assert uniform is not None
    best = plans.best(target, FITTED)
    for plan in (best, uniform, plans.filled(best, target, FITTED)):
        total = INTERCEPT
        kinds = {"attention": 0, "mlp": 1}
        for part, option in plan.options.items():
            errors = plans.library.variants[part, option].errors
            kind = kinds[part.split(".")[1]]
            total += 0.75 * FITTED.text[kind] * errors.text + 0.25 * FITTED.answers[kind] * errors.answers
        errors = plans.errors.of(plan.cache)
        total += 0.75 * FITTED.text[2] * errors.text + 0.25 * FITTED.answers[2] * errors.answers
        assert plan.predicted == pytest.approx(total, rel=1e-9)


def test_the_loss_of_the_least_plan_has_the_intercept() -> None:
    plans = planner()
    least = min(nbytes for nbytes, _ in every(plans, 1))
    told = f"{plans.best(Target(least, CONTEXT), FITTED).predicted:.3g}"
    with pytest.raises(InputError, match=rf"a predicted loss of {told} nats"):
        plans.best(Target(least - 1, CONTEXT), FITTED)


def test_a_memory_below_what_probes_can_show_is_told_of_longer_ones() -> None:
    plans = planner()
    shown: Any = plans.sizes
    shown.least, shown.length = 4, CONTEXT // 2
    shown.smallest = lambda context: 8
    with pytest.raises(InputError, match="a longer probe_length"):
        plans.best(Target(1001, CONTEXT), Loss())
    shown.length = CONTEXT
    with pytest.raises(InputError, match="a shorter context, or more options"):
        plans.best(Target(1001, CONTEXT), Loss())


def test_a_uniform_plan_has_one_option_and_the_largest_cache() -> None:
    plans = planner()
    plan = plans.uniform(Target(1600, CONTEXT), Loss(), "50%", "model")
    assert plan is not None
    assert set(plan.options.values()) == {"50%"}
    assert plan.cache == CacheOption("model", 20, CONTEXT)  # (1600 - 1000 - 440) / 8
    assert plans.uniform(Target(1500, CONTEXT), Loss(), "dense", "model") is None


def test_as_it_was_is_dense_weights_and_whole_caches() -> None:
    assert planner().dense_nbytes(Target(1, CONTEXT, 2)) == FIXED + 4 * 200 + 2 * 8 * CONTEXT
