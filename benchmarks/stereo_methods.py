"""Methods of the stereo benchmark with their grids of settings: ours, and OpenCV's.

OpenCV leaves out the first columns of the left image: it is given both images with as many more columns, for
accuracy and for speed. For accuracy its result is filled as ours is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import product
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from modicum.stereo import COSTS, CostSettings, PathSettings, RefineSettings, StereoMatcher, StereoSettings
from modicum.stereo.kernels import fill_rows

Run = Callable[[NDArray[Any], NDArray[Any], int], NDArray[np.int16]]
"""Of a left and a right image and a number of disparities: 1/16 pixels, -1 for none."""
MODES = {"SGBM HH": "HH", "SGBM HH4": "HH4", "SGBM": "SGBM"}
"""OpenCV's modes: 8 paths, 4, and 5."""


@dataclass(frozen=True)
class Method:
    """A method with one setting.

    Attributes:
        name: as tables have it.
        setting: of its grid; "defaults" are those of the library, chosen on the same pairs.
        run: computes it.
    """

    name: str
    setting: str
    run: Run


def methods(is_quick: bool) -> Iterator[Method]:
    """All methods and settings; in quick two of each."""
    for group in (*(_ours(kind, paths) for kind in COSTS for paths in (4, 8)), *map(_sgbm, MODES), _block()):
        yield from group[:2] if is_quick else group


def ours(settings: StereoSettings) -> Run:
    """Our matcher; a new one each time, as hundreds of settings would keep their memory."""

    def run(left: NDArray[Any], right: NDArray[Any], disparities: int) -> NDArray[np.int16]:
        made = StereoSettings(disparities, settings.cost, settings.path, settings.refine)
        return StereoMatcher(made).match(left, right).fixed

    return run


def _ours(kind: Any, paths: int) -> list[Method]:
    refine = RefineSettings(fill=True)
    name = f"{kind}, {paths} paths"
    found = [
        Method(name, "defaults", ours(StereoSettings(64, CostSettings(kind), PathSettings(paths), refine)))
    ]
    ranks = (5, 7) if kind not in ("ad", "sad", "unified") else (5,)
    windows = (3, 5) if kind in ("sad", "rank-sad", "unified") else (3,)
    shares = (0.04, 0.08, 0.16) if kind in ("ad", "sad") else (0.2, 0.4, 0.8)
    if len(windows) == 1 and kind != "ad":
        shares = (0.4, 0.8, 1.6)
    for rank, window, share, ratio, contrast in product(ranks, windows, shares, (4, 8), (0, 8)):
        cost = CostSettings(kind, rank, window)
        p1 = max(1, round(share * cost.max_cost(8)))
        if paths * (cost.max_cost(8) + ratio * p1) >= 2**16:
            continue
        settings = StereoSettings(64, cost, PathSettings(paths, p1, ratio * p1, contrast), refine)
        found.append(
            Method(
                name,
                f"rank {rank}, window {window}, P1 {p1}, P2 {ratio * p1}, contrast {contrast}",
                ours(settings),
            )
        )
    return found


def _sgbm(name: str) -> list[Method]:
    found = []
    for block, factor, ratio, cap in product((3, 5, 7), (4, 8, 16, 32), (2, 4, 8, 16), (15, 63)):
        p1 = factor * block**2
        if ratio * p1 > 10_000:  # its sums have 16 bits
            continue
        setting = f"block {block}, P1 {p1}, P2 {ratio * p1}, prefilter {cap}"
        found.append(Method(name, setting, _run_sgbm(MODES[name], block, (p1, ratio * p1), cap)))
    return found


def sgbm(
    mode: str, disparities: int, block: int = 5, penalties: tuple[int, int] = (200, 800), cap: int = 63
) -> Any:
    """OpenCV's matcher."""
    return cv2.StereoSGBM.create(
        0,
        disparities,
        block,
        P1=penalties[0],
        P2=penalties[1],
        disp12MaxDiff=1,
        preFilterCap=cap,
        mode=getattr(cv2, f"StereoSGBM_MODE_{mode}"),
    )


def widened(left: NDArray[Any], right: NDArray[Any], disparities: int) -> tuple[NDArray[Any], NDArray[Any]]:
    """Both images [H, W] as [H, disparities + W], with the first column repeated on the left.

    OpenCV starts at column `disparities`, so it then matches all W columns of the image.
    """
    wide_left, wide_right = (
        cv2.copyMakeBorder(image, 0, 0, disparities, 0, cv2.BORDER_REPLICATE) for image in (left, right)
    )
    return wide_left, wide_right


def _run_sgbm(mode: str, block: int, penalties: tuple[int, int], cap: int) -> Run:
    def run(left: NDArray[Any], right: NDArray[Any], disparities: int) -> NDArray[np.int16]:
        return _padded(sgbm(mode, disparities, block, penalties, cap), left, right, disparities)

    return run


def _block() -> list[Method]:
    def make(block: int, cap: int, texture: int) -> Run:
        def run(left: NDArray[Any], right: NDArray[Any], disparities: int) -> NDArray[np.int16]:
            matcher = cv2.StereoBM.create(disparities, block)
            matcher.setPreFilterCap(cap)
            matcher.setTextureThreshold(texture)
            matcher.setUniquenessRatio(0)
            matcher.setDisp12MaxDiff(1)
            return _padded(matcher, left, right, disparities)

        return run

    return [
        Method("BM", f"block {block}, prefilter {cap}, texture {texture}", make(block, cap, texture))
        for block, cap, texture in product((7, 9, 11, 15, 21), (15, 31, 63), (0, 10))
    ]


def _padded(matcher: Any, left: NDArray[Any], right: NDArray[Any], disparities: int) -> NDArray[np.int16]:
    wide = widened(left, right, disparities)
    found = np.ascontiguousarray(matcher.compute(*wide)[:, disparities:])
    found[found < 0] = -1
    fill_rows(found)
    return found
