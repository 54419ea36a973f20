"""The processor, by a name under which measurements are kept."""

from __future__ import annotations

import hashlib
import platform
import re
from pathlib import Path

_CPUINFO = Path("/proc/cpuinfo")


def processor_name(threads: int, cpuinfo: str | None = None) -> str:
    """Model name, 8 digits of a digest of its features, and the number of threads: "amd-epyc-1a2b3c4d-1".

    Args:
        cpuinfo: the text of /proc/cpuinfo; None: this machine's. Where there is none, what `platform` tells.
    """
    if cpuinfo is None:
        try:
            cpuinfo = _CPUINFO.read_text(encoding="utf-8", errors="replace")
        except OSError:
            cpuinfo = ""
    model = _first(cpuinfo, "model name") or platform.processor() or platform.machine() or "unknown"
    # "Features" on ARM. Their order is of no interest.
    flags = sorted((_first(cpuinfo, "flags") or _first(cpuinfo, "Features") or "").split())
    digest = hashlib.sha256(" ".join([model, platform.machine(), *flags]).encode()).hexdigest()[:8]
    name = re.sub(r"[^a-z0-9]+", "-", model.lower()).strip("-")
    return f"{name}-{digest}-{threads}"


def _first(text: str, key: str) -> str | None:
    found = re.search(rf"^{re.escape(key)}\s*:[ \t]*(.*)$", text, re.MULTILINE)
    return found[1].strip() if found else None
