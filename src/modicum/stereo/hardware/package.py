"""Package of a core: Verilog, a test bench that checks itself, its frame, and what the core is."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from modicum.errors import InputError
from modicum.stereo.disparity_file import write_file
from modicum.stereo.hardware.settings import HardwareSettings
from modicum.stereo.hardware.verilog import TOP, verilog
from modicum.stereo.matcher import match

_BENCH = """// Runs one frame through the core and compares it with the golden model. From this folder:
//   iverilog -g2005 -o simulation {top}.v testbench.v && vvp -n simulation
`timescale 1ns / 1ps
module testbench;
  localparam PIXELS = {pixels};
  reg clk = 0, rst = 1, in_valid = 0, out_ready = 0;
  wire in_ready, out_valid;
  reg [{bits}-1:0] left = 0, right = 0;
  wire [{disparity_bits}-1:0] disparity;
  wire [{sum_bits}-1:0] total;
  reg [{double}-1:0] pairs [0:PIXELS-1];
  reg [{disparity_bits}-1:0] expected [0:PIXELS-1];
  integer sent = 0, taken = 0, wrong = 0, clocks = 0;

  {top} core (
    .clk(clk), .rst(rst), .in_valid(in_valid), .in_ready(in_ready), .left(left), .right(right),
    .out_valid(out_valid), .out_ready(out_ready), .disparity(disparity), .total(total));

  always #5 clk = ~clk;

  initial begin
    $readmemh("frame.hex", pairs);
    $readmemh("expected.hex", expected);
    repeat (2) @(negedge clk);
    rst = 0;
    out_ready = 1;
    while (taken < PIXELS && clocks < {patience}) begin
      in_valid = sent < PIXELS;
      if (in_valid) {{left, right}} = pairs[sent];
      #1;
      if (in_valid && in_ready) sent = sent + 1;
      if (out_valid) begin
        if (disparity !== expected[taken]) wrong = wrong + 1;
        taken = taken + 1;
      end
      clocks = clocks + 1;
      @(negedge clk);
    end
    if (taken == PIXELS && wrong == 0) $display("PASS: %0d disparities in %0d clocks", taken, clocks);
    else $display("FAIL: %0d of %0d disparities differ, %0d are missing", wrong, taken, PIXELS - taken);
    $finish;
  end
endmodule
"""


def write_package(
    folder: Path | str,
    settings: HardwareSettings,
    frame: tuple[NDArray[Any], NDArray[Any]] | None = None,
    name: str = TOP,
) -> list[Path]:
    """Write the core and its test bench into a folder; the files.

    Args:
        frame: left and right image that the test bench uses; None: random dots, with disparities.

    Raises:
        InputError: a tool is not installed, the frame does not fit, or the folder cannot be written.
    """
    folder = Path(folder)
    if not name.isidentifier():
        raise InputError(f"the module's name is {name!r}: give letters, digits and _")
    left, right = frame or random_frame(settings)
    if left.shape != (settings.height, settings.width) or int(left.max()) >> settings.intensity_bits:
        raise InputError(
            f"the frame is {list(left.shape)} with values up to {left.max()}: the core is for "
            f"[{settings.height}, {settings.width}] and {settings.intensity_bits} bits"
        )
    source = verilog(settings, name)
    expected = match(left, right, settings.golden).fixed // 16
    bits = settings.intensity_bits
    bench = _BENCH.format(
        top=name,
        pixels=left.size,
        bits=bits,
        double=2 * bits,
        disparity_bits=max(1, (settings.disparities - 1).bit_length()),
        sum_bits=settings.lengths.sum_bits,
        patience=2 * settings.clocks_per_frame + 100,
    )
    pairs = (int(a) << bits | int(b) for a, b in zip(left.flat, right.flat, strict=True))
    contents = {
        f"{name}.v": source,
        "testbench.v": bench,
        "frame.hex": "".join(f"{pair:x}\n" for pair in pairs),
        "expected.hex": "".join(f"{value:x}\n" for value in expected.flat),
        "core.json": json.dumps({"module": name, **settings.to_dict()}, indent=2) + "\n",
    }
    for file, text in contents.items():
        write_file(folder / file, text.encode())
    return [folder / file for file in contents]


def random_frame(settings: HardwareSettings, seed: int = 0) -> tuple[NDArray[Any], NDArray[Any]]:
    """Random dots: two planes at different disparities, and some noise."""
    draw = np.random.default_rng(seed)
    height, width = settings.height, settings.width
    most = 2**settings.intensity_bits
    dtype = np.uint8 if settings.intensity_bits <= 8 else np.uint16
    scene = draw.integers(0, most, (height, width + settings.disparities))
    far, near = settings.disparities // 4, settings.disparities * 3 // 4
    left = scene[:, :width]
    right = scene[:, far : far + width].copy()
    half = slice(height // 4, height - height // 4)
    right[half, : width // 2] = scene[half, near : near + width // 2]
    noise = draw.integers(-2, 3, right.shape)
    return left.astype(dtype), np.clip(right + noise, 0, most - 1).astype(dtype)
