"""The tables of benchmarks/essence.py."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

import report

MEMBERS = 4
"""Of an ensemble."""
WRONG = 0.3
"""Share of wrong labels in the condition "wrong labels"."""
MEASURES = {
    "phones": (("frame_accuracy", "frames right", True), ("phone_error_rate", "PER", False)),
    "digits": (("word_error_rate", "WER", False), ("character_error_rate", "CER", False)),
}
_NAMES = {"base": "same size", "quarter": "a quarter", "large": "larger"}
CONDITIONS = {
    "plain": "",
    "wrong": f"{WRONG:.0%} wrong labels",
    "mixed": "members of four architectures",
    "more": "other speech, twice as much, unlabelled",
    "guided": "members that speak where the first does",
    "one": "one member as the teacher",
}


def section(raw: dict[str, Any]) -> str:
    """All tables, markers left out."""
    rows = raw["rows"]
    parts = [f"{report.models_measured(raw, ', float32')}, each with an ensemble of its own."]
    for task in MEASURES:
        mine = [row for row in rows if row["task"] == task]
        if mine:
            parts += [f"### {_titles(mine)[task]}", _table(task, mine, is_search=False)]
            parts += ["Conditions under which a student might beat its ensemble:"]
            parts += [_table(task, mine, is_search=True), _differences(task, mine)]
    return "\n\n".join(parts)


def _titles(rows: Sequence[dict[str, Any]]) -> dict[str, str]:
    return {
        "phones": f"Synthetic phones, {_data(rows[0])}",
        "digits": f"Real digits, {_data(rows[0])}",
    }


def _data(row: dict[str, Any]) -> str:
    return (
        f"{row['frames']:,} training frames, {row['classes']} classes, whose logits take "
        f"{2 * row['classes']} bytes a frame in 16 bits"
    )


def _is_search(row: dict[str, Any]) -> bool:
    return row["condition"] != "plain" or row["model"] == "large" or row["longer"] > 1


def _table(task: str, rows: Sequence[dict[str, Any]], is_search: bool) -> str:
    groups: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for row in rows:
        if _is_search(row) == is_search or (is_search and row["is_ensemble"]):
            keys = ("condition", "model", "keep", "hard_weight", "temperature", "longer", "is_ensemble")
            key = (*(row[x] for x in keys), row["member"] is not None)
            groups.setdefault(key, []).append(row)
    names = [title for _, title, _ in MEASURES[task]]
    gap = f"{names[0]} over its ensemble"
    lines = []
    for group in groups.values():
        first = group[0]
        cells = [_spread([row[name] for row in group]) for name, _, _ in MEASURES[task]]
        line = [_label(first), f"{statistics.mean(row['parameters'] for row in group):,.0f}", *cells]
        if is_search:
            line.append(_gap(task, group, rows))
        else:
            line += [_nbytes(group), _mass(group)]
        lines.append(line)
    more = [gap] if is_search else ["bytes a frame", "mass"]
    return report.table(["", "parameters", *names, *more], lines)


def _label(row: dict[str, Any]) -> str:
    condition = CONDITIONS[row["condition"]]
    if row["is_ensemble"]:
        words = f"ensemble of {MEMBERS}" if row["condition"] != "one" else "the first member"
    elif row["member"] is not None:
        words = "member, hard labels"
    else:
        words = f"{_NAMES[row['model']]}, "
        words += f"`{row['keep']}`, λ = {row['hard_weight']:g}" if row["keep"] else "hard labels"
        words += f", τ = {row['temperature']:g}" if row["temperature"] != 1 else ""
        words += f", {row['longer']} times as long" if row["longer"] > 1 else ""
    return f"{words}; {condition}" if condition else words


def _spread(shares: Sequence[float]) -> str:
    return f"{report.mean_and_deviation([100 * share for share in shares])} %"


def _gap(task: str, group: Sequence[dict[str, Any]], rows: Sequence[dict[str, Any]]) -> str:
    """The difference to the ensemble of the same seed and condition, better ones above 0."""
    name, _, is_higher = MEASURES[task][0]
    if group[0]["is_ensemble"]:
        return ""
    condition = "plain" if group[0]["condition"] == "more" else group[0]["condition"]
    ensembles = {r["seed"]: r[name] for r in rows if r["is_ensemble"] and r["condition"] == condition}
    gaps = [(row[name] - ensembles[row["seed"]]) for row in group if row["seed"] in ensembles]
    return _spread([gap if is_higher else -gap for gap in gaps]) if gaps else ""


def _differences(task: str, rows: Sequence[dict[str, Any]]) -> str:
    """What the claims come to: means and deviations of differences between models of the same seed."""
    name, title, is_higher = MEASURES[task][0]
    middle = "topk=10" if task == "phones" else "topk=5"

    def better(first: dict[str, Any], second: dict[str, Any]) -> list[float]:
        """By how much the first is better, for each seed."""
        pairs = ([r for r in rows if wanted.items() <= r.items()] for wanted in (first, second))
        ones, others = ({r["seed"]: r[name] for r in found} for found in pairs)
        sign = 1 if is_higher else -1
        return [sign * (ones[seed] - others[seed]) for seed in ones if seed in others]

    plain = {"condition": "plain", "member": None, "is_ensemble": False, "temperature": 1.0, "longer": 1}
    lines = []
    for model in ("quarter", "base"):
        some, hard = plain | {"model": model, "keep": middle}, plain | {"model": model, "keep": ""}
        full = plain | {"model": model, "keep": "full", "hard_weight": 0.5}
        who = _NAMES[model]
        lines.append((f"{who}: `{middle}` over `full`, λ = 0.5", better(some | {"hard_weight": 0.5}, full)))
        for share in (0.0, 0.25, 0.5):
            gaps = better(some | {"hard_weight": share}, hard)
            lines.append((f"{who}: `{middle}`, λ = {share:g}, over hard labels", gaps))
    students = {
        (r["condition"], r["model"], r["keep"], r["hard_weight"], r["longer"], r["temperature"])
        for r in rows
        if not r["is_ensemble"] and r["member"] is None and r["keep"]
    }
    found = []
    for condition, model, keep, share, longer, temperature in sorted(students):
        student = {"condition": condition, "model": model, "keep": keep, "hard_weight": share}
        student |= {"longer": longer, "temperature": temperature, "is_ensemble": False, "member": None}
        ensemble = {"condition": "plain" if condition == "more" else condition, "is_ensemble": True}
        if gaps := better(student, ensemble):
            found.append((statistics.mean(gaps), _label(student), gaps))
    if found:
        _, label, gaps = max(found, key=lambda one: one[0])
        lines.append((f"the best student of {len(found)} in this test ({label}) over its ensemble", gaps))
    cells = [[what, _spread(gaps), report.difference(gaps)] for what, gaps in lines if gaps]
    return report.table([f"better by, in {title}", "difference", "beyond the spread"], cells)


def _nbytes(group: Sequence[dict[str, Any]]) -> str:
    found = [row["nbytes_per_frame"] for row in group if "nbytes_per_frame" in row]
    return f"{statistics.mean(found):.1f}" if found else ""


def _mass(group: Sequence[dict[str, Any]]) -> str:
    found = [row["captured_mass"] for row in group if "captured_mass" in row]
    return f"{statistics.mean(found):.1%}" if found else ""
