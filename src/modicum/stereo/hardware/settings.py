"""Settings of the hardware, and the schedule: how many clocks after its input each number exists."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from modicum.errors import InputError
from modicum.stereo.cost import CostSettings
from modicum.stereo.settings import PathSettings, RefineSettings, StereoSettings, penalty_table
from modicum.stereo.word_lengths import WordLengths

KINDS = ("rank-ad", "rank-sad", "census", "rank-structure")
MAX_BITS = 24
"""Of a sum; the hardware has no limit of its own, a larger one is a mistake."""


@dataclass(frozen=True)
class HardwareSettings:
    """A core for frames of one size.

    Attributes:
        width: columns of a frame, at least 16.
        height: rows of a frame.
        disparities: how many are tried.
        lanes: disparities computed in a clock; divides `disparities`. None: all, one pixel a clock. With
            fewer a pixel takes disparities / lanes clocks.
        cost: rank-ad, rank-sad, census or rank-structure.
        intensity_bits: of a pixel, 1 to 16.
        path: penalties; with 4 paths.

    Raises:
        InputError: one of them is out of range.
    """

    width: int = 640
    height: int = 480
    disparities: int = 64
    lanes: int | None = None
    cost: CostSettings = field(default_factory=CostSettings)
    intensity_bits: int = 8
    path: PathSettings = field(default_factory=lambda: PathSettings(4))

    def __post_init__(self) -> None:
        if not 16 <= self.width <= 8192 or not 1 <= self.height <= 8192:
            raise InputError(
                f"frames are {self.width} x {self.height}: give 16 to 8,192 columns and 1 to 8,192 rows"
            )
        if self.disparities > self.width:
            raise InputError(
                f"there are {self.disparities} disparities and {self.width} columns: give at most as many "
                "disparities as columns"
            )
        if not 1 <= self.intensity_bits <= 16:
            raise InputError(f"intensity_bits is {self.intensity_bits}: give 1 to 16")
        if self.cost.kind not in KINDS:
            raise InputError(f"cost is {self.cost.kind!r}: the hardware has {', '.join(KINDS)}")
        if self.disparities % self.num_lanes or self.num_lanes < 1:
            raise InputError(
                f"lanes is {self.lanes}: give a divisor of the number of disparities, {self.disparities}"
            )
        if self.num_lanes == 1 and self.disparities > 1:
            raise InputError("lanes is 1: give at least 2")
        if self.path.paths != 4:
            raise InputError(f"paths is {self.path.paths}: a stream allows 4")
        self.lengths.check(MAX_BITS)

    @property
    def num_lanes(self) -> int:
        """Disparities in a clock."""
        return self.disparities if self.lanes is None else self.lanes

    @property
    def groups(self) -> int:
        """Clocks for a pixel."""
        return self.disparities // self.num_lanes

    @property
    def golden(self) -> StereoSettings:
        """Of the golden model that the core equals: `fixed` is 16 times its output."""
        return StereoSettings(
            self.disparities,
            self.cost,
            self.path,
            RefineSettings(subpixel=False, left_right=None, median=False),
        )

    @property
    def lengths(self) -> WordLengths:
        """Word lengths, proven for these settings."""
        return self.golden.word_lengths(self.intensity_bits)

    @property
    def penalties(self) -> list[int]:
        """P2 by the change of intensity, 256 entries; above 8 bits by the upper byte of 16."""
        return [int(value) for value in penalty_table(self.lengths, self.path.contrast)]

    @property
    def feature_bits(self) -> int:
        """Of what is compared for a pixel: a rank, or a string of bits."""
        neighbours = self.cost.num_neighbours
        return neighbours if self.cost.is_binary else neighbours.bit_length()

    @property
    def schedule(self) -> Schedule:
        """The delays of the stages."""
        return Schedule.of(self)

    @property
    def clocks_per_frame(self) -> int:
        """From the first pixel of a frame to the first of the next, if neither side waits."""
        return self.width * self.height * self.groups + self.schedule.output

    def to_dict(self) -> dict[str, Any]:
        """For JSON: what the core is, and its word lengths."""
        lengths = self.lengths
        return {
            "width": self.width,
            "height": self.height,
            "disparities": self.disparities,
            "lanes": self.num_lanes,
            "clocks_per_pixel": self.groups,
            "clocks_per_frame": self.clocks_per_frame,
            "cost": self.cost.kind,
            "rank_window": self.cost.rank_window,
            "window": self.cost.sum_window,
            "intensity_bits": self.intensity_bits,
            "p1": lengths.p1,
            "p2": lengths.p2,
            "contrast": self.path.contrast,
            "max_cost": lengths.max_cost,
            "cost_bits": lengths.cost_bits,
            "path_bits": lengths.path_bits,
            "sum_bits": lengths.sum_bits,
        }


@dataclass(frozen=True)
class Schedule:
    """Delays in clocks. Group g of pixel p is in a stage at clock p * groups + g + delay, waiting left out.

    Attributes:
        window: in the middle of the window of pixels.
        feature: its rank or bits.
        column: and those of the rows above.
        taps: beside those of the right pixels.
        rows: differences, of the row that is in the middle of the window of the sum.
        sums: sums of a column, of the pixel that is in the middle of the window of the sum.
        cost: C.
        tree: clocks of the minimum tree.
        output: the disparity.
    """

    window: int
    feature: int
    column: int
    taps: int
    rows: int
    sums: int
    cost: int
    tree: int
    output: int

    @classmethod
    def of(cls, settings: HardwareSettings) -> Schedule:
        """The delays that the core has."""
        groups, width = settings.groups, settings.width
        radius, half = settings.cost.rank_window // 2, settings.cost.sum_window // 2
        window = (radius * width + radius + 2) * groups
        feature = window + 2 * groups
        column = feature + (groups if half else 0)
        taps = column + groups
        rows = taps + half * width * groups + 1
        sums = rows + half * groups + 1
        tree = (settings.num_lanes - 1).bit_length()
        return cls(window, feature, column, taps, rows, sums, sums + 1, tree, sums + 1 + 2 + tree + 1)
