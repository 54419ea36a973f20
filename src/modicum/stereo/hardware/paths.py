"""Path units: L of a group of disparities in each clock, one unit for each of the four causal directions."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

from amaranth.hdl import Cat, Elaboratable, Module, Mux, Signal
from amaranth.lib.memory import Memory

from modicum.stereo.hardware.position import Position
from modicum.stereo.hardware.settings import HardwareSettings
from modicum.stereo.hardware.trees import MinimumTree, least, smaller

Lane = Any


class PathStep:
    """One step of the recurrence, for the lanes of a group.

    With T the minimum without a jump and m the smallest L of the pixel before, L = C + min(T, m + P2) - m is
    C + P2 if m < T - P2, else T + C - m. All but one comparison, one subtraction and one choice is done while
    the tree still looks for m.

    Args:
        settings: of the core.
        group: which group, a signal.
        p2: of this pixel, a signal or a number.
    """

    def __init__(self, settings: HardwareSettings, group: Any, p2: Any) -> None:
        self.settings, self.group, self.p2 = settings, group, p2
        self.lengths = settings.lengths
        # No number on the way is larger than the next power of two: see modicum.stereo.word_lengths.
        self.infinity = 2 ** self.lengths.max_within.bit_length() - 1

    def values(
        self, costs: Sequence[Lane], before: Sequence[Lane], beside: tuple[Lane, Lane], minimum: Any
    ) -> list[Any]:
        """L of each lane.

        Args:
            costs: C.
            before: L of the pixel before, of the same group.
            beside: of the disparities below and above the group, for more than one group.
            minimum: the smallest L of the pixel before.
        """
        lanes, groups = len(costs), self.settings.groups
        raised = []
        for k in range(-1, lanes + 1):
            value: Any = before[k] + self.lengths.p1 if 0 <= k < lanes else None
            if groups > 1 and k == -1:
                value = Mux(self.group == 0, self.infinity, beside[0] + self.lengths.p1)
            if groups > 1 and k == lanes:
                value = Mux(self.group == groups - 1, self.infinity, beside[1] + self.lengths.p1)
            raised.append(value)
        bits = self.lengths.path_bits
        found = []
        for k, (cost, own) in enumerate(zip(costs, before, strict=True)):
            neighbours = [value for value in (raised[k], raised[k + 2]) if value is not None]
            steady = least([own, *neighbours])
            is_jump = minimum < steady - self.p2  # of numbers with signs
            found.append(Mux(is_jump, (cost + self.p2)[:bits], (steady + cost - minimum)[:bits]))
        return found


class HorizontalPath(Elaboratable):
    """From the pixel to the left: L stays in registers. Its loop through the minimum tree sets the clock.

    Args:
        settings: of the core.
        tick: the clock counts.
        at: position of the costs.

    Attributes:
        costs: C of the lanes.
        p2: of the pixel.
        values: L of the lanes, one clock later.
    """

    def __init__(self, settings: HardwareSettings, tick: Any, at: Position) -> None:
        self.settings, self.tick, self.at = settings, tick, at
        self.p2 = Signal(range(settings.lengths.p2 + 1))
        self.costs = [Signal(settings.lengths.cost_bits, name=f"cost_{k}") for k in range(settings.num_lanes)]
        self.values = [
            Signal(settings.lengths.path_bits, name=f"value_{k}") for k in range(settings.num_lanes)
        ]

    def elaborate(self, platform: object) -> Any:
        m = Module()
        s, bits = self.settings, self.settings.lengths.path_bits
        # history[k]: L of k + 1 clocks before.
        history = [self.values] + [
            [Signal(bits, name=f"value_{n}_{k}") for k in range(s.num_lanes)] for n in range(1, s.groups + 1)
        ]
        newest = Signal(bits)
        m.d.comb += newest.eq(least(self.values))
        minimum: Any = newest
        if s.groups > 1:
            of_groups, held = Signal(bits), Signal(bits)
            minimum = Signal(bits)
            is_new = self.at.group == 0
            m.d.comb += minimum.eq(Mux(is_new, smaller(of_groups, newest), held))
            with m.If(self.tick):
                m.d.sync += held.eq(minimum)
                m.d.sync += of_groups.eq(Mux(self.at.group == 1, newest, smaller(of_groups, newest)))
        beside = (history[s.groups][-1], history[max(0, s.groups - 2)][0])
        before = history[s.groups - 1]
        found = PathStep(s, self.at.group, self.p2).values(self.costs, before, beside, minimum)
        is_first = self.at.x == 0
        with m.If(self.tick):
            for value, cost, new in zip(self.values, self.costs, found, strict=True):
                m.d.sync += value.eq(Mux(is_first, cost, new))
            for older, newer in zip(history[1:], history, strict=False):
                m.d.sync += [a.eq(b) for a, b in zip(older, newer, strict=True)]
        return m


class RowPath(Elaboratable):
    """From a pixel of the row above: L goes through a memory of one row, and its minimum through another.

    Args:
        settings: of the core.
        tick: the clock counts.
        clock: number of clocks of this frame that counted.
        restart: the last one of a frame.
        at: position of the costs.
        offset: x of the pixel above minus x: -1, 0 or 1.

    Attributes:
        costs: C of the lanes.
        p2: of the pixel.
        values: L of the lanes, one clock later.
    """

    def __init__(
        self, settings: HardwareSettings, tick: Any, clock: tuple[Any, Any], at: Position, offset: int
    ) -> None:
        self.settings, self.tick, self.at, self.offset = settings, tick, at, offset
        self.clock, self.restart = clock
        self.p2 = Signal(range(settings.lengths.p2 + 1))
        self.costs = [Signal(settings.lengths.cost_bits, name=f"cost_{k}") for k in range(settings.num_lanes)]
        self.values = [
            Signal(settings.lengths.path_bits, name=f"value_{k}") for k in range(settings.num_lanes)
        ]

    def elaborate(self, platform: object) -> Any:
        m = Module()
        s, bits = self.settings, self.settings.lengths.path_bits
        schedule, size = s.schedule, (s.width, s.height, s.groups)
        # From the address to L: the memory's data, a register; one more where the group after is needed.
        lead = 2 if s.groups == 1 else 3

        def position(name: str, delay: int) -> Position:
            made = Position(size, delay, self.tick, self.clock, self.restart)
            m.submodules[name] = made
            return made

        # A ring of somewhat more than a row: nothing is overwritten before it was read.
        depth = s.width + 2
        m.submodules.values = values = Memory(shape=bits * s.num_lanes, depth=depth * s.groups, init=[])
        m.submodules.minima = minima = Memory(shape=bits, depth=depth, init=[])
        reading = position("reading", schedule.cost - lead)
        read_at = reading.pointer(m, "read", -s.width + self.offset, depth)
        data, minimum_data = values.read_port(), minima.read_port()
        m.d.comb += [
            data.en.eq(self.tick),
            data.addr.eq(read_at * s.groups + reading.group),
            minimum_data.en.eq(self.tick),
            minimum_data.addr.eq(read_at),
        ]
        # One clock after the address: none of it outside the image.
        masking = position("masking", schedule.cost - lead + 1)
        x_inside = {-1: masking.x != 0, 0: 1, 1: masking.x != s.width - 1}[self.offset]
        is_inside = (masking.y != 0) & x_inside
        stages = [[Signal(bits, name=f"before_{n}_{k}") for k in range(s.num_lanes)] for n in range(3)]
        minimum_stages = [Signal(bits, name=f"minimum_{n}") for n in range(2)]
        with m.If(self.tick):
            for k, value in enumerate(stages[0]):
                m.d.sync += value.eq(Mux(is_inside, data.data[k * bits : (k + 1) * bits], 0))
            m.d.sync += minimum_stages[0].eq(Mux(is_inside, minimum_data.data, 0))
            if s.groups > 1:
                for newer, older in pairwise(stages):
                    m.d.sync += [b.eq(a) for a, b in zip(newer, older, strict=True)]
                m.d.sync += minimum_stages[1].eq(minimum_stages[0])
        before = stages[lead - 2]
        beside = (stages[2][-1], stages[0][0])
        minimum = minimum_stages[lead - 2]
        found = PathStep(s, self.at.group, self.p2).values(self.costs, before, beside, minimum)
        with m.If(self.tick):
            m.d.sync += [value.eq(new) for value, new in zip(self.values, found, strict=True)]
        self.store(m, (values, minima), position, depth)
        return m

    def store(self, m: Any, memories: tuple[Any, Any], position: Any, depth: int) -> None:
        """Write L one clock after it was computed, and its minimum when the tree has it."""
        s, schedule = self.settings, self.settings.schedule
        write, write_minimum = (memory.write_port() for memory in memories)
        writing = position("writing", schedule.cost + 1)
        write_at = writing.pointer(m, "write", 0, depth)
        m.d.comb += [
            write.en.eq(self.tick & writing.is_active),
            write.addr.eq(write_at * s.groups + writing.group),
            write.data.eq(Cat(self.values)),
        ]
        m.submodules.tree = tree = MinimumTree(s.lengths.path_bits, s.num_lanes, self.tick)
        m.d.comb += [term.eq(value) for term, value in zip(tree.terms, self.values, strict=True)]
        finding = position("finding", schedule.cost + 1 + schedule.tree)
        found_at = finding.pointer(m, "found", 0, depth)
        found: Any = tree.value
        if s.groups > 1:
            held = Signal(s.lengths.path_bits)
            found = Signal(s.lengths.path_bits)
            m.d.comb += found.eq(Mux(finding.group == 0, tree.value, smaller(held, tree.value)))
            with m.If(self.tick):
                m.d.sync += held.eq(found)
        m.d.comb += [
            write_minimum.en.eq(self.tick & finding.is_active & finding.is_last_group),
            write_minimum.addr.eq(found_at),
            write_minimum.data.eq(found),
        ]
