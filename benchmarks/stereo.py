"""Stereo matching: accuracy and speed beside OpenCV, area and clock of the hardware. One process, resumable.

    python benchmarks/stereo.py --work FOLDER --data FOLDER accuracy   # about half an hour
    python benchmarks/stereo.py --work FOLDER --data FOLDER speed      # a minute
    python benchmarks/stereo.py --work FOLDER synthesis                # half an hour: area of netlists
    python benchmarks/stereo.py --work FOLDER hardware                 # hours: place and route
    python benchmarks/stereo.py --work FOLDER --data FOLDER --quick accuracy speed synthesis hardware
    python benchmarks/stereo.py --work FOLDER --docs                   # docs/benchmarks_stereo.json, tables

--data holds cones and teddy (im2.png, im6.png, disp2.pgm of Middlebury 2003) and motorcycle (as scikit-image
has it). Needs opencv-python-headless; for hardware the extra "hdl".
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Any

import cv2
import machine
import numba
import numpy as np
from measured_rows import append_row, read_rows, work_folder, write_docs
from stereo_methods import Method, methods, sgbm, widened
from stereo_pairs import Pair, pairs
from stereo_tables import ERRORS, section

from modicum.measure import Spread, TimingSettings, interleaved
from modicum.stereo import CostSettings, PathSettings, StereoMatcher, StereoSettings, measure
from modicum.stereo.hardware import HardwareSettings, implement, netlist_area, synthesize
from modicum.stereo.hardware.implementation import DEVICE_NAME
from modicum.stereo.hardware.verilog import TOP

PARTS = ("accuracy", "speed", "synthesis", "hardware")
SIZE = (640, 480, 64)
CORES = [
    *((kind, d, None) for kind in ("rank-structure", "rank-sad") for d in (16, 32, 64)),
    ("rank-structure", 64, 16),
    ("rank-ad", 64, None),
]
"""Cost, disparities and lanes of the cores."""


class Bench:
    """Rows in a folder."""

    def __init__(self, work: Path, is_quick: bool) -> None:
        self.work, self.is_quick = work, is_quick
        self.rows = read_rows(work)

    def has(self, **key: Any) -> bool:
        """Whether there is such a row."""
        return any(key.items() <= row.items() for row in self.rows)

    def add(self, row: dict[str, Any]) -> None:
        """Write a row."""
        append_row(self.work, row)
        self.rows.append(row)

    def accuracy(self, data: Path) -> None:
        """Errors of each method and setting on all pairs."""
        cv2.setNumThreads(1)
        known = pairs(data)
        for method in methods(self.is_quick):
            key = {"kind": "accuracy", "name": method.name, "setting": method.setting}
            if not self.has(**key):
                self.add(key | {"errors": {f"{p.scene} {p.condition}": errors(method, p) for p in known}})
                print(method.name, method.setting, file=sys.stderr, flush=True)

    def speed(self, data: Path) -> None:
        """Seconds of a frame, all methods in turn."""
        for threads in (1, 2):
            key = {"kind": "speed", "threads": threads}
            if not self.has(**key):
                self.add(key | times(pairs(data)[0], threads, 3 if self.is_quick else 21))

    def synthesis(self) -> None:
        """Area of each core's netlist."""
        for settings in cores(self.is_quick):
            key = {"kind": "synthesis", **settings.to_dict()}
            if not self.has(**key):
                netlist = json.loads(synthesize(self.folder(settings), settings).read_text(encoding="utf-8"))
                self.add(key | asdict(netlist_area(netlist, TOP)))
                print(self.rows[-1], file=sys.stderr, flush=True)

    def hardware(self) -> None:
        """Area and clock of each core, placed and routed."""
        for settings in cores(self.is_quick):
            key = {"kind": "hardware", **settings.to_dict()}
            if self.has(**key):
                continue
            started = time.perf_counter()
            found = implement(self.folder(settings), settings)
            told = {"luts": found.luts, "flip_flops": found.flip_flops, "block_rams": found.block_rams}
            told |= {"megahertz": found.megahertz, "device": DEVICE_NAME, "cells": found.cells}
            self.add(key | told | {"seconds": round(time.perf_counter() - started)})
            print(self.rows[-1], file=sys.stderr, flush=True)

    def folder(self, settings: HardwareSettings) -> Path:
        """Of a core's files."""
        return self.work / f"{settings.cost.kind}-{settings.disparities}-{settings.num_lanes}"


def cores(is_quick: bool) -> list[HardwareSettings]:
    """What is synthesised: `CORES`, or one small core."""
    width, height, _ = SIZE
    if is_quick:
        return [HardwareSettings(32, 16, 4, None, CostSettings("rank-structure"))]
    return [HardwareSettings(width, height, d, lanes, CostSettings(kind)) for kind, d, lanes in CORES]


def errors(method: Method, pair: Pair) -> list[float]:
    """Of a pair, as `stereo_tables.ERRORS` lists them; in four digits."""
    fixed = method.run(pair.left, pair.right, pair.disparities)
    found = np.where(fixed < 0, np.nan, fixed / 16).astype(np.float32)
    of_parts = {"visible": measure(found, pair.truth, pair.shown), "all": measure(found, pair.truth)}
    return [float(f"{getattr(of_parts[part], name):.4g}") for part, name in ERRORS]


def times(pair: Pair, threads: int, rounds: int) -> dict[str, Any]:
    """Of a frame of the size that all compare at: medians, and ratios round by round."""
    width, height, disparities = SIZE
    left, right = (cv2.resize(image, (width, height)) for image in (pair.left, pair.right))
    wide = widened(left, right, disparities)  # outside the clock: it is no work of OpenCV's
    cv2.setNumThreads(threads)
    runs: dict[str, Callable[[], object]] = {}
    for mode in ("HH", "HH4", "SGBM", "SGBM_3WAY"):
        runs[f"SGBM {mode}".replace("SGBM SGBM", "SGBM")] = partial(sgbm(mode, disparities).compute, *wide)
    block = cv2.StereoBM.create(disparities, 15)
    runs["BM"] = partial(block.compute, *wide)
    for kind in ("rank-structure", "rank-sad"):
        for paths in (4, 8):
            settings = StereoSettings(disparities, CostSettings(kind), PathSettings(paths))
            matcher = StereoMatcher(settings, threads)
            runs[f"{kind}, {paths} paths"] = partial(matcher.match, left, right)
    clock = time.thread_time if threads == 1 else time.perf_counter
    measured = interleaved(runs, TimingSettings(rounds, 0.01), clock)
    base = measured["SGBM HH"]
    told = {
        name: {
            "seconds": statistics.median(samples),
            "ratio": asdict(Spread.of([b / own for b, own in zip(base, samples, strict=True)])),
        }
        for name, samples in measured.items()
    }
    return {"evaluations": width * height * disparities, "is_widened": True, "methods": told}


def main() -> None:
    """Measure what is missing, or write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument(
        "parts",
        nargs="*",
        choices=[*PARTS, []],
        help="what is measured",
    )
    parser.add_argument("--work", type=Path, required=True, help="gets rows.jsonl and the tools' files")
    parser.add_argument("--data", type=Path, help="folders cones, teddy and motorcycle")
    parser.add_argument(
        "--quick", action="store_true", help="two settings a method, small cores; for a trial"
    )
    parser.add_argument("--docs", action="store_true", help="write the tables of what was measured")
    asked = parser.parse_args()
    versions = {"opencv": cv2.__version__, "numba": numba.__version__}
    if asked.docs:
        write_docs(asked.work, section, "benchmarks_stereo.json", "stereo.md", "stereo", versions)
        return
    bench = Bench(work_folder(asked.work, asked.quick), asked.quick)
    for part in asked.parts:
        if part in ("synthesis", "hardware"):
            getattr(bench, part)()
        elif asked.data is None:
            raise SystemExit(f"{part} needs --data: the folder of the pairs")
        else:
            getattr(bench, part)(asked.data)
    raw = {"date": datetime.now().date().isoformat(), "machine": machine.describe(), **versions}
    print(section(raw | {"rows": bench.rows}))


if __name__ == "__main__":
    main()
