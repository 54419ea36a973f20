"""Hardware: a generator of a semi-global matcher that computes all disparities of a pixel at once.

The core is written in Amaranth, becomes Verilog, and gives the numbers of the golden model bit for bit. Names
load when they are first used; all but the settings need the extra "hdl".
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from modicum.lazy_names import lazy_names

if TYPE_CHECKING:
    from modicum.stereo.hardware.core import StereoCore
    from modicum.stereo.hardware.implementation import Implementation, implement, synthesize
    from modicum.stereo.hardware.netlist_area import NetlistArea, netlist_area
    from modicum.stereo.hardware.package import write_package
    from modicum.stereo.hardware.settings import HardwareSettings, Schedule
    from modicum.stereo.hardware.simulation import simulate
    from modicum.stereo.hardware.verilog import verilog

_HOMES = {
    "core": ("StereoCore",),
    "implementation": ("Implementation", "implement", "synthesize"),
    "netlist_area": ("NetlistArea", "netlist_area"),
    "package": ("write_package",),
    "settings": ("HardwareSettings", "Schedule"),
    "simulation": ("simulate",),
    "verilog": ("verilog",),
}

__all__ = [  # noqa: RUF022  # in the order of the reader's interest
    "HardwareSettings",
    "StereoCore",
    "verilog",
    "write_package",
    "simulate",
    "synthesize",
    "netlist_area",
    "NetlistArea",
    "implement",
    "Implementation",
    "Schedule",
]

__getattr__, __dir__ = lazy_names(__name__, _HOMES, globals())
