"""Least: the smallest that a model and its cache can be, known from shapes before anything is measured."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from modicum.fit.cache_option import CacheOption, CacheSizes
from modicum.fit.fit_plan import FitPlan
from modicum.fit.library import Library
from modicum.fit.part import Part, held_nbytes, is_held_packed
from modicum.fit.settings import Target
from modicum.weights import packed


def least_plan(
    library: Library, fixed_nbytes: int, sizes: CacheSizes, stores: Sequence[str], target: Target
) -> FitPlan:
    """The options that take the fewest bytes that may be chosen; of equal ones the first. Its loss is not
    known.
    """
    options, weights = {}, fixed_nbytes
    for part in library.parts:
        took = {option.name: _nbytes(library, part, option.name) for option in library.options}
        options[part.name] = min(took, key=lambda name: took[name])
        weights += took[options[part.name]]
    tokens = sizes.smallest(target.context)
    caches = [CacheOption(store, tokens, target.context) for store in stores]
    cache = min(caches, key=sizes.nbytes)
    return FitPlan(options, cache, weights, sizes.nbytes(cache), math.nan, "least")


def _nbytes(library: Library, part: Part, option: str) -> int:
    if next(x for x in library.options if x.name == option).is_dense:
        return sum(matrix.weight.nbytes for matrix in part.matrices)
    pattern = library.plan_of(option).pattern
    return sum(
        _pruned(matrix.weight, int(pattern.select(torch.zeros(1, matrix.weight.shape[1])).sum()))
        if is_held_packed(library.model, matrix)
        else matrix.weight.nbytes
        for matrix in part.matrices
    )


def _pruned(weight: Tensor, kept: int) -> int:
    """Bytes of a weight of whose rows so many are kept."""
    rows, width = weight.shape
    return held_nbytes(rows, width, rows * kept, packed.narrow(weight).itemsize)
