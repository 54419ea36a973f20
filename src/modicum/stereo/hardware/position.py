"""Position: counts which pixel and group of disparities a stage holds."""

from __future__ import annotations

from typing import Any

from amaranth.hdl import Elaboratable, Module, Mux, Signal


class Position(Elaboratable):
    """Row, column and group in a stage. They go on after the frame, as the rows above are needed then, too.

    Args:
        size: columns, rows and groups of a frame.
        delay: clocks from the input to the stage.
        tick: the clock counts.
        clock: number of clocks of this frame that counted.
        restart: the last one of a frame.

    Attributes:
        x, y, group: in the stage, where `is_active`.
        is_active: whether the stage holds a pixel of the frame.
        is_last_group: the last group of a pixel.
    """

    def __init__(self, size: tuple[int, int, int], delay: int, tick: Any, clock: Any, restart: Any) -> None:
        self.size, self.delay = size, delay
        self.tick, self.clock, self.restart = tick, clock, restart
        self.x = Signal(range(size[0]))
        self.y = Signal(range(max(2, size[1])))
        self.group = Signal(range(max(2, size[2])))
        self.is_active = Signal()
        self.is_last_group = self.group == size[2] - 1

    def elaborate(self, platform: object) -> Any:
        m = Module()
        width, height, _ = self.size
        runs = Signal(init=int(self.delay == 0))
        is_over = Signal()
        m.d.comb += self.is_active.eq(runs & ~is_over)
        with m.If(self.tick):
            with m.If(runs):
                m.d.sync += self.group.eq(Mux(self.is_last_group, 0, self.group + 1))
                with m.If(self.is_last_group):
                    m.d.sync += self.x.eq(Mux(self.x == width - 1, 0, self.x + 1))
                    with m.If(self.x == width - 1):
                        m.d.sync += self.y.eq(Mux(self.y == height - 1, 0, self.y + 1))
                        m.d.sync += is_over.eq(is_over | (self.y == height - 1))
            if self.delay:
                with m.If(self.clock == self.delay - 1):
                    m.d.sync += runs.eq(1)
            with m.If(self.restart):
                m.d.sync += [self.x.eq(0), self.y.eq(0), self.group.eq(0), is_over.eq(0)]
                m.d.sync += runs.eq(int(self.delay == 0))
        return m

    def pointer(self, m: Any, name: str, start: int, depth: int) -> Any:
        """Counts pixels modulo `depth` along with the position, in a module; `start` at the first."""
        found = Signal(range(depth), init=start % depth, name=f"{name}_pointer")
        with m.If(self.tick):
            with m.If(self.is_active & self.is_last_group):
                m.d.sync += found.eq(Mux(found == depth - 1, 0, found + 1))
            with m.If(self.restart):
                m.d.sync += found.eq(start % depth)
        return found
