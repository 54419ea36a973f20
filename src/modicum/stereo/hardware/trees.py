"""Trees of adders and of minima, balanced: depth log2 of the number of terms."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from amaranth.hdl import Elaboratable, Module, Mux, Signal


def add_all(terms: Sequence[Any]) -> Any:
    """Their sum, with as many bits as it needs."""
    level = list(terms)
    while len(level) > 1:
        level = [a + b for a, b in zip(level[::2], level[1::2], strict=False)] + level[len(level) & ~1 :]
    return level[0]


def smaller(a: Any, b: Any) -> Any:
    """The smaller of two."""
    return Mux(b < a, b, a)


def least(terms: Sequence[Any]) -> Any:
    """The smallest, in one clock.

    Four at a time: their six comparisons are made at once, so that two levels of a tree take the time of one
    comparison.
    """
    level = list(terms)
    while len(level) > 1:
        fours = [level[k : k + 4] for k in range(0, len(level), 4)]
        level = [_least_of_four(*four) if len(four) == 4 else _least_of_few(four) for four in fours]
    return level[0]


def _least_of_four(a: Any, b: Any, c: Any, d: Any) -> Any:
    is_b, is_d = b < a, d < c
    is_second = Mux(is_b, Mux(is_d, d < b, c < b), Mux(is_d, d < a, c < a))
    return Mux(is_second, Mux(is_d, d, c), Mux(is_b, b, a))


def _least_of_few(terms: Sequence[Any]) -> Any:
    found = terms[0]
    for term in terms[1:]:
        found = smaller(found, term)
    return found


class MinimumTree(Elaboratable):
    """The smallest of several numbers and where it is, a register after each level. Of equal ones the first.

    Args:
        bits: of a number.
        count: of numbers, at least 2.
        tick: the clock counts.

    Attributes:
        terms: the numbers.
        value: the smallest, (count - 1).bit_length() clocks later.
        index: its place.
    """

    def __init__(self, bits: int, count: int, tick: Any) -> None:
        self.bits, self.tick = bits, tick
        self.terms = [Signal(bits, name=f"term_{k}") for k in range(count)]
        self.value = Signal(bits)
        self.index = Signal(range(count))

    def elaborate(self, platform: object) -> Any:
        m = Module()
        level: list[tuple[Any, Any]] = [(term, k) for k, term in enumerate(self.terms)]
        while len(level) > 1:
            after: list[tuple[Any, Any]] = []
            for one, two in zip(level[::2], level[1::2], strict=False):
                is_second = two[0] < one[0]
                value, index = Signal(self.bits), Signal(len(self.index))
                with m.If(self.tick):
                    m.d.sync += [
                        value.eq(Mux(is_second, two[0], one[0])),
                        index.eq(Mux(is_second, two[1], one[1])),
                    ]
                after.append((value, index))
            for value_, index_ in level[len(level) & ~1 :]:
                value, index = Signal(self.bits), Signal(len(self.index))
                with m.If(self.tick):
                    m.d.sync += [value.eq(value_), index.eq(index_)]
                after.append((value, index))
            level = after
        m.d.comb += [self.value.eq(level[0][0]), self.index.eq(level[0][1])]
        return m
