"""Windows of a stream of pixels: line buffers, and the rank or bits of the pixel in the middle."""

from __future__ import annotations

from typing import Any

from amaranth.hdl import Cat, Elaboratable, Module, Signal
from amaranth.lib.memory import Memory

from modicum.stereo.hardware.position import Position
from modicum.stereo.hardware.settings import HardwareSettings
from modicum.stereo.hardware.trees import add_all


class LineBuffer(Elaboratable):
    """The rows above a stream: a column of them, one step after its newest value.

    Args:
        bits: of a value.
        rows: of a column, at least 2.
        width: columns.
        step: the clock counts.

    Attributes:
        value: the newest, in column x.
        x: its column.
        column: values of one column, the newest row first, one step later.
    """

    def __init__(self, bits: int, rows: int, width: int, step: Any) -> None:
        self.bits, self.rows, self.width, self.step = bits, rows, width, step
        self.value, self.x = Signal(bits), Signal(range(width))
        self.column = [Signal(bits, name=f"row_{k}") for k in range(rows)]

    def elaborate(self, platform: object) -> Any:
        m = Module()
        m.submodules.memory = memory = Memory(shape=self.bits * (self.rows - 1), depth=self.width, init=[])
        read, write = memory.read_port(), memory.write_port()
        x = Signal(range(self.width))
        m.d.comb += [
            read.en.eq(self.step),
            read.addr.eq(self.x),
            write.en.eq(self.step),
            write.addr.eq(x),
            Cat(self.column[1:]).eq(read.data),
            write.data.eq(Cat(self.column[:-1])),
        ]
        with m.If(self.step):
            m.d.sync += [x.eq(self.x), self.column[0].eq(self.value)]
        return m


class FeatureWindow(Elaboratable):
    """The rank or census bits of each pixel of one image; see `modicum.stereo.cost`.

    Args:
        settings: of the core.
        step: the clock counts.
        centre: position of the pixel in the middle, at the delay Schedule.window.

    Attributes:
        pixel: the newest one.
        x: its column.
        middle: the pixel in the middle, at the delay Schedule.window.
        feature: at the delay Schedule.feature.
    """

    def __init__(self, settings: HardwareSettings, step: Any, centre: Position) -> None:
        self.settings, self.step, self.centre = settings, step, centre
        self.pixel = Signal(settings.intensity_bits)
        self.x = Signal(range(settings.width))
        self.middle = Signal(settings.intensity_bits)
        self.feature = Signal(settings.feature_bits)

    def elaborate(self, platform: object) -> Any:
        m = Module()
        s, centre = self.settings, self.centre
        side = s.cost.rank_window
        radius = side // 2
        m.submodules.lines = lines = LineBuffer(s.intensity_bits, side, s.width, self.step)
        m.d.comb += [lines.value.eq(self.pixel), lines.x.eq(self.x)]
        # window[row][column], the newest first: (dy, dx) from the middle is at radius - dy, radius - dx.
        window = [[Signal(s.intensity_bits, name=f"pixel_{y}_{x}") for x in range(side)] for y in range(side)]
        own = window[radius][radius]
        m.d.comb += self.middle.eq(own)
        bits: list[Any] = []
        for dy in range(-radius, radius + 1):
            for dx in range(-radius, radius + 1):
                if dx == 0 and dy == 0:
                    continue
                other = window[radius - dy][radius - dx]
                is_inside = inside(centre.y, dy, s.height) & inside(centre.x, dx, s.width)
                is_unlike = other > own if s.cost.kind == "rank-structure" else other < own
                bit = Signal(name=f"bit_{len(bits)}")
                with m.If(self.step):
                    m.d.sync += bit.eq(is_unlike & is_inside)
                bits.append(bit)
        with m.If(self.step):
            for y in range(side):
                m.d.sync += window[y][0].eq(lines.column[y])
                m.d.sync += [window[y][x].eq(window[y][x - 1]) for x in range(1, side)]
            m.d.sync += self.feature.eq(Cat(bits) if s.cost.is_binary else add_all(bits))
        return m


def inside(place: Any, offset: int, size: int) -> Any:
    """Whether place + offset is at least 0 and below size."""
    if offset < 0:
        return place >= -offset
    return place < size - offset if offset else 1
