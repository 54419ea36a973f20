"""Rows made up for the tests: costs and scores by hand, everything else of no matter."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from modicum.evaluation.row import Cell, Row

PER_TOKEN = 1024  # bytes of a full cache's token


def row(
    policy: str = "keydiff", budget: str = "25%", *, index: int = 0, score: float = 1.0, **more: Any
) -> Row:
    """A row; names of the cell and of the row alike may be given."""
    full = budget == "full"
    cell: dict[str, Any] = {
        "system": "modicum",
        "model": "tiny",
        "policy": policy,
        "budget": budget,
        "task": "niah",
        "length": 1024,
        "question": "hidden",
        "chunk": 512,
        "seed": 0,
        "dtype": "float32",
        "n_sink": None if full else 4,
        "recent": None if full else 32,
        "evict_every": None if full else 1,
    }
    cell |= {name: more.pop(name) for name in list(more) if name in cell}
    held = more.pop("held", 1000 if full else 250) * PER_TOKEN
    values: dict[str, Any] = {
        "index": index,
        "score": score,
        "metric": "string_match_all",
        "output": "no <b>matter</b>",
        "answers": ["no matter"],
        "context_tokens": 1000,
        "new_tokens": 4,
        "depth": 0.5,
        "held_bytes": held,
        "context_bytes": held,
        "peak_bytes": held + 512 * PER_TOKEN,
        "full_bytes": 1024 * PER_TOKEN,
        "held_tokens": (held // PER_TOKEN, held // PER_TOKEN),
        "prefill_seconds": 0.5,
        "decode_seconds": 0.25,
        "versions": {"modicum": "0.1.0"},
        "extra": {"question_tokens": 20},
    }
    return Row(cell=Cell(**cell), **(values | more))


def write(folder: Path, rows: Iterable[Row]) -> Path:
    """A folder as `modicum eval` leaves it, as far as the report reads it."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps(r.to_dict()) + "\n" for r in rows]
    (folder / "rows.jsonl").write_text("".join(lines), encoding="utf-8")
    return folder
