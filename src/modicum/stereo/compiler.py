"""Compiler of the kernels: numba, once for each kind of argument; compiled code is kept on disk."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from modicum.packages import import_package

Kernel = TypeVar("Kernel", bound=Callable[..., object])
_made: list[Any] = []


def compiled(function: Kernel) -> Kernel:
    """The function as machine code, which runs without Python's global lock.

    Kernels cast each 16-bit result (`U16(a + b)`): numba computes with 64 bits otherwise, and a vector then
    holds a quarter of the disparities.

    Raises:
        InputError: numba is not installed.
    """
    numba = import_package("numba", "stereo")
    made: Kernel = numba.njit(cache=True, nogil=True, error_model="numpy")(function)
    _made.append(made)
    return made


def is_compiled() -> bool:
    """Whether numba's folder has compiled code of a kernel, so that the first match need not wait for it."""
    folders = {Path(made.stats.cache_path) for made in _made}
    return any(next(folder.glob("path_kernels.*.nbc"), None) for folder in folders)
