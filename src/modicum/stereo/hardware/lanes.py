"""Cost lanes: C of a group of disparities in each clock, all of them at once."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

from amaranth.hdl import Array, Elaboratable, Module, Mux, Signal

from modicum.stereo.hardware.position import Position
from modicum.stereo.hardware.settings import HardwareSettings
from modicum.stereo.hardware.trees import add_all
from modicum.stereo.hardware.windows import inside


class CostLanes(Elaboratable):
    """Differences of a column of features, sums over the window, limit.

    The window's rows come from line buffers of features, so each lane has one difference for each row and no
    memory; its columns are the sums of the pixels before.

    Args:
        settings: of the core.
        step: the clock counts for whole pixels.
        tick: the clock counts.
        positions: of the stages column, taps (in the middle row of the sum's window) and sums.

    Attributes:
        left: features of one column of the left image, the newest row first, at Schedule.column.
        right: the same of the right image.
        costs: C of the lanes, at Schedule.cost.
    """

    def __init__(
        self, settings: HardwareSettings, step: Any, tick: Any, positions: Sequence[Position]
    ) -> None:
        self.settings, self.step, self.tick = settings, step, tick
        self.at_column, self.at_taps, self.at_sums = positions
        rows = range(settings.cost.sum_window)
        self.left = [Signal(settings.feature_bits, name=f"left_{k}") for k in rows]
        self.right = [Signal(settings.feature_bits, name=f"right_{k}") for k in rows]
        self.costs = [Signal(settings.lengths.cost_bits, name=f"cost_{k}") for k in range(settings.num_lanes)]

    def elaborate(self, platform: object) -> Any:
        m = Module()
        s = self.settings
        side = s.cost.sum_window
        half = side // 2
        left = [Signal(s.feature_bits, name=f"own_{k}") for k in range(side)]
        taps = [
            [Signal(s.feature_bits, name=f"tap_{k}_{d}") for d in range(s.disparities)] for k in range(side)
        ]
        with m.If(self.step):
            is_first = self.at_column.x == 0
            for k in range(side):
                m.d.sync += [left[k].eq(self.left[k]), taps[k][0].eq(self.right[k])]
                for d in range(1, s.disparities):
                    # What is left of the image is the image's first pixel.
                    m.d.sync += taps[k][d].eq(Mux(is_first, self.right[k], taps[k][d - 1]))
        is_row = [inside(self.at_taps.y, half - k, s.height) for k in range(side)]
        is_column = [inside(self.at_sums.x, half - k, s.width) for k in range(side)]
        column_most = side * s.cost.max_difference(s.intensity_bits)
        for lane, cost in enumerate(self.costs):
            differences = []
            for k in range(side):
                mine = [taps[k][g * s.num_lanes + lane] for g in range(s.groups)]
                right = mine[0] if s.groups == 1 else Array(mine)[self.at_taps.group]
                found = Signal(range(s.cost.max_difference(s.intensity_bits) + 1))
                with m.If(self.tick):
                    m.d.sync += found.eq(Mux(is_row[k], self.difference(left[k], right), 0))
                differences.append(found)
            # The sum of a column, and those of the columns before, each `groups` clocks older.
            history = [Signal(range(column_most + 1)) for _ in range((side - 1) * s.groups + 1)]
            total = add_all(
                [Mux(is_column[k], history[k * s.groups], 0) if side > 1 else history[0] for k in range(side)]
            )
            limit = s.lengths.max_cost
            if s.cost.max_unlimited(s.intensity_bits) > limit:
                total = Mux(total > limit, limit, total)
            with m.If(self.tick):
                m.d.sync += history[0].eq(add_all(differences))
                m.d.sync += [b.eq(a) for a, b in pairwise(history)]
                m.d.sync += cost.eq(total)
        return m

    def difference(self, left: Any, right: Any) -> Any:
        """Of two features."""
        if self.settings.cost.is_binary:
            unlike = left ^ right
            return add_all([unlike[k] for k in range(self.settings.feature_bits)])
        return Mux(left < right, right - left, left - right)[: self.settings.feature_bits]
