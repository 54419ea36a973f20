"""What all tests stand on."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator

import pytest
from hypothesis import settings

# Before anything imports triton: without a GPU its kernels are tested through its interpreter.
if not os.path.exists("/dev/nvidiactl"):
    os.environ.setdefault("TRITON_INTERPRET", "1")

# The same examples in every run, and none judged by its time: a slow or busy machine is no fault.
settings.register_profile("modicum", deadline=None, derandomize=True, database=None)
settings.load_profile("modicum")


@pytest.fixture(autouse=True)
def interruptible() -> Iterator[None]:
    """Ctrl-C as Python has it: a shell's background jobs, and what they start, are told to ignore it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)
