"""The GPU benchmark in little, on this machine: through Triton's interpreter where there is no GPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


def test_the_small_form_measures_every_kind_of_row(tmp_path: Path) -> None:
    pytest.importorskip("triton")
    out = tmp_path / "gpu.json"
    done = subprocess.run(
        [sys.executable, "benchmarks/kv_gpu.py", "--small", "--json", str(out)],
        cwd=ROOT,
        env={**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": str(ROOT / "src")},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    rows = json.loads(out.read_text())["rows"]
    assert not [row for row in rows if "failed" in row or "skipped" in row]
    assert {row["what"] for row in rows} == {"kernel", "prefill", "decode", "policy"}
    ours = [row for row in rows if row["what"] == "decode" and row["cache"] == "keydiff"]
    assert all(row["ms"] > 0 and row["held"] < row["seen"] for row in ours)
