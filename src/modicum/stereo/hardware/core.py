"""StereoCore: a stream of pixel pairs in, a stream of disparities out.

    pixels -> line buffers -> rank -> line buffers -> cost lanes -> 4 path units -> sum -> minimum tree -> out

All stages move on together, in the clocks that count: those in which the input has a pixel if one is due, and
the output takes a disparity if there is one. After the last pixel of a frame the core empties itself.
"""

from __future__ import annotations

from typing import Any

from amaranth.hdl import Cat, Elaboratable, Module, Mux, Signal

from modicum.stereo.hardware.lanes import CostLanes
from modicum.stereo.hardware.paths import HorizontalPath, RowPath
from modicum.stereo.hardware.penalties import PenaltyUnit
from modicum.stereo.hardware.position import Position
from modicum.stereo.hardware.settings import HardwareSettings
from modicum.stereo.hardware.trees import MinimumTree, add_all
from modicum.stereo.hardware.windows import FeatureWindow, LineBuffer


class StereoCore(Elaboratable):
    """The hardware. Frames are in raster order, one behind the other.

    Args:
        settings: of the core.

    Attributes:
        in_valid, in_ready: a pair of pixels is taken in a clock in which both are 1.
        left, right: the pixels.
        out_valid, out_ready: a disparity is given in a clock in which both are 1. in_ready depends on
            out_ready in the same clock.
        disparity: of the left pixel, in pixels.
        total: the smallest S.
    """

    def __init__(self, settings: HardwareSettings) -> None:
        self.settings = settings
        # Amaranth takes a signal's name from an assignment to one name.
        self.in_valid = Signal()
        self.in_ready = Signal()
        self.left = Signal(settings.intensity_bits)
        self.right = Signal(settings.intensity_bits)
        self.out_valid = Signal()
        self.out_ready = Signal()
        self.disparity = Signal(range(settings.disparities))
        self.total = Signal(settings.lengths.sum_bits)
        self.middle = Signal(settings.intensity_bits)

    @property
    def ports(self) -> list[Any]:
        """All, in the order of the Verilog module, after clk and rst."""
        return [
            self.in_valid,
            self.in_ready,
            self.left,
            self.right,
            self.out_valid,
            self.out_ready,
            self.disparity,
            self.total,
        ]

    def elaborate(self, platform: object) -> Any:
        m = Module()
        s, schedule = self.settings, self.settings.schedule
        tick = Signal()
        restart = Signal()
        clock = Signal(range(s.clocks_per_frame + 1))

        def position(name: str, delay: int) -> Position:
            made = Position((s.width, s.height, s.groups), delay, tick, clock, restart)
            m.submodules[name] = made
            return made

        arriving, leaving = position("arriving", 0), position("leaving", schedule.output)
        step = Signal()
        is_taken = Signal()
        is_there = Signal()
        needs_pixel = arriving.is_active & arriving.is_last_group
        is_free = ~self.out_valid | self.out_ready
        m.d.comb += [
            is_there.eq(leaving.is_active & leaving.is_last_group),
            self.out_valid.eq(is_there & ~is_taken),
            self.in_ready.eq(needs_pixel & is_free),
            tick.eq(is_free & (~needs_pixel | self.in_valid)),
            step.eq(tick & arriving.is_last_group),
            restart.eq(clock == s.clocks_per_frame - 1),
        ]
        with m.If(tick):
            m.d.sync += clock.eq(Mux(restart, 0, clock + 1))
            m.d.sync += is_taken.eq(0)
        with m.Elif(self.out_ready):
            m.d.sync += is_taken.eq(is_there)  # and waits for a pixel
        lanes = self.lanes(m, step, tick, position, arriving)
        at_cost = position("at_cost", schedule.cost)
        m.submodules.path_left = first = HorizontalPath(s, tick, at_cost)
        paths: list[Any] = [first]
        for name, offset in (("path_above_left", -1), ("path_above", 0), ("path_above_right", 1)):
            made = RowPath(s, tick, (clock, restart), at_cost, offset)
            m.submodules[name] = made
            paths.append(made)
        penalties: list[Any] = [s.lengths.p2] * 4
        if s.path.contrast:
            m.submodules.penalties = unit = PenaltyUnit(s, step, tick, position)
            m.d.comb += unit.pixel.eq(self.middle)
            penalties = unit.p2
        for path, p2 in zip(paths, penalties, strict=True):
            m.d.comb += path.p2.eq(p2)
            m.d.comb += [a.eq(b) for a, b in zip(path.costs, lanes.costs, strict=True)]
        self.select(m, tick, paths, position("selecting", schedule.output - 1))
        return m

    def lanes(self, m: Any, step: Any, tick: Any, position: Any, arriving: Position) -> CostLanes:
        """From pixels to costs."""
        s, schedule = self.settings, self.settings.schedule
        side = s.cost.sum_window
        middle = position("at_window", schedule.window)
        features = []
        for name, pixel in (("window_left", self.left), ("window_right", self.right)):
            made = FeatureWindow(s, step, middle)
            m.submodules[name] = made
            m.d.comb += [made.pixel.eq(pixel), made.x.eq(arriving.x)]
            features.append(made.feature)
        m.d.comb += self.middle.eq(m.submodules.window_left.middle)
        positions = [
            position("at_column", schedule.column),
            position("at_rows", schedule.rows - 1),
            position("at_sums", schedule.sums),
        ]
        m.submodules.lanes = lanes = CostLanes(s, step, tick, positions)
        if side == 1:
            m.d.comb += [lanes.left[0].eq(features[0]), lanes.right[0].eq(features[1])]
            return lanes
        at_feature = position("at_feature", schedule.feature)
        m.submodules.feature_lines = lines = LineBuffer(2 * s.feature_bits, side, s.width, step)
        m.d.comb += [lines.value.eq(Cat(features)), lines.x.eq(at_feature.x)]
        for k in range(side):
            m.d.comb += Cat(lanes.left[k], lanes.right[k]).eq(lines.column[k])
        return lanes

    def select(self, m: Any, tick: Any, paths: list[Any], at: Position) -> None:
        """From path values to the output."""
        s = self.settings
        m.submodules.tree = tree = MinimumTree(s.lengths.sum_bits, s.num_lanes, tick)
        sums = [Signal(s.lengths.sum_bits, name=f"sum_{k}") for k in range(s.num_lanes)]
        m.d.comb += [term.eq(value) for term, value in zip(tree.terms, sums, strict=True)]
        with m.If(tick):
            for k, value in enumerate(sums):
                m.d.sync += value.eq(add_all([path.values[k] for path in paths]))
            is_better = tree.value < self.total if s.groups > 1 else 1
            with m.If((at.group == 0) | is_better):
                m.d.sync += [
                    self.total.eq(tree.value),
                    self.disparity.eq(at.group * s.num_lanes + tree.index),
                ]
