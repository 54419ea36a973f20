"""Pairs of images with dense truth, and the changes that one camera's exposure makes."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from modicum.stereo import read_image, visible
from modicum.stereo.disparity_file import read_disparity

CONDITIONS = ("clean", "gain", "gamma")
SCENES = ("cones", "teddy", "motorcycle")


@dataclass(frozen=True)
class Pair:
    """A pair under a condition. Arrays are [H, W]."""

    scene: str
    condition: str
    left: NDArray[Any]
    right: NDArray[Any]
    truth: NDArray[np.float32]
    shown: NDArray[np.bool_]
    disparities: int


def pairs(folder: Path) -> list[Pair]:
    """Three Middlebury pairs (cones and teddy of 2003, motorcycle of 2014) under each condition.

    The right image changes: gain 1.3, bias 15 and noise of standard deviation 3; or gamma 0.7 and the noise.
    """
    found = []
    for scene in SCENES:
        left, right, truth = _files(folder / scene, scene)
        for condition in CONDITIONS:
            disparities = 64 if scene != "motorcycle" else 80
            changed = changed_exposure(right, condition)
            found.append(Pair(scene, condition, left, changed, truth, visible(truth), disparities))
    return found


def changed_exposure(image: NDArray[Any], condition: str, seed: int = 0) -> NDArray[np.uint8]:
    """The image as another exposure shows it."""
    values = image.astype(np.float64)
    noise = np.random.default_rng(seed).normal(0, 3, values.shape)
    if condition == "gain":
        values = 1.3 * values + 15 + noise
    elif condition == "gamma":
        values = 255 * (values / 255) ** 0.7 + noise
    result: NDArray[np.uint8] = np.clip(np.rint(values), 0, 255).astype(np.uint8)
    return result


def _files(folder: Path, scene: str) -> tuple[NDArray[Any], NDArray[Any], NDArray[np.float32]]:
    if scene == "motorcycle":
        truth = np.load(folder / "motorcycle_disp.npz")
        exact = truth[truth.files[0]].astype(np.float32)
        exact[~np.isfinite(exact)] = np.nan
        names = ("motorcycle_left.png", "motorcycle_right.png")
    else:
        exact = read_disparity(folder / "disp2.pgm", 4)
        names = ("im2.png", "im6.png")
    left, right = (read_image(folder / name)[0] for name in names)
    return left, right, exact
