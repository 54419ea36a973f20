"""Counts: what a worker has held and let go, for the server's metrics in another process.

A page of shared memory: the process that registers the plug-in first makes it and tells its children by the
environment. Workers on other machines have none, and are not counted.
"""

from __future__ import annotations

import mmap
import os
import struct
import tempfile
from dataclasses import dataclass

VARIABLE = "MODICUM_COUNTS"
_FORM = struct.Struct("=4q")


@dataclass
class Counts:
    """Of one worker, since it started; its peers in tensor parallelism count the same."""

    seen: int = 0
    """Tokens taken in."""
    gone: int = 0
    """Tokens let go, for each KV head."""
    held: int = 0
    """Tokens per KV head that the requests of the last step hold after it."""
    most: int = 0
    """The most that any request has held after a step."""


def announce() -> None:
    """Make the page, unless a parent has; children find it."""
    if VARIABLE in os.environ and os.path.isfile(os.environ[VARIABLE]):
        return
    handle, path = tempfile.mkstemp(prefix="modicum-", suffix=".counts")
    os.write(handle, bytes(_FORM.size))
    os.close(handle)
    os.environ[VARIABLE] = path


class Page:
    """The shared page, if there is one."""

    def __init__(self) -> None:
        path = os.environ.get(VARIABLE)
        self._map: mmap.mmap | None = None
        if path and os.path.isfile(path):
            with open(path, "r+b") as file:
                self._map = mmap.mmap(file.fileno(), _FORM.size)

    def write(self, counts: Counts) -> None:
        """Let the server know."""
        if self._map is not None:
            self._map[:] = _FORM.pack(counts.seen, counts.gone, counts.held, counts.most)

    def read(self) -> Counts:
        """What was last written."""
        return Counts() if self._map is None else Counts(*_FORM.unpack(self._map[:]))
