"""What all tests stand on."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator

import pytest

# Before anything imports triton: without a GPU its kernels are tested through its interpreter.
if not os.path.exists("/dev/nvidiactl"):
    os.environ.setdefault("TRITON_INTERPRET", "1")


@pytest.fixture(autouse=True)
def interruptible() -> Iterator[None]:
    """Ctrl-C as Python has it: a shell's background jobs, and what they start, are told to ignore it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)
