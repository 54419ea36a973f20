"""The tables of benchmarks/compact_speech.py."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

import report


def section(raw: dict[str, Any]) -> str:
    """All tables, markers left out."""
    rows = raw["rows"]
    parts = [
        f"{report.models_measured(raw)}. CER and WER of held-out speakers, in percent. "
        "Products are those of weights that are not 0, for a second of audio; attention's own are left out. "
        "Memory (beside the program's) and RTF (seconds of processor time for a second of audio) are of "
        "the first seed's files, on one thread."
    ]
    for task in sorted({row["task"] for row in rows}):
        mine = [row for row in rows if row["task"] == task]
        parts += [f"### {task.capitalize()}", _table(mine), _rivals(mine), _verdict(mine)]
    return "\n\n".join(parts)


def _table(rows: Sequence[dict[str, Any]]) -> str:
    lines = []
    for name in dict.fromkeys(map(_shown, rows)):
        # Rivals of one width are one model.
        group = list({row["key"]: row for row in rows if _shown(row) == name}.values())
        first = group[0]
        memory = (
            f"{(first['peak_nbytes'] - first['before_nbytes']) / 2**20:.0f} MiB"
            if "peak_nbytes" in first
            else ""
        )
        speed = f"{first['real_time_factor']:.4f}" if "real_time_factor" in first else ""
        lines.append([
            name, f"{first['width']}", f"{statistics.mean(row['nbytes'] for row in group) / 1000:.1f}",
            f"{first['products_per_second'] / 1e6:.1f} M", _percent(group, "float", "cer"),
            _percent(group, "packed", "cer"), _percent(group, "packed", "wer"), memory, speed,
        ])  # fmt: skip
    head = ["model", "width", "KB", "products/s", "CER float", "CER packed", "WER packed", "memory", "RTF"]
    return report.table(head, lines)


def _shown(row: dict[str, Any]) -> str:
    """A model's name in the tables: that of a narrow one is its width."""
    is_rival = row["name"].startswith(("narrow, bytes", "narrow, products"))
    return f"narrow, {row['width']}" if is_rival else row["name"]


def _percent(group: Sequence[dict[str, Any]], kind: str, rate: str) -> str:
    return report.mean_and_deviation([100 * row[kind][rate] for row in group])


def _gaps(rows: Sequence[dict[str, Any]], first: str, second: str, form: str = "packed") -> list[float]:
    """CER of one, packed, minus that of the other in a form, in points, seed by seed."""
    ones = {row["seed"]: 100 * row["packed"]["cer"] for row in rows if row["name"] == first}
    others = {row["seed"]: 100 * row[form]["cer"] for row in rows if row["name"] == second}
    return [ones[seed] - others[seed] for seed in sorted(ones.keys() & others.keys())]


def _rivals(rows: Sequence[dict[str, Any]]) -> str:
    lines = []
    for name in dict.fromkeys(row["name"] for row in rows):
        for rival in (f"narrow, bytes of {name}", f"narrow, products of {name}", "unshared"):
            gaps = _gaps(rows, name, rival)
            if name != rival and gaps and not name.startswith("narrow"):
                shown = next(_shown(row) for row in rows if row["name"] == rival)
                alike = "products" if "products" in rival else "bytes" if "bytes" in rival else ""
                lines.append([name, shown, alike, *_told(gaps)])
    lines.append(["together", "narrow, taught", "bytes", *_told(_gaps(rows, "together", "narrow, taught"))])
    return report.table(["model", "beside", "no more", "CER points more", "verdict"], lines)


def _told(gaps: Sequence[float]) -> list[str]:
    if not gaps:
        return ["", "not measured"]
    return [report.mean_and_deviation(gaps), report.difference(gaps, more="worse", less="better")]


def _verdict(rows: Sequence[dict[str, Any]]) -> str:
    """The paper's claim, on this task."""
    gaps = _gaps(rows, "together", "unshared", form="float")
    if not gaps:
        return ""
    by_name = {row["name"]: row for row in rows}
    ratio = by_name["unshared"]["float_nbytes"] / by_name["together"]["nbytes"]
    return (
        "The paper's abstract claims ten times fewer bytes at 0.43 points more CER (AISHELL-2). Here "
        f'"together" has {ratio:.1f} times fewer bytes than the unshared float32 model, and its CER '
        f"differs by {report.mean_and_deviation(gaps)} points (above 0 is worse)."
    )
