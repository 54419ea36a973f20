"""Measured rows: one line of JSON for each cell of a long benchmark, so that it goes on where it stopped.

python benchmarks/measured_rows.py docs/benchmarks_stereo.json FOLDER   # go on from published rows
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Callable, Iterable, Mapping
from datetime import datetime
from pathlib import Path
from typing import Any

import machine
from page import write_section

_DOCS = Path(__file__).resolve().parent.parent / "docs"
ROWS = "rows.jsonl"


def work_folder(work: Path, is_quick: bool) -> Path:
    """The folder of a run, which is made.

    Models and rows of a trial with --quick are not those of a full run, so it gets a folder of its own in it.
    """
    folder = work / "quick" if is_quick else work
    folder.mkdir(parents=True, exist_ok=True)
    return folder


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
    """In one write, so that a row is there or not; with the processor that it was measured on."""
    line = (json.dumps({"processor": machine.describe()["processor"], **row}) + "\n").encode()
    path = work / ROWS
    with open(path, "ab") as file:
        if file.tell() and not path.read_bytes().endswith(b"\n"):
            line = b"\n" + line
        file.write(line)
        file.flush()
        os.fsync(file.fileno())


def processors(rows: Iterable[Mapping[str, Any]]) -> str:
    """The processors that rows were measured on, in words."""
    return " and ".join(dict.fromkeys(row["processor"] for row in rows if "processor" in row))


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
    own = machine.describe()
    own["processor"] = processors(rows) or own["processor"]
    raw = {"date": started.date().isoformat(), "machine": own, **(more or {}), "rows": rows}
    (_DOCS / data).write_text(json.dumps(raw, separators=(",", ":")) + "\n", encoding="utf-8")
    write_section(_DOCS / page, marker, section(raw))


def restore(published: Path, work: Path) -> int:
    """Write the rows of a file in docs/ into a folder that has none, for a benchmark to go on there.

    Returns:
        Their number.
    """
    if (work / ROWS).exists():
        raise SystemExit(f"{work / ROWS} is there already: give another folder")
    raw = json.loads(published.read_text(encoding="utf-8"))
    if not isinstance(raw, dict) or "rows" not in raw:
        raise SystemExit(f"{published} has no rows: give a file that a benchmark wrote with --docs")
    work.mkdir(parents=True, exist_ok=True)
    for row in raw["rows"]:
        append_row(work, {"processor": raw["machine"]["processor"], **row})
    return len(raw["rows"])


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("published", type=Path, help="a file of rows in docs/")
    parser.add_argument("work", type=Path, help="the benchmark's --work")
    asked = parser.parse_args()
    print(restore(asked.published, asked.work), "rows")
