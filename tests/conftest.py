"""What all tests stand on."""

from __future__ import annotations

import os
import signal
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import settings

FOLDER = Path(__file__).parent

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


@pytest.fixture(autouse=True)
def own_heads(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Measurements of heads go into a folder of the tests, not into the user's, unless a test gives one."""
    from modicum.cache_folder import cache_folder
    from modicum.kv import head_store

    users = cache_folder()
    own = tmp_path_factory.getbasetemp() / "heads"
    monkeypatch.setattr(
        head_store, "folder", lambda: own if cache_folder() == users else cache_folder() / "heads"
    )


@pytest.fixture(scope="session")
def real_data() -> Callable[[str], Path]:
    """Gives the path of a public data set's file under the folder that MODICUM_DATA names, or skips the test.

    No such file is in the repository. Names are paths in that folder, such as
    "ruler/niah_multikey_3.jsonl", "gsm8k/grade_school_math/data/test.jsonl".
    """

    def find(name: str) -> Path:
        root = os.environ.get("MODICUM_DATA")
        if not root:
            pytest.skip(f"needs {name}: set MODICUM_DATA to a folder that holds it")
        path = Path(root) / name
        if not path.exists():
            pytest.skip(f"needs {name}: MODICUM_DATA={root} does not hold it")
        return path

    return find


SLOW = FOLDER / "slow.txt"
"""Which test functions `make test-fast` leaves out; tools/slow_tests.py writes it."""

NO_INDUCTOR = pytest.mark.skip(
    reason="torch 2.13's compiler leaves a header out at ATEN_CPU_CAPABILITY=default"
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if os.environ.get("ATEN_CPU_CAPABILITY") == "default":
        for item in items:
            if item.get_closest_marker("inductor"):
                item.add_marker(NO_INDUCTOR)
    listed = dict(line.split() for line in SLOW.read_text(encoding="utf-8").splitlines() if line[0] != "#")
    seen: set[str] = set()
    for item in items:
        # pytest-xdist wants the same names in each process.
        assert tempfile.gettempdir() not in item.nodeid, f"named by a temporary folder: {item.nodeid}"
        name = f"{item.path.relative_to(FOLDER).as_posix()}::{getattr(item, 'originalname', item.name)}"
        left_out = listed.get(name)
        if left_out == "all" or (left_out == "first" and name in seen):
            item.add_marker(pytest.mark.slow)
        seen.add(name)
