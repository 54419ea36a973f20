"""Pruning: perplexity of text held back, recall, the layers' error, seconds and memory, by method, refinement
and sparsity, over seeds of the calibration text. Run by `make bench-prune`.

On the embedded model and the sample text: a small model and little text, so look at orders. What is
in the JSON file already is not run again, unless it is of other code (`--anew`).
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import Any

import fresh
import machine
import report
import torch

import modicum
from modicum.tasks import find_metric, parse_task
from modicum.weights import calibration
from modicum.weights.dsnot import DSnoT
from modicum.weights.perplexity import perplexity

_DOCS = Path(__file__).resolve().parent.parent / "docs"
MODELS = {"reference": 256}
"""And the length of a sequence."""
SEQUENCES, HELD = 32, 16
AMOUNTS: dict[str, dict[str, Any]] = {
    "50 %": {"sparsity": 0.5},
    "60 %": {"sparsity": 0.6},
    "70 %": {"sparsity": 0.7},
    "2:4": {"pattern": "2:4"},
}
PAPER = DSnoT.paper()
"""50 moves, on all layers; the released command refines attention alone, which has rows of its own."""
METHODS = {"magnitude": "magnitude", "Wanda": "wanda", "RIA": "ria", "SparseGPT": "sparsegpt"}
REFINED: dict[str, Any] = {
    "": None,
    " + DSnoT": "dsnot",
    " + DSnoT, T 50": PAPER,
    " + DSnoT guarded": "dsnot-guarded",
    " + 1-swap": "swap",
}
WAYS: dict[str, dict[str, Any]] = {
    title + more: {"method": method, "refine": refine}
    for title, method in METHODS.items()
    for more, refine in REFINED.items()
} | {
    "Wanda + DSnoT, T 50, attention alone": {"method": "wanda", "refine": "dsnot-paper"},
    "SparseGPT + DSnoT, T 50, attention alone": {"method": "sparsegpt", "refine": "dsnot-paper"},
    "Wanda + least squares": {"method": "wanda", "refine": None, "update": "lsq"},
    "Wanda + 1-swap + least squares": {"method": "wanda", "refine": "swap", "update": "lsq"},
    "SparseGPT + least squares": {"method": "sparsegpt", "refine": None, "update": "lsq"},
    "ALPS": {"method": "alps", "refine": None},
}
COSTS = (
    "magnitude",
    *(f"Wanda{more}" for more in REFINED),
    *list(WAYS)[-4:-2],
    "RIA",
    "SparseGPT",
    *list(WAYS)[-2:],
)
"""Ways whose time and memory are measured: what a refinement takes hangs little on the start."""
TASKS = ("niah_single_2", "niah_multikey_1:keys=8")
ASKED, LONG, ANSWER = 16, 512, 24
"""Questions of each task, their tokens, and those of an answer."""


def questions(*names: str) -> list[Any]:
    """Tasks by their names, with short answers."""
    short = f"max_new_tokens={ANSWER}"
    return [task for name in names for task in parse_task(f"{name}{',' if ':' in name else ':'}{short}")]


class Recall:
    """Questions about numbers in a stretch of text, all of a task answered in one batch."""

    def __init__(self, tokenizer: Any, seed: int) -> None:
        self.tokenizer = tokenizer
        tasks = questions(*TASKS)
        self.samples = [[task.sample(i, LONG, tokenizer, seed) for i in range(ASKED)] for task in tasks]

    def of(self, model: Any) -> float:
        """The share of the wanted answers that are given, greedily."""
        scores = []
        for some in self.samples:
            prompts = self.tokenizer(
                [x.context + x.question for x in some], return_tensors="pt", padding=True
            )
            prompts.pop("token_type_ids", None)
            out = model.generate(**prompts, max_new_tokens=ANSWER, do_sample=False)
            told = self.tokenizer.batch_decode(
                out[:, prompts["input_ids"].shape[1] :], skip_special_tokens=True
            )
            scores += [find_metric(x.metric)(text, x.answers) for x, text in zip(some, told, strict=True)]
        return statistics.mean(scores)


TEXTS = ("sample text", "sample text and questions")
TEXT_WAYS = (
    "Wanda",
    "Wanda + DSnoT",
    "Wanda + 1-swap",
    "Wanda + 1-swap + least squares",
    "SparseGPT",
    "ALPS",
)
"""Ways whose calibration text is changed, too: half of it asks for numbers as the recall tasks do."""
ODD = 97
"""Added to a seed for questions to calibrate on, so that none is asked again."""


def mixed(ids: torch.Tensor, tokenizer: Any, seed: int) -> torch.Tensor:
    """Half of the sequences, and as many of other questions of the recall tasks, of the same length."""
    half, length = len(ids) // 2, ids.shape[1]
    tasks = questions("niah_single_2", "niah_multikey_1:keys=2")  # more keys take more tokens than there are
    rows = []
    for index in range(half):
        # As long as fits with its answer behind it, filled up from the front by the text.
        sample = tasks[index % len(tasks)].sample(index // 2, length, tokenizer, seed + ODD)
        text = f"{sample.context}{sample.question} {sample.answers[0]}"
        row = tokenizer(text, add_special_tokens=False)["input_ids"][-length:]
        rows.append(ids[half + index, : length - len(row)].tolist() + row)
    return torch.cat([ids[:half], torch.tensor(rows)])


Found = list[dict[str, Any]]


def measure(
    models: list[str], seeds: int, minutes: float, raw: dict[str, Any], save: Callable[[], None]
) -> None:
    """Every way on every model at every amount that `raw` lacks, seed by seed, while there is time."""
    text = modicum.sample_text()
    until = time.monotonic() + 60 * minutes
    for seed in range(seeds):
        for name in models:
            subject = Subject(name, text, seed)
            if all(x["way"] != "dense" for x in of(raw["found"], model=name, seed=seed)):
                raw["found"].append({"model": name, "seed": seed, "way": "dense", **subject.told()})
            jobs = [(amount, way, TEXTS[0]) for amount in AMOUNTS for way in WAYS]
            jobs += [("60 %", way, TEXTS[1]) for way in TEXT_WAYS]
            # What was run before is kept, so ways that are new are all that is run.
            for amount, way, source in jobs:
                key = {"model": name, "seed": seed, "amount": amount, "way": way, "text": source}
                if of(raw["found"], **key):
                    continue
                if time.monotonic() > until:
                    print("out of time", file=sys.stderr)
                    return
                made = subject.prune(source, WAYS[way] | AMOUNTS[amount])
                raw["found"].append({**key, **subject.told(), "error": made.error, "seconds": made.seconds})
                save()
                last = raw["found"][-1]
                print(
                    f"{name} {seed} {amount} {way}, {source}: {last['perplexity']:.1f}, {last['recall']}, "
                    f"{made.seconds:.1f} s",
                    file=sys.stderr,
                    flush=True,
                )


class Subject:
    """A model, what it is calibrated on and what it is asked, with one seed."""

    def __init__(self, name: str, text: str, seed: int) -> None:
        self.model, self.tokenizer = modicum.load(name, dtype="float32")
        self.start = {key: value.clone() for key, value in self.model.state_dict().items()}
        ids = calibration.tokens(text, self.tokenizer, SEQUENCES + HELD, MODELS[name], seed)
        self.held = ids[SEQUENCES:]
        self.ids = {TEXTS[0]: ids[:SEQUENCES], TEXTS[1]: mixed(ids[:SEQUENCES], self.tokenizer, seed)}
        self.recall = Recall(self.tokenizer, seed)

    def prune(self, source: str, how: dict[str, Any]) -> Any:
        """Prune it anew; the report."""
        self.model.load_state_dict(self.start)
        return modicum.prune(self.model, self.ids[source], **how)

    def told(self) -> dict[str, Any]:
        """What it does by now."""
        asked = self.recall.of(self.model)
        return {"perplexity": perplexity(self.model, self.held), "recall": asked}


def of(found: Found, **key: Any) -> Found:
    """What was found with these values."""
    return [x for x in found if all(x.get(name) == value for name, value in key.items())]


def costs(way: str) -> dict[str, Any]:
    """What pruning the reference model to 60 % takes; in a process of its own."""
    subject = Subject("reference", modicum.sample_text(), 0)
    subject.model(subject.held[:1])
    before = machine.peak_memory()
    seconds = [subject.prune(TEXTS[0], WAYS[way] | AMOUNTS["60 %"]).seconds for _ in range(3)]
    return {"way": way, "seconds": statistics.median(seconds), "peak": machine.peak_memory() - before}


def section(raw: dict[str, Any]) -> str:
    """The tables, markers left out."""
    m = raw["machine"]
    parts = [
        f"Measured {raw['date']} in {raw['minutes']} minutes on {m['cores']} cores ({m['processor']}), "
        f"float32: {SEQUENCES} sequences of 256 tokens of the sample text to calibrate on, "
        f"perplexity of {HELD} others; mean and range over the seeds that chose them. In "
        "brackets the mean share of the layers' squared output that is lost. *T 50*: the paper's 50 moves, "
        "whatever they do, on all layers; the released command refines attention alone."
    ]
    for name in dict.fromkeys(x["model"] for x in raw["found"]):
        mine = of(raw["found"], model=name)
        seeds = len({x["seed"] for x in mine})
        dense = spread([x["perplexity"] for x in of(mine, way="dense")])
        rows = [
            [way, *(_cell(of(mine, way=way, amount=amount, text=TEXTS[0])) for amount in AMOUNTS)]
            for way in WAYS
        ]
        parts += [f"**`{name}`**, dense {dense}, {seeds} seeds:", report.table(["", *AMOUNTS], rows)]
    mine = of(raw["found"], model="reference")
    if not mine:
        return "\n\n".join(parts)
    dense = statistics.mean(x["recall"] for x in of(mine, way="dense"))
    rows = [
        [way, *(_recall(of(mine, way=way, amount=amount, text=TEXTS[0])) for amount in AMOUNTS)]
        for way in WAYS
    ]
    parts += [
        f"**Recall** of `reference`, dense {dense:.0%}: the share of wanted numbers that it gives, of "
        f"{ASKED} questions each of {' and '.join(f'`{x}`' for x in TASKS)}, {LONG} tokens, calibrated "
        "on the sample text; mean and range over seeds.",
        report.table(["", *AMOUNTS], rows),
        "**What it is calibrated on** decides what stays. At 60 %, `reference`, perplexity and recall: the "
        "sample text; or half of it that text, half other questions of those tasks with their answers.",
        report.table(
            ["", *(f"{what}, {source}" for source in TEXTS for what in ("perplexity", "recall"))],
            [
                [way]
                + [
                    cell
                    for source in TEXTS
                    for some in [of(mine, way=way, amount="60 %", text=source)]
                    for cell in (spread([x["perplexity"] for x in some]), _recall(some))
                ]
                for way in TEXT_WAYS
            ],
        ),
    ]
    if raw.get("costs"):
        base = of(raw["costs"], way="SparseGPT")[0]["seconds"]
        rows = [
            [x["way"], f"{x['seconds']:.1f} s", f"{x['seconds'] / base:.2f}", f"{x['peak'] / 2**20:.0f} MiB"]
            for x in raw["costs"]
        ]
        parts += [
            "**What it takes**, `reference` to 60 % on all 8,192 tokens, each way in a fresh process: median "
            "of three times, and peak memory above the loaded model.",
            report.table(["", "time", "÷ SparseGPT's", "memory"], rows),
        ]
    return "\n\n".join(parts)


def spread(values: list[float]) -> str:
    """Mean and range."""
    if not values:
        return ""
    more = f" ({min(values):.1f}–{max(values):.1f})" if len(values) > 1 else ""
    return f"{statistics.mean(values):.1f}{more}"


def _cell(some: Found) -> str:
    if not some:
        return ""
    return f"{spread([x['perplexity'] for x in some])} [{statistics.mean(x['error'] for x in some):.3f}]"


def _recall(some: Found) -> str:
    if not some:
        return ""
    values = [x["recall"] for x in some]
    return f"{statistics.mean(values):.0%} ({min(values):.0%}–{max(values):.0%})"


def main() -> None:
    """Measure, write, and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--minutes", type=float, default=90)
    parser.add_argument("--models", default="reference")
    parser.add_argument("--anew", action="store_true", help="run again what the JSON file has")
    parser.add_argument("--quick", action="store_true", help="one seed, one minute; writes nothing")
    parser.add_argument("--costs", metavar="WAY", help="print one way's time and memory")
    parser.add_argument("--without-costs", action="store_true", help="leave time and memory for another run")
    asked = parser.parse_args()
    torch.manual_seed(0)
    if asked.costs:
        print(json.dumps(costs(asked.costs)))
        return
    started = datetime.now().astimezone()
    path = _DOCS / "benchmarks_prune.json"
    raw: dict[str, Any] = {"text": TEXTS[0], "found": []}
    if path.exists() and not asked.anew and not asked.quick:
        known = json.loads(path.read_text(encoding="utf-8"))
        if known.get("text") == TEXTS[0]:  # else it is of a text that an earlier version carried
            raw = known
    before = raw.get("minutes", 0)

    def save() -> None:
        raw.update(machine.since(started))
        raw["minutes"] = round(raw["minutes"] + before, 1)
        if not asked.quick:
            path.write_text(json.dumps(raw, indent=1) + "\n", encoding="utf-8")

    seeds, minutes = (1, 1.0) if asked.quick else (asked.seeds, asked.minutes)
    measure(asked.models.split(","), seeds, minutes, raw, save)
    if not (asked.quick or asked.without_costs or raw.get("costs")):
        raw["costs"] = [fresh.answer(Path(__file__).name, [f"--costs={way}"]) for way in COSTS]
    save()
    report.publish(raw, section, "prune", keep=not asked.quick)


if __name__ == "__main__":
    main()
