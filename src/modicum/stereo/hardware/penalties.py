"""Penalty unit: P2 of a pixel for each of the four directions, by the change of intensity along it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from amaranth.hdl import Elaboratable, Module, Mux, Signal
from amaranth.lib.memory import Memory

from modicum.stereo.hardware.position import Position
from modicum.stereo.hardware.settings import HardwareSettings

LEAD = 4
"""Clocks from the address of a pixel to P2."""


class PenaltyUnit(Elaboratable):
    """Intensities in a ring of somewhat more than a row, read at the pixel and above it; then a table.

    Args:
        settings: of the core.
        step: the clock counts for whole pixels.
        tick: the clock counts.
        position: makes a Position, given a name and a delay.

    Attributes:
        pixel: of the left image, at the delay Schedule.window.
        p2: for the pixel to the left, and above to the left, above, and to the right; at Schedule.cost.
    """

    def __init__(
        self,
        settings: HardwareSettings,
        step: Any,
        tick: Any,
        position: Callable[[str, int], Position],
    ) -> None:
        self.settings, self.step, self.tick = settings, step, tick
        schedule = settings.schedule
        self.arriving = position("penalty_arriving", schedule.window)
        self.reading = position("penalty_reading", schedule.cost - LEAD)
        self.shifting = position("penalty_shifting", schedule.cost - LEAD + 1)
        self.pixel = Signal(settings.intensity_bits)
        self.p2 = [Signal(range(settings.lengths.p2 + 1), name=f"p2_{k}") for k in range(4)]

    def elaborate(self, platform: object) -> Any:
        m = Module()
        s, schedule = self.settings, self.settings.schedule
        depth = s.width + (schedule.cost - schedule.window) // s.groups + 8
        m.submodules.ring = ring = Memory(shape=s.intensity_bits, depth=depth, init=[])
        write, own, above = ring.write_port(), ring.read_port(), ring.read_port()
        m.d.comb += [
            write.en.eq(self.step),
            write.addr.eq(self.arriving.pointer(m, "write", 0, depth)),
            write.data.eq(self.pixel),
            own.en.eq(self.tick),
            own.addr.eq(self.reading.pointer(m, "own", 0, depth)),
            above.en.eq(self.tick),
            above.addr.eq(self.reading.pointer(m, "above", 1 - s.width, depth)),
        ]
        # The pixel, the one before, and above to the right, above, above to the left.
        names = ("here", "left", "above_right", "above", "above_left")
        here, left, right_above, straight, left_above = (
            Signal(s.intensity_bits, name=name) for name in names
        )
        with m.If(self.tick & (self.shifting.group == 0)):
            m.d.sync += [here.eq(own.data), left.eq(here), right_above.eq(above.data)]
            m.d.sync += [straight.eq(right_above), left_above.eq(straight)]
        shift = 8 if s.intensity_bits > 8 else 0
        for k, other in enumerate((left, left_above, straight, right_above)):
            change = Signal(8, name=f"change_{k}")
            with m.If(self.tick):
                m.d.sync += change.eq(Mux(here < other, other - here, here - other) >> shift)
            table = Memory(shape=len(self.p2[k]), depth=256, init=s.penalties)
            m.submodules[f"table_{k}"] = table
            port = table.read_port()
            m.d.comb += [port.en.eq(self.tick), port.addr.eq(change), self.p2[k].eq(port.data)]
        return m
