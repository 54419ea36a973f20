"""Evaluation: how far disparities are from the truth, over all pixels that have one and over visible ones.

bad-t is Middlebury's measure (Scharstein and Szeliski, IJCV 47, 2002), D1 that of KITTI 2015 (Menze and
Geiger, CVPR 2015). A pixel for which nothing was found counts as bad.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from modicum.errors import InputError


@dataclass(frozen=True)
class Errors:
    """Errors over a set of pixels.

    Attributes:
        pixels: in the set.
        bad_1: share whose disparity is off by more than 1 pixel, or missing.
        bad_2: by more than 2.
        d1: by more than 3 pixels and more than 5 % of the truth.
        mean: absolute error in pixels, of those that have a disparity; NaN where none has.
        density: share that has a disparity.
    """

    pixels: int
    bad_1: float
    bad_2: float
    d1: float
    mean: float
    density: float

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {name: None if value != value else value for name, value in asdict(self).items()}


def measure(
    found: NDArray[np.float32], truth: NDArray[np.float32], mask: NDArray[np.bool_] | None = None
) -> Errors:
    """Errors of disparities.

    Args:
        found: [H, W] in pixels; NaN where there is none.
        truth: [H, W] in pixels; not finite where it is not known.
        mask: pixels that count; None for all.

    Raises:
        InputError: the shapes differ, or no pixel with a truth is left.
    """
    if found.shape != truth.shape or (mask is not None and mask.shape != truth.shape):
        raise InputError(
            f"the disparities are {list(found.shape)} and the truth is {list(truth.shape)}: give one of the "
            "left image of the same size"
        )
    counts = np.isfinite(truth) if mask is None else np.isfinite(truth) & mask
    if not counts.any():
        raise InputError("no pixel has a true disparity: give a truth with finite values")
    estimate, exact = found[counts].astype(np.float64), truth[counts].astype(np.float64)
    error = np.abs(estimate - exact)
    has = np.isfinite(error)
    wrong = np.where(has, error, np.inf)
    return Errors(
        pixels=len(exact),
        bad_1=float((wrong > 1).mean()),
        bad_2=float((wrong > 2).mean()),
        d1=float(((wrong > 3) & (wrong > 0.05 * exact)).mean()),
        mean=float(error[has].mean()) if has.any() else float("nan"),
        density=float(has.mean()),
    )


def visible(truth: NDArray[np.float32]) -> NDArray[np.bool_]:
    """Pixels of the left image that the right image shows, by the truth of the left image alone.

    A pixel is hidden where one with a disparity more than 1 pixel larger falls on the same right pixel, or
    where its right pixel is outside.

    Args:
        truth: [H, W] in pixels; not finite where it is not known, which counts as not visible.
    """
    height, width = truth.shape
    known = np.isfinite(truth)
    rows, columns = np.nonzero(known)
    disparity = truth[known]
    target = np.floor(np.clip(columns - disparity + 0.5, -1, width)).astype(np.int64)
    inside = (target >= 0) & (target < width)
    nearest = np.full((height, width), -np.inf, np.float32)
    np.maximum.at(nearest, (rows[inside], target[inside]), disparity[inside])
    result = np.zeros((height, width), bool)
    shown = nearest[rows[inside], target[inside]] <= disparity[inside] + 1
    result[rows[inside][shown], columns[inside][shown]] = True
    return result
