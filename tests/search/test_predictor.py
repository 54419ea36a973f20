"""The predictor against plain loops, and Kendall's τ against its definition and scipy."""

from __future__ import annotations

import math
import random

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from modicum.errors import InputError
from modicum.search.predictor import PENALTIES, Predictor, kendall_tau
from tests.bounds import gamma, solve_bound


def reference_tau(a: list[float], b: list[float]) -> float:
    """τ-b by its definition, pair by pair."""
    concordant = discordant = only_a = only_b = 0
    for i in range(len(a)):
        for j in range(i):
            x, y = a[i] - a[j], b[i] - b[j]
            if x * y > 0:
                concordant += 1
            elif x * y < 0:
                discordant += 1
            elif x != 0:
                only_a += 1
            elif y != 0:
                only_b += 1
    ordered = concordant + discordant
    below = math.sqrt((ordered + only_a) * (ordered + only_b))
    return (concordant - discordant) / below if below else math.nan


@given(pairs=st.lists(st.tuples(st.integers(-4, 4), st.integers(-4, 4)), max_size=12))
def test_tau_is_its_definition(pairs: list[tuple[int, int]]) -> None:
    a, b = [float(x) for x, _ in pairs], [float(y) for _, y in pairs]
    found, expected = kendall_tau(a, b), reference_tau(a, b)
    assert math.isnan(expected) == math.isnan(found)
    if not math.isnan(expected):
        assert found == pytest.approx(expected, rel=1e-15)
        assert -1 <= found <= 1


def test_tau_is_scipys() -> None:
    stats = pytest.importorskip("scipy.stats", reason="needs scipy: pip install 'modicum[search]'")
    generator = random.Random(0)
    a = [float(generator.randint(0, 9)) for _ in range(40)]
    b = [x + generator.randint(0, 9) for x in a]
    assert kendall_tau(a, b) == pytest.approx(float(stats.kendalltau(a, b).statistic), rel=1e-12)


def ridge(x: np.ndarray, y: np.ndarray, penalty: float) -> tuple[np.ndarray, float, float]:
    """Weights, intercept and condition, by the least squares of an extended system, in float64."""
    mean, scale = x.mean(0), x.std(0)
    z = (x - mean) / scale
    n, d = z.shape
    extended = np.vstack([z, np.sqrt(penalty * n) * np.eye(d)])
    solution, *_ = np.linalg.lstsq(extended, np.concatenate([y - y.mean(), np.zeros(d)]), rcond=None)
    weights = solution / scale
    return weights, float(y.mean() - mean @ weights), float(np.linalg.cond(extended)) ** 2


def brute_penalty(x: np.ndarray, y: np.ndarray) -> float:
    """The penalty with the least leave-one-out error at the full samples' scale and λ·n, by refitting."""
    z = (x - x.mean(0)) / x.std(0)
    n, d = z.shape
    errors = {}
    for penalty in PENALTIES:
        error = 0.0
        for i in range(n):
            rest = [j for j in range(n) if j != i]
            # Centred on what is left: the intercept has no penalty.
            middle, level = z[rest].mean(0), y[rest].mean()
            gram = (z[rest] - middle).T @ (z[rest] - middle) + penalty * n * np.eye(d)
            weights = np.linalg.solve(gram, (z[rest] - middle).T @ (y[rest] - level))
            error += float(y[i] - level - (z[i] - middle) @ weights) ** 2
        errors[penalty] = error
    ordered = sorted(errors.values())
    assert ordered[1] - ordered[0] > 1e-9 * ordered[1], "the choice must be clear"
    return min(errors, key=lambda one: errors[one])


def samples(seed: int, n: int = 14, d: int = 3, noise: float = 0.3) -> tuple[np.ndarray, np.ndarray]:
    generator = np.random.default_rng(seed)
    x = generator.uniform(0, 1, (n, d))
    return x, 80 - x @ np.arange(1, d + 1) * 4 + noise * generator.standard_normal(n)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("noise", [0.3, 6.0])
def test_it_is_the_ridge_regression_with_each_sample_left_out(seed: int, noise: float) -> None:
    x, y = samples(seed, noise=noise)
    found = Predictor.fit(x.tolist(), y.tolist())
    assert found.penalty == brute_penalty(x, y)
    for row in range(len(y)):
        rest = np.arange(len(y)) != row
        weights, intercept, condition = ridge(x[rest], y[rest], brute_penalty(x[rest], y[rest]))
        tolerance = (solve_bound(3, torch.float64, condition) + gamma(200, torch.float64)) * (
            abs(intercept) + float(np.abs(weights) @ np.abs(x[row]))
        )
        assert abs(found.left_out[row] - (x[row] @ weights + intercept)) <= 4 * tolerance
    assert found.error == pytest.approx(math.sqrt(np.mean((y - found.left_out) ** 2)), rel=1e-12)
    assert found.kendall_tau == pytest.approx(reference_tau(list(found.left_out), y.tolist()), rel=1e-12)


def test_a_line_is_found_again() -> None:
    x, y = samples(0, noise=0.0)
    found = Predictor.fit(x.tolist(), y.tolist())
    assert found.penalty == PENALTIES[0]
    assert found.kendall_tau == 1.0
    assert found.predict([0.2, 0.4, 0.6]) == pytest.approx(80 - 0.8 - 3.2 - 7.2, abs=0.01)


def test_a_constant_feature_has_no_weight() -> None:
    x, y = samples(1)
    x[:, 1] = 0.1
    assert Predictor.fit(x.tolist(), y.tolist()).weights[1] == 0


@pytest.mark.parametrize(
    ("features", "targets", "message"),
    [
        ([[1.0]] * 3, [1.0] * 3, "there are 3 samples: give at least 4"),
        ([[1.0]] * 4, [1.0] * 5, "a row of as many features for each target"),
        ([[1.0], [1.0, 2.0], [1.0], [3.0]], [1.0] * 4, "a row of as many features"),
        ([[1.0], [2.0], [math.nan], [3.0]], [1.0] * 4, "sample 2 holds a number that is not finite"),
    ],
)
def test_what_is_refused(features: list[list[float]], targets: list[float], message: str) -> None:
    with pytest.raises(InputError, match=message):
        Predictor.fit(features, targets)


def test_other_refusals() -> None:
    x, y = samples(2)
    with pytest.raises(InputError, match="penalty is 0"):
        Predictor.fit(x.tolist(), y.tolist(), penalty=0)
    with pytest.raises(InputError, match="there are 2 features: give 3"):
        Predictor.fit(x.tolist(), y.tolist()).predict([1.0, 2.0])
    with pytest.raises(InputError, match="1 and 2 numbers"):
        kendall_tau([1.0], [1.0, 2.0])
