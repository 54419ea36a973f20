"""The tables of benchmarks/grammar.py."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import report
from grammar_sets import SETS

from modicum.speech.grammar.command_model import EMBEDDED, SPHINX

MODELS = (EMBEDDED, SPHINX)
COMPARED = ("original", "greedy, refit", "CEM, refit")
"""Methods that the verdicts are about."""
RATE = 0.02
"""Wanted false alarms."""
AIM = 0.3
"""Share by which missed commands are to fall on real voices at equal false alarms."""


def section(raw: dict[str, Any]) -> str:
    """All tables, markers left out."""
    rows = [row for row in raw["rows"] if row["kind"] == "errors"]
    m = raw["machine"]
    parts = [
        f"Measured {raw['date']} on one thread of a machine that other jobs shared ({m['processor']}). "
        f"Wanted false alarms: {RATE:.0%} of recordings of other speech. MD: missed, MC: taken for another "
        "command, FA: false alarms; percent of test recordings, means over seeds, in brackets 95 % intervals "
        "by resampling recordings. *Fixed*: the original grammar's threshold. *Re-tuned*: each grammar's, "
        "set on the recordings of the search. *Equal*: set on the test's other speech, so that all have the "
        "same false alarms; the errors are MD + MC there."
    ]
    for name in SETS:
        for model in MODELS:
            own = [row for row in rows if (row["set"], row["model"]) == (name, model)]
            if own:
                parts.append(_errors(name, model, own))
    parts.append(_verdicts(rows))
    times = [row for row in raw["rows"] if row["kind"] == "times"]
    if times:
        parts.append(_times(times))
    return "\n\n".join(parts)


def _errors(name: str, model: str, rows: Sequence[dict[str, Any]]) -> str:
    lines = []
    for method in dict.fromkeys(row["method"] for row in rows):
        own = [row for row in rows if row["method"] == method]
        searched = [row for row in own if row.get("evaluations")]
        seconds = f"{np.mean([row['seconds'] for row in searched]):.1f}" if searched else "–"
        lines.append(
            [
                method,
                f"{np.mean([row['size'] for row in own]):.0f}",
                _rates(own, "fixed"),
                _rates(own, "retuned"),
                _interval([errors(row["equal"]) for row in own]),
                seconds,
            ]
        )
    recordings = next((row["recordings"] for row in rows if "recordings" in row), None)
    told = (
        ""
        if recordings is None
        else (
            f" {recordings[1]:,} recordings of commands and {recordings[3]:,} of other speech to search "
            f"with, {recordings[2]:,} and {recordings[4]:,} to test with."
        )
    )
    head = ["grammar", "size", "fixed: MD / MC / FA", "re-tuned: MD / MC / FA", "equal: errors", "search, s"]
    seeds = len({row["seed"] for row in rows})
    return f"**{name}, {model}** ({seeds} seed{'s' if seeds > 1 else ''}).{told}\n\n" + report.table(
        head, lines
    )


def _rates(rows: Sequence[dict[str, Any]], at: str) -> str:
    if at not in rows[0]:
        return "–"
    values = np.mean([row[at]["rates"] for row in rows], axis=0) * 100
    return " / ".join(f"{value:.1f}" for value in values)


def errors(found: dict[str, Any]) -> np.ndarray:
    """1 for each recording of a command that was not understood."""
    return np.array([one != "." for one in found["commands"]], dtype=float)


def _interval(parts: Sequence[np.ndarray]) -> str:
    mean, low, high = bootstrap(parts)
    return f"{mean:.1f} [{low:.1f}, {high:.1f}]"


def bootstrap(parts: Sequence[np.ndarray]) -> tuple[float, float, float]:
    """Mean over seeds of means over recordings, in percent, with a 95 % interval."""
    chance = np.random.default_rng(0)
    draws = [
        100 * np.mean([part[chance.integers(len(part), size=len(part))].mean() for part in parts])
        for _ in range(2000)
    ]
    low, high = np.percentile(draws, [2.5, 97.5])
    return 100 * float(np.mean([part.mean() for part in parts])), float(low), float(high)


def _verdicts(rows: Sequence[dict[str, Any]]) -> str:
    """The paper's two claims, on our data; differences are paired by recording."""
    lines = []
    for name in SETS:
        for model in MODELS:
            by = {
                method: {
                    row["seed"]: row
                    for row in rows
                    if (row["set"], row["model"], row["method"]) == (name, model, method)
                }
                for method in COMPARED
            }
            seeds = sorted(set(by["CEM, refit"]) & set(by["original"]) & set(by["greedy, refit"]))
            if not seeds:
                continue

            def gap(
                one: str, other: str, by: Any = by, seeds: list[int] = seeds
            ) -> tuple[float, float, float]:
                return bootstrap([errors(by[one][s]["equal"]) - errors(by[other][s]["equal"]) for s in seeds])

            first, second = gap("CEM, refit", "original"), gap("CEM, refit", "greedy, refit")
            before = np.mean([errors(by["original"][s]["equal"]).mean() for s in seeds])
            missed = [
                np.mean([by[method][s]["equal"]["rates"][0] for s in seeds])
                for method in ("original", "CEM, refit")
            ]
            fall = 1 - missed[1] / missed[0] if missed[0] else 0.0
            lines.append(
                [
                    f"{name}, {model}",
                    f"{first[0]:+.1f} [{first[1]:+.1f}, {first[2]:+.1f}] of {100 * before:.1f}",
                    _verdict(first),
                    f"{fall:.0%}" + (f" (aim {AIM:.0%})" if name != "synthetic" else ""),
                    f"{second[0]:+.1f} [{second[1]:+.1f}, {second[2]:+.1f}]",
                    _verdict(second),
                ]
            )
    head = [
        "",
        "CEM less original, points",
        "fewer errors?",
        "missed fall by",
        "CEM less greedy, points",
        "better?",
    ]
    return (
        "**The paper's two claims here**, at equal false alarms on the test: fewer missed and confused "
        "commands, and the cross-entropy method better than greedy search, both with a refitted "
        "threshold.\n\n" + report.table(head, lines)
    )


def _verdict(gap: tuple[float, float, float]) -> str:
    _, low, high = gap
    return "yes" if high < 0 else "no, worse" if low > 0 else "not shown"


def _times(rows: Sequence[dict[str, Any]]) -> str:
    lines = [[f"{row['size']:,}", f"{1e3 * row['seconds']:.1f}"] for row in rows]
    return (
        f"**Time to decide against the size of the grammar**: milliseconds of processor time to score a "
        f"recording of {rows[0]['audio']:.1f} s with expressions of nine letters, embedded recognizer; the "
        f"recognizer itself takes {1e3 * rows[0]['acoustic']:.0f} ms.\n\n"
        + report.table(["expressions", "ms"], lines)
    )
