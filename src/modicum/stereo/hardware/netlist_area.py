"""Area of a netlist: cells of an ECP5, counted before placement."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any

_LUTS = {"LUT4": 1, "CCU2C": 2, "TRELLIS_DPR16X4": 4}
"""4-input look-up tables of each cell: a pair for two bits of a carry chain, four for memory of 16 words."""


@dataclass(frozen=True)
class NetlistArea:
    """Cells of a netlist. Placement adds look-up tables that only pass signals on.

    Attributes:
        luts: 4-input look-up tables, with those of carry chains and of memory.
        flip_flops: of one bit.
        block_rams: of 18 kbit.
    """

    luts: int
    flip_flops: int
    block_rams: int


def netlist_area(netlist: dict[str, Any], top: str) -> NetlistArea:
    """Count the cells of a flat netlist, as Yosys writes it in JSON.

    Args:
        netlist: what the file holds.
        top: name of the module.
    """
    cells = Counter(cell["type"] for cell in netlist["modules"][top]["cells"].values())
    luts = sum(count * cells[kind] for kind, count in _LUTS.items())
    return NetlistArea(luts, cells["TRELLIS_FF"], cells["DP16KD"])
