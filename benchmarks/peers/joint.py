"""Joint: the rows of all systems as one table, in Markdown and as numbers."""

from __future__ import annotations

import json
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path
from statistics import fmean
from typing import Any

from plan import FULL, METHODS, title_of

from modicum.evaluation.row import Row
from modicum.evaluation.store import read_rows
from modicum.evaluation.summary import confidence

BEGIN, END = "<!-- joint table: begin -->", "<!-- joint table: end -->"
_MIB = 2**20
_ORDER = [method.title for method in METHODS]

Key = tuple[str, str, str, int | None]
"""System, policy, budget, chunk."""


def _key(row: Row) -> Key:
    return (row.cell.system, row.cell.policy, row.cell.budget, row.cell.chunk)


def _base(budget: str) -> str:
    """The budget without room for the answer; those two are compared."""
    return budget.removesuffix("+answer")


def _place(row: Row) -> tuple[str, str, int]:
    return (_base(row.cell.budget), row.cell.task, row.index)


def begun(output: str, answers: list[str]) -> float:
    """How much of the best answer the output begins with, 0 to 1: finer than right or wrong."""
    text = output.strip().lower()

    def share(answer: str) -> float:
        same = takewhile(lambda pair: pair[0] == pair[1], zip(text, answer.lower(), strict=False))
        return len(list(same)) / len(answer)

    return max(map(share, answers))


@dataclass(frozen=True)
class Joint:
    """Rows of the samples that every setting of a budget has done, and what could not be run."""

    groups: dict[Key, list[Row]]
    refused: dict[Key, str]
    logits: list[dict[str, Any]]

    @classmethod
    def read(cls, folder: Path) -> Joint:
        """The folder that compare.py wrote; a sample that some setting lacks is left out of its budget."""
        rows = read_rows(folder)
        refused = {
            (r["system"], r["policy"], r["budget"], r["chunk"]): r["reason"]
            for r in _lines(folder / "refused.jsonl")
        }
        keys = [key for key in dict.fromkeys(map(_key, rows)) if key not in refused]
        done: dict[tuple[str, str, int], set[Key]] = {}
        for row in rows:
            done.setdefault(_place(row), set()).add(_key(row))
        whole = {at for at, has in done.items() if has.issuperset(k for k in keys if _base(k[2]) == at[0])}
        groups: dict[Key, list[Row]] = {key: [] for key in keys}
        for row in rows:
            if _place(row) in whole and _key(row) in groups:
                groups[_key(row)].append(row)
        return cls({key: own for key, own in groups.items() if own}, refused, _lines(folder / "full.jsonl"))

    # ------------------------------------------------------------------ numbers

    @property
    def tasks(self) -> list[str]:
        """In the order in which they come."""
        return list(dict.fromkeys(row.cell.task for rows in self.groups.values() for row in rows))

    def line(self, key: Key) -> dict[str, Any]:
        """One setting: means over its samples."""
        system, policy, budget, chunk = key
        told: dict[str, Any] = {
            "system": system, "policy": policy, "budget": budget, "chunk": chunk, "method": title_of(policy)
        }  # fmt: skip
        if key in self.refused:
            return told | {"refused": self.refused[key]}
        rows = self.groups[key]
        scores = [row.score for row in rows]
        low, high, interval = confidence(scores)
        notes = sorted({row.extra["in_one_call"] for row in rows if "in_one_call" in row.extra})
        return told | {
            "count": len(rows),
            "score": fmean(scores),
            "low": low,
            "high": high,
            "interval": interval,
            "begun": fmean(begun(row.output, row.answers) for row in rows),
            "tasks": {task: fmean(row.score for row in rows if row.cell.task == task) for task in self.tasks},
            "context_bytes": fmean(row.context_bytes for row in rows),
            "held_bytes": fmean(row.held_bytes for row in rows),
            "peak_bytes": fmean(row.peak_bytes for row in rows),
            "full_bytes": fmean(row.full_bytes for row in rows),
            "nominal_share": fmean(row.extra.get("nominal_share", 1.0) for row in rows),
            "held_tokens": [
                fmean(row.held_tokens[0] for row in rows),
                fmean(row.held_tokens[1] for row in rows),
            ],
            "prefill_seconds": fmean(row.prefill_seconds for row in rows),
            "decode_seconds": fmean(row.decode_seconds for row in rows),
            "decode_seconds_per_token": sum(row.decode_seconds for row in rows)
            / max(1, sum(row.new_tokens - 1 for row in rows)),
            "question_token_by_token": notes,
            "uniform": all(row.held_tokens[0] == row.held_tokens[1] for row in rows),
            "versions": rows[0].versions,
        }

    def agreement(self) -> list[dict[str, Any]]:
        """Of each full cache against transformers' own: samples with the same answer, logits' difference."""
        reference = {
            (row.cell.task, row.index): row for key, rows in self.groups.items() for row in rows
            if key == ("transformers", FULL, FULL, None)
        }  # fmt: skip
        ground = {note["sample"]: note["logits"] for note in self.logits if note["system"] == "transformers"}
        told = []
        for key, rows in self.groups.items():
            if key[1] != FULL or not reference:
                continue
            own = {
                n["sample"]: n["logits"]
                for n in self.logits
                if n["system"] == key[0] and n["chunk"] == key[3]
            }
            pairs = [(own[sample], ground[sample]) for sample in own if sample in ground]
            told.append(
                {
                    "system": key[0],
                    "chunk": key[3],
                    "versions": rows[0].versions,
                    "samples": len(rows),
                    "same_output": sum(r.output == reference[r.cell.task, r.index].output for r in rows),
                    "logits_compared": len(pairs),
                    "logits_apart": max(
                        (abs(x - y) for a, b in pairs for x, y in zip(a, b, strict=True)), default=None
                    ),
                }
            )
        return told

    def keys(self, budget: str) -> list[Key]:
        """The settings of a budget, methods together, kvpress first."""
        grown = f"{budget}+answer"
        systems = ("transformers", "kvpress", "modicum")
        every = [key for key in [*self.groups, *self.refused] if key[2] in (budget, grown)]
        return sorted(
            dict.fromkeys(every),
            key=lambda k: (
                _ORDER.index(title_of(k[1])) if title_of(k[1]) in _ORDER else len(_ORDER),
                systems.index(k[0]), k[2] == grown, k[3] is not None,
            ),
        )  # fmt: skip

    @property
    def budgets(self) -> list[str]:
        """ "full" and "quantised" first, then shares, small ones first."""
        every = {_base(key[2]) for key in [*self.groups, *self.refused]}
        return sorted(every, key=lambda b: (b.endswith("%"), float(b[:-1]) if b.endswith("%") else 0, b))

    def to_dict(self) -> dict[str, Any]:
        """All lines as plain numbers."""
        lines = [self.line(key) for budget in self.budgets for key in self.keys(budget)]
        return {"tasks": self.tasks, "agreement": self.agreement(), "lines": lines}

    # ------------------------------------------------------------------ Markdown

    def markdown(self) -> str:
        """The full caches beside each other, then a table for each budget."""
        parts = [_agreement_table(self.agreement())]
        for budget in self.budgets:
            counts = {len(self.groups[key]) for key in self.keys(budget) if key in self.groups}
            samples = " and ".join(map(str, sorted(counts))) or "0"
            parts.append(f"**{_heading(budget)}** (samples: {samples})\n\n" + self._table(budget))
        return "\n\n".join(part for part in parts if part)

    def _table(self, budget: str) -> str:
        head = ["method", "system", "prefill", "score (95 %)", *self._columns(), "begun"]
        head += ["MiB after context", "at the end", "peak", "s prefill", "ms/token"]
        lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
        for key in self.keys(budget):
            lines.append("| " + " | ".join(self._cells(key, len(head))) + " |")
        return "\n".join(lines)

    def _columns(self) -> list[str]:
        """The tasks, where there are several."""
        return [_short(task) for task in self.tasks] if len(self.tasks) > 1 else []

    def _cells(self, key: Key, width: int) -> list[str]:
        told = self.line(key)
        how = "one shot" if key[3] is None else f"chunks of {key[3]}"
        how += ", as a press" * key[2].endswith("+answer")
        cells = [told["method"], key[0], how]
        if "refused" in told:
            return [*cells, f"not supported: {_plain(told['refused'])}", *[""] * (width - 4)]
        marks = "¹" * bool(told["question_token_by_token"])
        marks += "²" * (told["uniform"] and "Pyramid" in key[1] and key[0] == "kvpress")
        cells[0] += marks
        cells.append(f"{told['score']:.3f} ({told['low']:.2f}–{told['high']:.2f})")
        cells += [f"{told['tasks'][task]:.2f}" for task in self.tasks] if len(self.tasks) > 1 else []
        cells.append(f"{told['begun']:.2f}")
        cells += [f"{told[name] / _MIB:.2f}" for name in ("context_bytes", "held_bytes", "peak_bytes")]
        cells += [f"{told['prefill_seconds']:.2f}", f"{1000 * told['decode_seconds_per_token']:.1f}"]
        return cells

    def write_into(self, page: Path) -> None:
        """Put the table between the page's markers."""
        text = page.read_text(encoding="utf-8")
        if BEGIN not in text or END not in text:
            raise SystemExit(f"{page} has no lines {BEGIN!r} and {END!r}: put them where the table belongs")
        before, rest = text.split(BEGIN, 1)
        after = rest.split(END, 1)[1]
        page.write_text(f"{before}{BEGIN}\n\n{self.markdown()}\n\n{END}{after}", encoding="utf-8")


def _heading(budget: str) -> str:
    if budget == FULL:
        return "Full cache"
    return "Quantised caches" if not budget.endswith("%") else f"{budget} of the context's tokens"


def _agreement_table(told: list[dict[str, Any]]) -> str:
    lines = [
        "| full cache of | prefill | transformers | same answer | logits apart, at most |",
        "|---|---|---|---|---|",
    ]
    for t in told:
        how = "one shot" if t["chunk"] is None else f"chunks of {t['chunk']}"
        apart = "–" if t["logits_apart"] is None else f"{t['logits_apart']:.1e}"
        version = t["versions"].get("transformers", "")
        lines.append(
            f"| {t['system']} | {how} | {version} | {t['same_output']} of {t['samples']} | {apart} |"
        )
    return "\n".join(lines)


def _short(task: str) -> str:
    """A task without the length of its answers."""
    kind, _, settings = task.partition(":")
    kept = ",".join(s for s in settings.split(",") if not s.startswith("max_new_tokens="))
    return f"`{kind}:{kept}`" if kept else f"`{kind}`"


def _plain(text: str) -> str:
    return text.replace("|", "/").replace("\n", " ")


def _lines(path: Path) -> list[dict[str, Any]]:
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
