"""Traces: a file of them, traces.npz. Nothing in it is unpickled."""

from __future__ import annotations

import json
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from modicum.errors import SnapshotError
from modicum.report.trace import Trace
from modicum.whole_file import whole_file

TRACES = "traces.npz"
_FORMAT, _VERSION = "modicum traces", 1
_TEXTS = ("model", "policy", "budget", "tokens", "rows", "asked", "task", "sample")


def save_traces(path: str | Path, traces: Sequence[Trace]) -> None:
    """Write traces, whole or not at all: positions as bits, a header in JSON.

    Raises:
        SnapshotError: the file cannot be written.
    """
    path = Path(path)
    arrays: dict[str, Any] = {}
    header = []
    for number, trace in enumerate(traces):
        header.append({name: getattr(trace, name) for name in _TEXTS} | {"layers": len(trace.kept)})
        for layer, (kept, mass) in enumerate(zip(trace.kept, trace.mass, strict=True)):
            arrays[f"kept_{number}_{layer}"] = np.packbits(kept, axis=1)
            arrays[f"mass_{number}_{layer}"] = mass
    text = json.dumps({"format": _FORMAT, "version": _VERSION, "traces": header})
    try:
        with whole_file(path) as part, open(part, "wb") as file:
            np.savez_compressed(file, header=np.frombuffer(text.encode(), np.uint8), **arrays)
    except OSError as error:
        raise SnapshotError(f"cannot write {path}: {error.strerror or error}; make room") from error


def load_traces(path: str | Path) -> list[Trace]:
    """Read what `save_traces` wrote.

    Raises:
        SnapshotError: the file is missing, truncated, foreign, or of a newer format.
    """
    remedy = "delete it and trace again with `modicum report --trace`"
    try:
        with np.load(path, allow_pickle=False) as data:
            header = json.loads(bytes(data["header"]))
            if header["format"] != _FORMAT:
                raise ValueError("it is of another format")
            if header["version"] != _VERSION:
                raise SnapshotError(
                    f"{path} has version {header['version']!r}, this modicum reads {_VERSION}: update "
                    f"modicum, or {remedy}"
                )
            return [_trace(data, number, facts) for number, facts in enumerate(header["traces"])]
    except OSError as error:
        raise SnapshotError(f"cannot read traces from {path}: {error.strerror or error}; {remedy}") from error
    except (ValueError, KeyError, TypeError, EOFError, AttributeError, zipfile.BadZipFile) as error:
        raise SnapshotError(f"{path} is damaged, or holds no traces ({error}): {remedy}") from error


def _trace(data: Any, number: int, facts: dict[str, Any]) -> Trace:
    layers, n = range(facts["layers"]), facts["tokens"]
    return Trace(
        **{name: facts[name] for name in _TEXTS},
        kept=tuple(
            np.unpackbits(data[f"kept_{number}_{i}"], axis=1, count=n).astype(np.bool_) for i in layers
        ),
        mass=tuple(data[f"mass_{number}_{i}"] for i in layers),
    )
