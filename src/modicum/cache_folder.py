"""The folder in which modicum keeps what takes long to make again."""

from __future__ import annotations

import os
from pathlib import Path


def cache_folder() -> Path:
    """$MODICUM_CACHE, else $XDG_CACHE_HOME/modicum, else ~/.cache/modicum; need not exist."""
    if own := os.environ.get("MODICUM_CACHE"):
        return Path(own).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "modicum"
