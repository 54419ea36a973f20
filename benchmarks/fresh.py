"""Fresh: a script's answer from a process of its own, whose memory and threads are then nobody else's."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any


def answer(
    script: str, options: Sequence[str], python: Path | str = sys.executable, **environment: str
) -> dict[str, Any]:
    """The JSON object in the last line that a script here prints, run by `python` with more environment."""
    command = [str(python), str(Path(__file__).parent / script), *options]
    done = subprocess.run(
        command, check=True, stdout=subprocess.PIPE, text=True, env={**os.environ, **environment}
    )
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found
