"""The machine in words, its memory bandwidth, and a process's peak memory."""

from __future__ import annotations

import os
import platform
import resource
import sys
import time
from datetime import datetime
from pathlib import Path
from typing import Any

import torch
import transformers

import modicum

_COPIED = 256 * 2**20
_CACHE = Path("/sys/devices/system/cpu/cpu0/cache/index3/size")


def describe() -> dict[str, str | int]:
    """Processor, cores, memory and the versions that matter."""
    told: dict[str, str | int] = {
        "processor": _line("/proc/cpuinfo", "model name") or platform.processor() or platform.machine(),
        "cores": os.cpu_count() or 0,
        "memory": _memory(),
        "system": platform.system(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "modicum": modicum.__version__,
    }
    if _CACHE.is_file():
        told["last-level cache"] = _CACHE.read_text().strip()
    return told


def since(started: datetime) -> dict[str, Any]:
    """What goes with every result: the day, how many minutes it took, and the machine."""
    seconds = (datetime.now().astimezone() - started).total_seconds()
    return {
        "date": started.date().isoformat(),
        "minutes": round(seconds / 60, 1),
        "machine": describe(),
    }


def copy_bandwidth() -> float:
    """Bytes per second of one large copy: what is read and what is written."""
    source = torch.ones(_COPIED // 4)
    target = torch.empty_like(source).copy_(source)
    start = time.perf_counter()
    target.copy_(source)
    return 2 * _COPIED / (time.perf_counter() - start)


def peak_memory() -> int:
    """Most bytes this process has had resident.

    Linux keeps the parent's peak in ru_maxrss when a process starts another, so there VmHWM is read, which
    starts anew.
    """
    told = _line("/proc/self/status", "VmHWM")
    if told is not None:
        return int(told.split()[0]) * 1024
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else most * 1024


def _memory() -> str:
    told = _line("/proc/meminfo", "MemTotal")
    return "unknown" if told is None else f"{int(told.split()[0]) / 2**20:.0f} GiB"


def _line(path: str, key: str) -> str | None:
    """The value of the first line `key : value` in a file of the system."""
    try:
        lines = Path(path).read_text().splitlines()
    except OSError:
        return None
    for line in lines:
        name, colon, value = line.partition(":")
        if colon and name.strip() == key:
            return value.strip()
    return None
