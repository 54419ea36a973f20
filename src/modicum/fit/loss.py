"""Loss: what block errors add up to, as the predictor weighs them."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass

from modicum.fit.probe import Errors
from modicum.search.predictor import MIN_SAMPLES, Predictor, kendall_tau

KINDS = ("attention", "mlp", "cache")
Sums = dict[str, Errors]
"""Of a plan: by kind, the sum of its parts' errors."""


@dataclass(frozen=True)
class Loss:
    """A weighted sum of block errors; of running text and of answers by weights of their own.

    Attributes:
        task_share: of the answers' error.
        text, answers: a factor for each of `KINDS`. 1 for each is the plain sum: KL is quadratic in small
            changes, so errors of blocks that do not go together add up.
        intercepts: what is added to the sum of text and to that of answers, nats; 0 for the plain sum.
    """

    task_share: float = 0.5
    text: tuple[float, float, float] = (1.0, 1.0, 1.0)
    answers: tuple[float, float, float] = (1.0, 1.0, 1.0)
    intercepts: tuple[float, float] = (0.0, 0.0)

    @property
    def intercept(self) -> float:
        """What a whole plan has beside what its parts and its cache add."""
        return (1 - self.task_share) * self.intercepts[0] + self.task_share * self.intercepts[1]

    def of_part(self, part: str, errors: Errors) -> float:
        """What a part's variant adds. part: such as "3.mlp"."""
        return self._of(KINDS.index(part.partition(".")[2]), errors)

    def of_cache(self, errors: Errors) -> float:
        """What a cache adds."""
        return self._of(KINDS.index("cache"), errors)

    def of(self, sums: Sums) -> float:
        """Of a whole plan, the intercept included."""
        return self.intercept + sum(self._of(KINDS.index(kind), errors) for kind, errors in sums.items())

    def _of(self, kind: int, errors: Errors) -> float:
        scaled = Errors(self.text[kind] * errors.text, self.answers[kind] * errors.answers, errors.kept)
        return scaled.loss(self.task_share)


@dataclass(frozen=True)
class Check:
    """How well a loss orders assembled models.

    Attributes:
        samples: how many models, those whose errors are no numbers left out.
        plain_tau: Kendall's τ of the plain sum and the measured loss.
        fitted_tau: of the fitted sum, each sample predicted by the fit to the others; NaN where none was
            fitted.
        is_fitted: whether the fitted sum is used.
        bytes_tau: of the measured loss and minus the bytes, the simple alternative to a predictor; NaN where
            it was not computed.
    """

    samples: int
    plain_tau: float
    fitted_tau: float
    is_fitted: bool
    bytes_tau: float = math.nan

    @property
    def tau(self) -> float:
        """Of the loss that is used."""
        return self.fitted_tau if self.is_fitted else self.plain_tau


def fit_loss(sums: Sequence[Sums], measured: Sequence[Errors], task_share: float) -> tuple[Loss, Check]:
    """The loss that orders assembled models best: the plain sum, or one fitted by ridge regression.

    Errors of text and of answers are fitted apart. It is taken where no factor is
    below 0 and its left-out τ is above the plain sum's. Samples whose errors are not finite numbers are left
    out, with a warning.
    """
    finite = [i for i, errors in enumerate(measured) if errors.is_finite]
    if len(finite) < len(measured):
        warnings.warn(
            f"{len(measured) - len(finite)} of {len(measured)} assembled models give values that are not "
            "numbers: the predictor leaves them out",
            stacklevel=2,
        )
        sums, measured = [sums[i] for i in finite], [measured[i] for i in finite]
    plain = Loss(task_share)
    truth = [errors.loss(task_share) for errors in measured]
    plain_tau = kendall_tau([plain.of(x) for x in sums], truth)
    unfitted = Check(len(sums), plain_tau, math.nan, False)
    if len(sums) < MIN_SAMPLES:
        return plain, unfitted
    text = Predictor.fit([[x[k].text for k in KINDS] for x in sums], [e.text for e in measured])
    answers = Predictor.fit([[x[k].answers for k in KINDS] for x in sums], [e.answers for e in measured])
    left_out = [
        (1 - task_share) * a + task_share * b for a, b in zip(text.left_out, answers.left_out, strict=True)
    ]
    fitted_tau = kendall_tau(left_out, truth)
    factors = (*(text.weights if task_share < 1 else ()), *(answers.weights if task_share else ()))
    is_better = min(factors) > 0 and fitted_tau > plain_tau
    if not is_better:
        return plain, Check(len(sums), plain_tau, fitted_tau, False)
    of_text, of_answers = [(w[0], w[1], w[2]) for w in (text.weights, answers.weights)]
    intercepts = (text.intercept, answers.intercept)
    return Loss(task_share, of_text, of_answers, intercepts), Check(len(sums), plain_tau, fitted_tau, True)
