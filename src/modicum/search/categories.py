"""Errors of untrained variants, predicted from their settings.

DONNA covers blocks that were not trained so, as recalled of the paper. Ours: for each block a ridge
regression of the error's logarithm on the settings, each value of a setting a feature of its own.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from modicum.search.predictor import MIN_SAMPLES, Predictor
from modicum.search.space import ReferenceBlock, Variant

_LEAST_ERROR = 1e-6
"""Below it errors are taken for equal."""


def encoded(variants: Sequence[Variant]) -> list[list[float]]:
    """A row for each variant: 1 for each value of a setting that it has, 0 for others."""
    told = [{key: repr(value) for key, value in variant.categories.items()} for variant in variants]
    pairs = sorted({(key, value) for one in told for key, value in one.items()})
    return [[float(one.get(key) == value) for key, value in pairs] for one in told]


def predicted_errors(
    variants: Sequence[Variant], errors: Mapping[str, float]
) -> tuple[dict[str, float], Predictor | None]:
    """The errors of a block's variants: measured where they are known, predicted where not.

    Args:
        variants: of one block.
        errors: of those that were trained, by name.

    Returns:
        Errors by name, and the predictor of the logarithm with its leave-one-out error. Too few trained
        variants (`MIN_SAMPLES`) give no predictor, and then only what was measured is returned.
    """
    known = {v.name: errors[v.name] for v in variants if v.name in errors and math.isfinite(errors[v.name])}
    open_ones = [v for v in variants if not isinstance(v, ReferenceBlock)]
    rows = dict(zip([v.name for v in open_ones], encoded(open_ones), strict=True))
    learnt = [name for name in rows if name in known]
    if len(learnt) < MIN_SAMPLES or len(known) == len(variants):
        return known, None
    targets = [math.log(max(known[name], _LEAST_ERROR)) for name in learnt]
    predictor = Predictor.fit([rows[name] for name in learnt], targets)
    found = {name: math.exp(predictor.predict(row)) for name, row in rows.items()}
    # What failed in training stays out.
    failed = {name for name, error in errors.items() if not math.isfinite(error)}
    return {name: value for name, value in (found | known).items() if name not in failed}, predictor
