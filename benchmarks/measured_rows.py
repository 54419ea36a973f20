"""Measured rows: one line of JSON for each cell of a long benchmark, so that it goes on where it stopped."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from datetime import datetime
from pathlib import Path
from typing import Any

import machine
from page import write_section

_DOCS = Path(__file__).resolve().parent.parent / "docs"
ROWS = "rows.jsonl"


def read_rows(work: Path) -> list[dict[str, Any]]:
    """The rows that are whole."""
    path = work / ROWS
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
        try:
            rows.append(json.loads(line))
        except ValueError:
            continue  # cut by a kill: measured again
    return rows


def append_row(work: Path, row: dict[str, Any]) -> None:
    """In one write, so that a row is there or not."""
    line = (json.dumps(row) + "\n").encode()
    path = work / ROWS
    with open(path, "ab") as file:
        if file.tell() and not path.read_bytes().endswith(b"\n"):
            line = b"\n" + line
        file.write(line)
        file.flush()
        os.fsync(file.fileno())


def write_docs(
    work: Path,
    section: Callable[[dict[str, Any]], str],
    data: str,
    page: str,
    marker: str,
    more: Mapping[str, Any] | None = None,
) -> None:
    """The rows with the machine, and what more there is to say, as JSON in docs/`data`; and the tables on a
    page, between its markers.
    """
    rows = read_rows(work)
    if not rows:
        raise SystemExit(f"{work} has no rows: measure first")
    started = datetime.fromtimestamp((work / ROWS).stat().st_mtime).astimezone()
    raw = {"date": started.date().isoformat(), "machine": machine.describe(), **(more or {}), "rows": rows}
    (_DOCS / data).write_text(json.dumps(raw, separators=(",", ":")) + "\n", encoding="utf-8")
    write_section(_DOCS / page, marker, section(raw))
