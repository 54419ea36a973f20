"""The predictor: the plain sum, or one that is fitted where that orders models better."""

from __future__ import annotations

import math
import random

import pytest

from modicum.fit.loss import KINDS, Loss, fit_loss
from modicum.fit.probe import Errors


def sums(rng: random.Random) -> dict[str, Errors]:
    return {kind: Errors(rng.uniform(0, 1), rng.uniform(0, 1), 1.0) for kind in KINDS}


def test_the_plain_sum_weighs_all_errors_alike() -> None:
    loss = Loss(0.25)
    assert loss.of_part("3.mlp", Errors(0.4, 0.8, 1.0)) == pytest.approx(0.75 * 0.4 + 0.25 * 0.8)
    rng = random.Random(0)
    one = sums(rng)
    parts = [loss.of_part(f"0.{kind}", one[kind]) for kind in ("attention", "mlp")]
    assert loss.of(one) == pytest.approx(sum(parts) + loss.of_cache(one["cache"]))


def test_factors_that_order_better_are_found() -> None:
    rng = random.Random(1)
    samples = [sums(rng) for _ in range(15)]
    factors = {"attention": 5.0, "mlp": 0.5, "cache": 0.05}
    measured = [
        Errors(sum(factors[k] * x[k].text for k in KINDS), sum(factors[k] * x[k].answers for k in KINDS), 1.0)
        for x in samples
    ]
    loss, check = fit_loss(samples, measured, 0.5)
    assert check.is_fitted
    assert check.samples == 15
    assert check.fitted_tau > check.plain_tau
    assert check.fitted_tau > 0.9
    # Ridge shrinks: the order of factors is what is left of them.
    assert loss.text[0] > loss.text[1] > loss.text[2] > 0


def test_few_samples_leave_the_plain_sum() -> None:
    rng = random.Random(2)
    loss, check = fit_loss(
        [sums(rng) for _ in range(3)], [Errors(0.1 * i, 0.1 * i, 1.0) for i in range(3)], 0.5
    )
    assert loss == Loss(0.5)
    assert not check.is_fitted


def test_a_fit_with_a_factor_below_0_is_not_taken() -> None:
    rng = random.Random(3)
    samples = [sums(rng) for _ in range(12)]
    measured = [Errors(1 - x["mlp"].text + x["cache"].text, x["cache"].answers, 1.0) for x in samples]
    loss, check = fit_loss(samples, measured, 0.5)
    assert loss == Loss(0.5)
    assert not check.is_fitted


def test_a_fitted_loss_predicts_what_was_measured_with_its_intercept() -> None:
    rng = random.Random(4)
    samples = [sums(rng) for _ in range(15)]
    factors = {"attention": 0.2, "mlp": 0.9, "cache": 2.0}
    measured = [
        Errors(
            0.3 + sum(factors[k] * x[k].text for k in KINDS),
            0.8 + sum(factors[k] * x[k].answers for k in KINDS),
            1.0,
        )
        for x in samples
    ]
    loss, check = fit_loss(samples, measured, 0.25)
    assert check.is_fitted
    # The residuals of a ridge regression with an unpenalised intercept sum to 0.
    predicted = sum(loss.of(x) for x in samples)
    assert predicted == pytest.approx(sum(e.loss(0.25) for e in measured), rel=1e-9)


@pytest.mark.parametrize("wrong", [math.nan, math.inf])
def test_samples_that_are_not_numbers_are_left_out_with_a_warning(wrong: float) -> None:
    rng = random.Random(1)
    samples = [sums(rng) for _ in range(15)]
    measured = [
        Errors(sum((i + 1) * x[k].text for i, k in enumerate(KINDS)), sum(x[k].answers for k in KINDS), 1.0)
        for x in samples
    ]
    expected = fit_loss(samples, measured, 0.5)
    samples[7:7] = [sums(rng), sums(rng)]
    measured[7:7] = [Errors(wrong, 0.1, 1.0), Errors(0.1, wrong, 0.0)]
    with pytest.warns(UserWarning, match="2 of 17 assembled models"):
        assert fit_loss(samples, measured, 0.5) == expected
    with pytest.warns(UserWarning, match="3 of 3"):
        loss, check = fit_loss(samples[:3], [Errors(wrong, wrong, 0.0)] * 3, 0.5)
    assert (loss, check.samples, check.is_fitted) == (Loss(0.5), 0, False)
