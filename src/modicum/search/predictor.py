"""Predictor: a score of a whole, such as accuracy, as a linear function of its parts' errors.

DONNA (arXiv 2012.08859) predicts the accuracy of a network linearly from the errors of its blocks. The
abstract does not say how the line is fitted: ridge regression, its penalty chosen by leave-one-out, is our
reading.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from modicum.errors import InputError

PENALTIES = (1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0)
"""λ of which the one with the least leave-one-out error is taken; of features of variance 1."""
MIN_SAMPLES = 4
"""Each is left out once, and of what is left each is left out once more, to choose the penalty."""

Matrix = Sequence[Sequence[float]]


def kendall_tau(first: Sequence[float], second: Sequence[float]) -> float:
    """Kendall's τ-b of two rankings: 1 if they order all pairs alike, -1 if all the other way.

    Pairs that are equal in one of both count in neither (τ-b: Kendall 1945).

    Args:
        first: n numbers.
        second: n numbers, of the same things.

    Returns:
        From -1 to 1; NaN if all numbers of one of both are equal, or there are fewer than 2.

    Raises:
        InputError: the lengths differ.
    """
    if len(first) != len(second):
        raise InputError(f"there are {len(first)} and {len(second)} numbers: give two rankings of the same")
    a, b = (torch.tensor(list(x), dtype=torch.float64) for x in (first, second))
    pairs = torch.triu_indices(len(a), len(a), offset=1)
    sign_a, sign_b = (torch.sign(x[pairs[0]] - x[pairs[1]]) for x in (a, b))
    ordered = float(sign_a.abs().sum()) * float(sign_b.abs().sum())
    return float((sign_a * sign_b).sum()) / math.sqrt(ordered) if ordered else math.nan


@dataclass(frozen=True)
class Predictor:
    """A ridge regression: intercept + Σ weight · feature.

    With z the features at mean 0 and variance 1 (over the samples), it minimises Σ (y - intercept - w·z)² +
    λ·n·‖w‖²; the intercept has no penalty. A feature that is the same in all samples has the weight 0.

    Attributes:
        weights: d, of the features as they are given.
        intercept: of the features as they are given.
        penalty: λ.
        targets: n, what it was fitted to.
        left_out: n, the prediction of each sample by a predictor that was fitted to the others, its penalty
            and the features' scale included.
    """

    weights: tuple[float, ...]
    intercept: float
    penalty: float
    targets: tuple[float, ...]
    left_out: tuple[float, ...]

    @classmethod
    def fit(cls, features: Matrix, targets: Sequence[float], penalty: float | None = None) -> Predictor:
        """Fit to n samples.

        Args:
            features: n rows of d numbers.
            targets: n numbers.
            penalty: λ; None: the one of `PENALTIES` with the least squared error when each sample is left
                out.

        Raises:
            InputError: there are fewer than `MIN_SAMPLES`, rows differ in length, a number is not finite, or
                the penalty is not above 0.
        """
        x, y = _checked(features, targets)
        if penalty is not None and not 0 < penalty < math.inf:
            raise InputError(f"the penalty is {penalty}: give a number above 0")
        left_out = []
        for row in range(len(y)):
            others = torch.arange(len(y)) != row
            weights, intercept, _ = _fitted(x[others], y[others], penalty)
            left_out.append(float(x[row] @ weights + intercept))
        weights, intercept, used = _fitted(x, y, penalty)
        return cls(tuple(weights.tolist()), float(intercept), used, tuple(y.tolist()), tuple(left_out))

    def predict(self, features: Sequence[float]) -> float:
        """The score of one whole.

        Args:
            features: d numbers.

        Raises:
            InputError: there are more or fewer.
        """
        if len(features) != len(self.weights):
            raise InputError(f"there are {len(features)} features: give {len(self.weights)}")
        return self.intercept + math.fsum(w * x for w, x in zip(self.weights, features, strict=True))

    @cached_property
    def kendall_tau(self) -> float:
        """Of the left-out predictions and the targets.

        Of samples that cannot be told apart it is below 0: the mean of the others falls where a target rises.
        """
        return kendall_tau(self.left_out, self.targets)

    @cached_property
    def error(self) -> float:
        """The root mean square of target minus left-out prediction, in the targets' unit."""
        pairs = zip(self.left_out, self.targets, strict=True)
        return math.sqrt(math.fsum((a - b) ** 2 for a, b in pairs) / len(self.targets))


def _checked(features: Matrix, targets: Sequence[float]) -> tuple[Tensor, Tensor]:
    """Features [n, d] and targets [n], float64."""
    widths = {len(row) for row in features}
    if len(features) != len(targets) or len(widths) > 1:
        raise InputError(
            f"{len(features)} samples with {sorted(widths)} features, and {len(targets)} targets: give a row "
            "of as many features for each target"
        )
    if len(targets) < MIN_SAMPLES:
        raise InputError(f"there are {len(targets)} samples: give at least {MIN_SAMPLES}")
    x = torch.tensor([list(row) for row in features], dtype=torch.float64)
    y = torch.tensor(list(targets), dtype=torch.float64)
    wrong = ~(x.isfinite().all(1) & y.isfinite())
    if wrong.any():
        raise InputError(f"sample {int(wrong.nonzero()[0])} holds a number that is not finite: leave it out")
    return x, y


def _fitted(x: Tensor, y: Tensor, penalty: float | None) -> tuple[Tensor, Tensor, float]:
    """Weights [d] and intercept of the features as they are, and the penalty; x [n, d], y [n]."""
    mean = x.mean(0)
    scale = (x - mean).square().mean(0).sqrt()
    # Rounding makes a constant column's deviation tiny, not 0.
    scale = torch.where(scale > 1e-12 * x.abs().amax(0), scale, math.inf)
    z, centered = (x - mean) / scale, y - y.mean()
    if penalty is None:
        penalty = min(PENALTIES, key=lambda one: float(_left_out_residuals(z, centered, one).square().sum()))
    weights = _solved(z, centered, penalty) / scale
    return weights, y.mean() - mean @ weights, penalty


def _solved(z: Tensor, y: Tensor, penalty: float) -> Tensor:
    gram = z.T @ z + penalty * len(z) * torch.eye(z.shape[1], dtype=z.dtype)
    solution: Tensor = torch.linalg.solve(gram, z.T @ y)
    return solution


def _left_out_residuals(z: Tensor, y: Tensor, penalty: float) -> Tensor:
    """Residual [n] of each sample under the fit to the others: e / (1 - h), h the hat matrix's diagonal.

    Exact for a fixed scale of the features and a fixed λ·n (Hastie et al., "The Elements of Statistical
    Learning", section 7.10).
    """
    gram = z.T @ z + penalty * len(z) * torch.eye(z.shape[1], dtype=z.dtype)
    hat = (z * torch.linalg.solve(gram, z.T).T).sum(1) + 1 / len(z)
    left_out: Tensor = (y - z @ _solved(z, y, penalty)) / (1 - hat).clamp_min(1e-12)
    return left_out
