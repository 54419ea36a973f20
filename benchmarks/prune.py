"""Pruning: perplexity of text held back, the layers' error and seconds, by method, refinement and sparsity,
over seeds of the calibration text. Run by `make bench-prune`.

On the embedded models and the book that comes along: small models and little text, so look at orders.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from datetime import datetime
from pathlib import Path
from typing import Any

import machine
import report
import torch

import modicum
from modicum.weights import calibration
from modicum.weights.dsnot import DSnoT
from modicum.weights.prune import perplexity

_DOCS = Path(__file__).resolve().parent.parent / "docs"
MODELS = {"reference": 256, "stories": 128}
"""And the length of a sequence."""
SEQUENCES, HELD = 32, 16
AMOUNTS: dict[str, dict[str, Any]] = {
    "50 %": {"sparsity": 0.5},
    "60 %": {"sparsity": 0.6},
    "70 %": {"sparsity": 0.7},
    "2:4": {"pattern": "2:4"},
}
PAPER = DSnoT.paper()
WAYS: dict[str, dict[str, Any]] = {
    "magnitude": {"method": "magnitude", "refine": None},
    "magnitude + DSnoT": {"method": "magnitude", "refine": "dsnot"},
    "magnitude + DSnoT, T 50 as released": {"method": "magnitude", "refine": PAPER},
    "magnitude + 1-swap": {"method": "magnitude", "refine": "swap"},
    "Wanda": {"method": "wanda", "refine": None},
    "Wanda + DSnoT": {"method": "wanda", "refine": "dsnot"},
    "Wanda + DSnoT, T 50 as released": {"method": "wanda", "refine": PAPER},
    "Wanda + DSnoT guarded": {"method": "wanda", "refine": "dsnot-guarded"},
    "Wanda + 1-swap": {"method": "wanda", "refine": "swap"},
    "Wanda + 1-swap + least squares": {"method": "wanda", "refine": "swap", "update": "lsq"},
    "RIA": {"method": "ria", "refine": None},
    "RIA + DSnoT": {"method": "ria", "refine": "dsnot"},
    "RIA + 1-swap": {"method": "ria", "refine": "swap"},
    "SparseGPT": {"method": "sparsegpt", "refine": None},
    "SparseGPT + DSnoT": {"method": "sparsegpt", "refine": "dsnot"},
    "SparseGPT + 1-swap": {"method": "sparsegpt", "refine": "swap"},
}


def measure(models: list[str], seeds: int, minutes: float) -> dict[str, Any]:
    """Every way on every model at every amount, seed by seed; ends before the minutes are over."""
    text = modicum.sample_text().read_text(encoding="utf-8")
    until = time.monotonic() + 60 * minutes
    found: list[dict[str, Any]] = []
    dense: dict[str, list[float]] = {name: [] for name in models}
    for seed in range(seeds):
        for name in models:
            model, tokenizer = modicum.load(name, dtype="float32")
            start = {key: value.clone() for key, value in model.state_dict().items()}
            ids = calibration.tokens(text, tokenizer, SEQUENCES + HELD, MODELS[name], seed)
            held = ids[SEQUENCES:]
            dense[name].append(perplexity(model, held))
            for amount, much in AMOUNTS.items():
                for way, how in WAYS.items():
                    if time.monotonic() > until:
                        print("out of time", file=sys.stderr)
                        return {"dense": dense, "found": found}
                    model.load_state_dict(start)
                    made = modicum.prune(model, ids[:SEQUENCES], **how, **much)
                    found.append(
                        {
                            "model": name,
                            "seed": seed,
                            "amount": amount,
                            "way": way,
                            "perplexity": perplexity(model, held),
                            "error": made.error,
                            "seconds": made.seconds,
                        }
                    )
                print(f"seed {seed}, {name}, {amount}", file=sys.stderr, flush=True)
    return {"dense": dense, "found": found}


def whole(raw: dict[str, Any], name: str) -> list[dict[str, Any]]:
    """What was measured of a model with the seeds that saw all of it, or with the only one."""
    mine = [x for x in raw["found"] if x["model"] == name]
    seeds = {seed: sum(x["seed"] == seed for x in mine) for seed in {x["seed"] for x in mine}}
    complete = [seed for seed, count in seeds.items() if count == len(AMOUNTS) * len(WAYS)]
    return [x for x in mine if x["seed"] in (complete or seeds)]


def section(raw: dict[str, Any]) -> str:
    """The tables, markers left out."""
    m = raw["machine"]
    parts = [
        f"Measured {raw['date']} in {raw['minutes']} minutes on {m['cores']} cores ({m['processor']}), "
        f"float32: {SEQUENCES} sequences of the embedded book to calibrate on (reference 256 tokens each, "
        f"stories 128), perplexity of {HELD} others; mean and range over the seeds that chose them. In "
        "brackets the mean share of the layers' squared output that is lost."
    ]
    for name in raw["dense"]:
        rows = []
        mine = whole(raw, name)
        for way in WAYS:
            row = [way]
            for amount in AMOUNTS:
                some = [x for x in mine if (x["way"], x["amount"]) == (way, amount)]
                row.append(_cell(some))
            rows.append(row)
        values = raw["dense"][name][: len({x["seed"] for x in mine})]
        dense = f"{statistics.mean(values):.2f} ({min(values):.2f}–{max(values):.2f})"
        count = len({x["seed"] for x in mine})
        parts.append(f"**`{name}`**, dense {dense}, {count} seeds:")
        parts.append(report.table(["", *AMOUNTS], rows))
    return "\n\n".join(parts)


def _cell(some: list[dict[str, Any]]) -> str:
    if not some:
        return ""
    values = [x["perplexity"] for x in some]
    error = statistics.mean(x["error"] for x in some)
    spread = f" ({min(values):.1f}–{max(values):.1f})" if len(values) > 1 else ""
    return f"{statistics.mean(values):.1f}{spread} [{error:.3f}]"


def main() -> None:
    """Measure, write, and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--minutes", type=float, default=60)
    parser.add_argument("--models", default="reference,stories")
    parser.add_argument("--quick", action="store_true", help="one seed, one minute; writes nothing")
    asked = parser.parse_args()
    started = datetime.now().astimezone()
    torch.manual_seed(0)
    seeds, minutes = (1, 1.0) if asked.quick else (asked.seeds, asked.minutes)
    raw = measure(asked.models.split(","), seeds, minutes)
    raw |= machine.since(started)
    text = section(raw)
    if not asked.quick:
        (_DOCS / "benchmarks_prune.json").write_text(json.dumps(raw, indent=1) + "\n", encoding="utf-8")
        report.write(text, _DOCS / "benchmarks.md", "prune")
    print(text)


if __name__ == "__main__":
    main()
