"""Pruned weights under a cache budget: bytes of weights × bytes of cache × accuracy, the whole way: pruned,
written, loaded from the file, asked. Run by `make bench-prune`.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from datetime import datetime
from pathlib import Path
from typing import Any

import machine
import report
import torch
from prune import AMOUNTS, TASKS, TEXTS, WAYS, Subject, questions

import modicum
from modicum.evaluation.evaluate import evaluate
from modicum.evaluation.grid import Grid
from modicum.weights import packed, save

WEIGHTS = {"dense": None, "50 %": "ALPS", "60 %": "ALPS", "70 %": "ALPS"}
"""How much of the linear layers goes, and by which way."""
CACHES = {"full": "full", "a half": "50%", "a quarter": "25%", "an eighth": "12.5%"}
POLICY, LONG = "auto", 1_024


def measure(samples: int, folder: Path) -> list[dict[str, Any]]:
    """A row for each of the weights and caches."""
    text = modicum.sample_text()
    tasks = questions(*TASKS)
    found = []
    for amount, way in WEIGHTS.items():
        subject = Subject("reference", text, 0)
        if way is None:
            size, name = packed.dense_bytes(subject.model), "reference"
        else:
            made = subject.prune(TEXTS[1], WAYS[way] | AMOUNTS[amount])
            name = str(folder / amount.split()[0])
            size = save(made, subject.model, subject.tokenizer, name)
        for cache, budget in CACHES.items():
            grid = Grid(
                models=(name,),
                policies=("full" if budget == "full" else POLICY,),
                budgets=(budget,),
                tasks=tuple(task.name for task in tasks),
                lengths=(LONG,),
                limit=samples,
                dtype="float32",
            )
            rows = evaluate(grid, folder / f"{amount}-{cache}".replace(" ", ""))
            scores = {
                task: statistics.mean(row.score for row in rows if row.cell.task == task)
                for task in grid.tasks
            }
            found.append(
                {
                    "weights": amount,
                    "cache": cache,
                    "weight_bytes": size,
                    "cache_bytes": statistics.mean(row.context_bytes for row in rows),
                    "scores": scores,
                    "samples": len(rows),
                }
            )
            print(found[-1], flush=True)
    return found


def section(raw: dict[str, Any]) -> str:
    """The table, markers left out."""
    m = raw["machine"]
    rows = []
    for x in raw["found"]:
        scores = list(x["scores"].values())
        rows.append(
            [
                x["weights"],
                x["cache"],
                f"{x['weight_bytes'] / 2**20:.2f} MiB",
                f"{x['cache_bytes'] / 2**20:.2f} MiB",
                f"{statistics.mean(scores):.0%}",
                *(f"{score:.0%}" for score in scores),
            ]
        )
    each = raw["found"][0]["samples"] // len(TASKS)
    head = ["removed", "cache", "weights' file", "cache held", "accuracy", *(f"`{task}`" for task in TASKS)]
    text = (
        f"Measured {raw['date']} on {m['cores']} cores ({m['processor']}): `reference`, by ALPS, calibrated "
        f"on the sample text and questions, written and loaded from its file, then asked {each} questions of "
        f"each task at {LONG:,} tokens, policy `{POLICY}` where the cache is not full (float32). The "
        "question comes after the context was read and cut down."
    )
    return "\n\n".join([text, report.table(head, rows)])


def main() -> None:
    """Measure, write, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--samples", type=int, default=25)
    parser.add_argument("--quick", action="store_true", help="two samples; writes nothing")
    asked = parser.parse_args()
    started = datetime.now().astimezone()
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        raw: dict[str, Any] = {"found": measure(2 if asked.quick else asked.samples, Path(folder))}
    raw |= machine.since(started)
    report.publish(raw, section, "prune-cache", keep=not asked.quick)


if __name__ == "__main__":
    main()
