"""Run the numeric tests under each instruction set and number of threads; one line for each.

    python tools/portable.py [--fast] [--workers 2] [--logs FOLDER] [pytest's own arguments]

Sums are made in another order under each setting, so results differ by their rounding. The tests must pass
all the same: their tolerances follow from error bounds (tests/bounds.py). An instruction set that this
processor lacks is named and skipped. The exit status is 1 if a test failed anywhere.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import torch

NUMERIC = (
    "tests/kv",
    "tests/kernels",
    "tests/weights",
    "tests/contract",
    "tests/reference",
    "tests/report",
    "tests/distill",
    "tests/quant",
    "tests/speech",
    "tests/search",
    "tests/vision",
    "tests/fit",
    "tests/stereo",
)
THREADS = (1, 2)


@dataclass(frozen=True)
class Level:
    """An instruction set, by the names of the libraries that choose their code by it."""

    aten: str
    mkl: str
    onednn: str
    needs: tuple[str, ...] = ()
    """What the processor must have, as torch.cpu.get_capabilities() names it."""

    @property
    def missing(self) -> list[str]:
        there = torch.cpu.get_capabilities()
        return [name for name in self.needs if not there.get(name)]

    def environment(self, threads: int) -> dict[str, str]:
        number = str(threads)
        return {
            **os.environ,
            "ATEN_CPU_CAPABILITY": self.aten,
            "MKL_ENABLE_INSTRUCTIONS": self.mkl,
            "ONEDNN_MAX_CPU_ISA": self.onednn,
            "OMP_NUM_THREADS": number,
            "MKL_NUM_THREADS": number,
            "OMP_WAIT_POLICY": "passive",  # several processes share the cores: threads must not spin
            "HF_HUB_OFFLINE": "1",
        }


LEVELS = (
    Level("default", "SSE4_2", "SSE41"),
    Level("avx2", "AVX2", "AVX2", ("avx2", "fma3")),
    Level("avx512", "AVX512", "AVX512_CORE", ("avx512_f", "avx512_bw", "avx512_dq", "avx512_vl")),
)


def run(level: Level, threads: int, options: list[str], log: Path) -> bool:
    """Run the tests under one setting; whether all passed. `options` are pytest's."""
    started = time.perf_counter()
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-rfE", *options]
    with log.open("w", encoding="utf-8") as out:
        status = subprocess.run(command, env=level.environment(threads), stdout=out, stderr=out).returncode
    lines = log.read_text(encoding="utf-8").splitlines()
    failed = [line for line in lines if line.startswith(("FAILED ", "ERROR "))]
    took = time.perf_counter() - started
    said = "passed" if status == 0 else f"{len(failed)} failed" if failed else f"pytest ended with {status}"
    print(f"{level.aten:8} {threads} thread{'s' * (threads > 1)}: {said} in {took:.0f} s ({log})", flush=True)
    for line in failed:
        print(f"  {line}", flush=True)
    return status == 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]  # it has one
    parser.add_argument("--fast", action="store_true", help="leave out tests marked slow")
    parser.add_argument("--workers", type=int, default=2, help="processes of pytest-xdist (0: none)")
    parser.add_argument("--logs", type=Path, help="folder for pytest's output; a temporary one by default")
    known, options = parser.parse_known_args()
    if not any(Path(option.partition("::")[0]).exists() for option in options):
        options = [*options, *NUMERIC]
    if known.fast:
        options = ["-m", "not slow", *options]
    if known.workers:
        options = ["-n", str(known.workers), *options]
    logs = known.logs or Path(tempfile.mkdtemp(prefix="portable-"))
    logs.mkdir(parents=True, exist_ok=True)
    passed = True
    for level in LEVELS:
        if level.missing:
            print(f"{level.aten:8} skipped: this processor lacks {', '.join(level.missing)}", flush=True)
            continue
        for threads in THREADS:
            passed &= run(level, threads, options, logs / f"{level.aten}-{threads}.log")
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
