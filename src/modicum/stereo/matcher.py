"""StereoMatcher: the disparity of each pixel of the left image, by semi-global matching in integers.

The same numbers on any processor and with any number of threads: it is the golden model that the hardware is
compared with.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from modicum.errors import InputError
from modicum.stereo.images import check_pair
from modicum.stereo.settings import StereoSettings, penalty_table

MAX_VOLUME = 8 * 2**30
"""Bytes of costs and sums together."""


@dataclass(frozen=True)
class Disparity:
    """What a match found.

    Attributes:
        fixed: int16 [H, W] in units of 1/16 pixel; -1 where there is none.
        settings: that it was found with.
    """

    fixed: NDArray[np.int16]
    settings: StereoSettings

    @cached_property
    def pixels(self) -> NDArray[np.float32]:
        """float32 [H, W] in pixels; NaN where there is none."""
        found: NDArray[np.float32] = self.fixed.astype(np.float32) / np.float32(16)
        found[self.fixed < 0] = np.nan
        return found

    @property
    def density(self) -> float:
        """Share of pixels that have one."""
        return float((self.fixed >= 0).mean())


class StereoMatcher:
    """Matches pairs of images. Keeps its memory from pair to pair.

    Args:
        settings: of the match.
        threads: that work at once, 1 to 8. Each has sums of its own, H * W * D * 2 bytes.

    Raises:
        InputError: threads is out of range, or numba is not installed.
    """

    def __init__(self, settings: StereoSettings | None = None, threads: int = 1) -> None:
        if not 1 <= threads <= 8:
            raise InputError(f"threads is {threads}: give 1 to 8")
        from modicum.stereo import kernels

        self.settings = settings or StereoSettings()
        self.threads = threads
        self._kernels: Any = kernels
        self._room: dict[str, NDArray[Any]] = {}

    def match(self, left: NDArray[Any], right: NDArray[Any]) -> Disparity:
        """The disparity of each pixel of the left image.

        Args:
            left: grey, uint8 or uint16 [H, W], of a rectified pair.
            right: of the same size and depth.

        Raises:
            InputError: the images do not fit each other, there are more disparities than columns, or the
                word lengths of the settings do not suffice.
        """
        sums = self.sums(left, right)
        refine = self.settings.refine
        check = (-1 if refine.left_right is None else refine.left_right, refine.fill)
        fixed = np.empty(left.shape, np.int16)
        self._in_bands(
            lambda rows: self._kernels.select_rows(
                sums[rows], refine.subpixel, check, refine.uniqueness, fixed[rows]
            ),
            len(fixed),
        )
        if refine.median:
            smooth = np.empty_like(fixed)
            self._in_bands(
                lambda rows: self._kernels.median_rows(fixed, rows.start, smooth[rows]), len(fixed)
            )
            fixed = smooth
        if refine.fill:
            self._kernels.fill_rows(fixed)
        return Disparity(fixed, self.settings)

    def costs(self, left: NDArray[Any], right: NDArray[Any]) -> NDArray[Any]:
        """C [H, W, D], uint8 where C_max allows it, else uint16. The next call overwrites it.

        Raises:
            InputError: as `match`.
        """
        bits = check_pair(left, right, self.settings.disparities)
        self._check_volume(left.shape)
        lengths = self.settings.word_lengths(bits)
        lengths.check()
        cost = self.settings.cost
        if cost.max_unlimited(bits) >= 2**16:
            raise InputError(
                f"{cost.kind} reaches {cost.max_unlimited(bits):,} before the limit, and 16 bits hold "
                "65,535: give a smaller window or a cost on ranks"
            )
        pair = [np.ascontiguousarray(image, np.uint16) for image in (left, right)]
        out = self._array("costs", (*left.shape, self.settings.disparities), lengths.max_cost < 256)
        limit = np.uint16(lengths.max_cost)
        radius = cost.rank_window // 2
        if cost.is_binary:
            if cost.kind == "rank-structure":
                pair = [np.invert(image) for image in pair]  # I(q) > I(p) is ~I(q) < ~I(p)
            a, b = (self._of_rows(self._kernels.census_rows, image, radius, np.uint64) for image in pair)
            self._in_bands(
                lambda rows: self._kernels.hamming_rows(a, b, rows.start, limit, out[rows]), len(out)
            )
            return out
        if cost.is_ranked:
            pair = [self._of_rows(self._kernels.rank_rows, image, radius, np.uint16) for image in pair]
        a, b = pair
        weights = (np.uint16(cost.weights[0]), np.uint16(cost.weights[1]))
        self._in_bands(
            lambda rows: self._kernels.sum_rows(a, b, rows.start, cost.sum_window, weights, limit, out[rows]),
            len(out),
        )
        return out

    def sums(self, left: NDArray[Any], right: NDArray[Any]) -> NDArray[np.uint16]:
        """S [H, W, D]: the sum over the paths. The next call overwrites it.

        Raises:
            InputError: as `match`.
        """
        costs = self.costs(left, right)
        bits = 8 * left.dtype.itemsize
        lengths = self.settings.word_lengths(bits)
        word = np.uint8 if lengths.max_within < 2**8 else np.uint16
        tables = (penalty_table(lengths, self.settings.path.contrast).astype(word), bits - 8)
        image = np.ascontiguousarray(left, np.uint16)
        passes = self._passes()
        totals = [self._array(f"sums {k}", costs.shape) for k in range(len(passes))]

        def run(k: int) -> None:
            directions, is_upward = passes[k]
            self._kernels.sweep(
                costs, image, word(lengths.p1), tables, np.array(directions), is_upward, totals[k]
            )

        self._at_once(run, len(passes))
        for more in totals[1:]:
            self._in_bands(lambda rows, more=more: self._add(totals[0][rows], more[rows]), len(image))  # type: ignore[misc]
        return totals[0]

    @staticmethod
    def _add(total: NDArray[np.uint16], more: NDArray[np.uint16]) -> None:
        total += more

    def _passes(self) -> list[tuple[list[bool], bool]]:
        """Which directions are summed together, for each pass, and whether it goes upward."""
        ways = [False, True] if self.settings.path.paths == 8 else [False]
        parts = [[True] * 4]
        if self.threads // len(ways) >= 4:
            parts = [[k == n for k in range(4)] for n in range(4)]
        elif self.threads // len(ways) >= 2:
            parts = [[True, False, True, False], [False, True, False, True]]
        return [(part, is_upward) for is_upward in ways for part in parts]

    def _of_rows(
        self, kernel: Callable[..., None], image: NDArray[np.uint16], radius: int, dtype: Any
    ) -> NDArray[Any]:
        out = np.empty(image.shape, dtype)
        self._in_bands(lambda rows: kernel(image, radius, rows.start, out[rows]), len(image))
        return out

    def _in_bands(self, work: Callable[[slice], None], height: int) -> None:
        """Call with slices of rows, one for each thread."""
        edges = [height * k // self.threads for k in range(self.threads + 1)]
        bands = [slice(a, b) for a, b in pairwise(edges) if b > a]
        self._at_once(lambda k: work(bands[k]), len(bands))

    def _at_once(self, work: Callable[[int], None], count: int) -> None:
        if self.threads == 1 or count == 1:
            for k in range(count):
                work(k)
            return
        with ThreadPoolExecutor(self.threads) as pool:
            list(pool.map(work, range(count)))

    def _array(self, name: str, shape: tuple[int, ...], is_small: bool = False) -> NDArray[Any]:
        dtype = np.uint8 if is_small else np.uint16
        found = self._room.get(name)
        if found is None or found.shape != shape or found.dtype != dtype:
            self._room.pop(name, None)
            self._room[name] = found = np.empty(shape, dtype)
        return found

    def _check_volume(self, shape: tuple[int, ...]) -> None:
        nbytes = shape[0] * shape[1] * self.settings.disparities * 2 * (1 + len(self._passes()))
        if nbytes > MAX_VOLUME:
            raise InputError(
                f"{shape[1]} x {shape[0]} pixels and {self.settings.disparities} disparities need "
                f"{nbytes / 2**30:.1f} GiB, above {MAX_VOLUME / 2**30:.0f}: give smaller images or fewer "
                "disparities or threads"
            )


def match(
    left: NDArray[Any], right: NDArray[Any], settings: StereoSettings | None = None, threads: int = 1
) -> Disparity:
    """The disparity of each pixel of the left image; see `StereoMatcher.match`.

    Raises:
        InputError: as there.
    """
    return StereoMatcher(settings, threads).match(left, right)
