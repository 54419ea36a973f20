"""Essence distillation of a language model: perplexity and recall of `reference`, pruned to 70 % by ALPS,
before and after it learns from itself unpruned; and the bytes of the recorded targets. One core, about four
minutes.

    python benchmarks/essence_lm.py            # writes docs/benchmarks_essence_lm.json and the table
    python benchmarks/essence_lm.py --quick    # one way; writes nothing
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass
from datetime import datetime
from functools import cached_property
from pathlib import Path
from typing import Any

import machine
import prune
import report
import torch
from page import write_section
from torch import Tensor

import modicum
from modicum.distill import (
    Ensemble,
    SparseTargets,
    Student,
    TargetsHeader,
    TargetsWriter,
    TrainingSettings,
    record,
    train,
)
from modicum.distill.essence import Tail
from modicum.distill.sequences import Questions, with_questions
from modicum.distill.teachers import open_teachers
from modicum.kv.fingerprint import weights_digest
from modicum.weights import calibration, packed, save
from modicum.weights.perplexity import perplexity

_DOCS = Path(__file__).resolve().parent.parent / "docs"
NAME, KEEP, SPARSITY, LENGTH = "reference", "topk=16", 0.7, 512
TASKS = "niah_single_2:max_new_tokens=24,niah_multikey_1:keys=8,max_new_tokens=24"
BATCH, RATE = 4, 1e-4
COPIES = 3
"""The text once, and so many less one times as many questions."""
SEEDS = 2
"""Of the questions that recall is measured by: 32 each."""


@dataclass(frozen=True)
class Way:
    """One way to distil."""

    tail: Tail
    hard_weight: float

    @property
    def title(self) -> str:
        """As the table names it."""
        return f"λ = {self.hard_weight:g}, tail `{self.tail}`"


WAYS = (Way("bin", 0.0), Way("bin", 0.25), Way("renormalize", 0.0))


class Recall:
    """Questions of several seeds."""

    def __init__(self, tokenizer: Any) -> None:
        self.parts = [prune.Recall(tokenizer, seed) for seed in range(SEEDS)]

    def of(self, model: Any) -> float:
        """The share of the wanted answers that are given."""
        return statistics.mean(part.of(model) for part in self.parts)


class Bench:
    """The pruned model in a folder, what it is measured on, and what it learns from."""

    def __init__(self, folder: Path, seed: int) -> None:
        self.folder, self.seed = folder, seed
        self.teacher, self.tokenizer = modicum.load(NAME, dtype="float32", device="cpu")
        size = prune.MODELS[NAME]
        windows = calibration.tokens(modicum.sample_text(), self.tokenizer, None, size, seed)
        end = prune.SEQUENCES + prune.HELD
        calibrating, self.held = windows[: prune.SEQUENCES], windows[prune.SEQUENCES : end]
        # Nothing is learned from the windows that perplexity is measured on.
        rest = torch.cat([calibrating, windows[end:]])
        self.text = rest[: len(rest) // 2 * 2].view(-1, LENGTH)
        self.recall = Recall(self.tokenizer)
        self.digest = weights_digest(self.teacher)
        model, _ = modicum.load(NAME, dtype="float32", device="cpu")
        self.dense = self.measure(model)
        found = modicum.prune(model, calibrating, method="alps", refine=None, sparsity=SPARSITY)
        save(found, model, self.tokenizer, folder / "pruned")
        self.pruned = self.measure(model)

    def measure(self, model: Any) -> dict[str, float]:
        """Perplexity of held-back text, and recall."""
        return {"perplexity": perplexity(model, self.held), "recall": self.recall.of(model)}

    @cached_property
    def ids(self) -> Tensor:
        """What is learned from [n, T]."""
        copies = torch.cat([self.text] * COPIES)
        teachers = open_teachers([NAME], self.tokenizer, copies, device="cpu")
        # The first copies become questions, so that each stretch of text is there once.
        questions = Questions(TASKS, 1 - 1 / COPIES, self.seed)
        return with_questions(copies, self.tokenizer, questions, teachers.answer)

    def distill(self, way: Way) -> dict[str, Any]:
        """Record, unless it was, train, measure."""
        ids = self.ids
        header = TargetsHeader(self.teacher.config.vocab_size, KEEP, about={"teacher": self.digest})
        targets_folder = self.folder / "targets"
        started = time.perf_counter()
        with TargetsWriter(targets_folder, header) as writer:
            record(Ensemble.of([lambda x: self.teacher(x).logits[:, :-1]]), ids, writer)
        recorded = time.perf_counter()
        targets = SparseTargets(targets_folder)
        student = Student.load(self.folder / "pruned", "cpu")
        settings = TrainingSettings(
            epochs=1,
            batch=BATCH,
            learning_rate=RATE,
            hard_weight=way.hard_weight,
            tail=way.tail,
            seed=self.seed,
        )
        losses = train(student, ids, targets, settings, progress=_tell)
        trained = time.perf_counter()
        out = self.folder / way.title.replace(" ", "-")
        student.save(out, {})
        stored = targets.statistics
        return {
            "way": way.title,
            **self.measure(student.model),
            "sequences": len(ids),
            "steps": len(losses),
            "seconds_recording": recorded - started,
            "seconds_training": trained - recorded,
            "loss_first": losses[0],
            "loss_last": losses[-1],
            "masks_unchanged": _same_masks(self.folder / "pruned", out),
            "sparsity": student.sparsity,
            "captured_mass": stored.captured_mass,
            "nbytes_per_frame": stored.nbytes_per_frame,
            "dense_nbytes_per_frame": stored.dense_nbytes_per_frame,
            "file_bytes": (out / packed.FILE).stat().st_size,
        }


def _same_masks(before: Path, after: Path) -> bool:
    """Whether two packed files have the same masks, bit for bit."""
    masks = [packed.masks_of(*packed.read(folder)) for folder in (before, after)]
    return masks[0].keys() == masks[1].keys() and all(
        torch.equal(mask, masks[1][name]) for name, mask in masks[0].items()
    )


def _tell(done: int, total: int) -> None:
    if done % 10 == 0:
        print(f"step {done} of {total}", file=sys.stderr, flush=True)


def section(raw: dict[str, Any]) -> str:
    """The table, markers left out."""
    m, first = raw["machine"], raw["found"][0]
    rows = [
        ["dense (the teacher)", *_cells(raw["dense"]), ""],
        [f"pruned to {SPARSITY:.0%} by ALPS", *_cells(raw["pruned"]), ""],
    ]
    rows += [[f"distilled, {x['way']}", *_cells(x), f"{x['seconds_training']:.0f} s"] for x in raw["found"]]
    ratio = first["dense_nbytes_per_frame"] / first["nbytes_per_frame"]
    same = "the same" if all(x["masks_unchanged"] for x in raw["found"]) else "NOT the same"
    tasks = " and ".join(f"`{x}`" for x in prune.TASKS)
    parts = [
        f"Measured {raw['date']} in {raw['minutes']} minutes on one core ({m['processor']}), float32, one "
        f"seed: `{NAME}`, calibrated on {prune.SEQUENCES} sequences of 256 tokens of the sample text; "
        f"{first['sequences']} sequences of {LENGTH} tokens to learn from, once: the rest of that text, and "
        f"{COPIES - 1} times as many generated questions with the teacher's answers; `{KEEP}`, "
        f"{first['steps']} steps of {BATCH} sequences, learning rate {RATE:g}. Perplexity is of {prune.HELD} "
        f"sequences that nothing was learned from, recall of {SEEDS * prune.ASKED} questions each of "
        f"{tasks}, other ones than were learned from.",
        report.table(["", "perplexity", "recall", "training"], rows),
        f"The masks are {same} bit for bit, and the packed file has {first['file_bytes']:,} bytes, "
        f"{raw['pruned_bytes']:,} before. A recorded token takes {first['nbytes_per_frame']:.1f} bytes, its "
        f"logits in 16 bits {first['dense_nbytes_per_frame']:,}, {ratio:.0f} times as many. Its 16 classes "
        f"hold {first['captured_mass']:.0%} of the probability.",
    ]
    return "\n\n".join(parts)


def _cells(found: dict[str, Any]) -> list[str]:
    return [f"{found['perplexity']:.1f}", f"{found['recall']:.0%}"]


def main() -> None:
    """Measure, write, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one way; writes nothing")
    parser.add_argument("--seed", type=int, default=0)
    asked = parser.parse_args()
    torch.manual_seed(0)
    started = datetime.now().astimezone()
    folder = Path(tempfile.mkdtemp(prefix="modicum-essence-"))
    try:
        bench = Bench(folder, asked.seed)
        raw: dict[str, Any] = {"dense": bench.dense, "pruned": bench.pruned, "found": []}
        raw["pruned_bytes"] = (folder / "pruned" / packed.FILE).stat().st_size
        print(json.dumps(raw), file=sys.stderr, flush=True)
        for way in WAYS[:1] if asked.quick else WAYS:
            raw["found"].append(bench.distill(way))
            print(json.dumps(raw["found"][-1]), file=sys.stderr, flush=True)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    raw |= machine.since(started)
    print(section(raw))
    if not asked.quick:
        text = json.dumps(raw, indent=1) + "\n"
        (_DOCS / "benchmarks_essence_lm.json").write_text(text, encoding="utf-8")
        write_section(_DOCS / "distill.md", "essence-lm", section(raw))


if __name__ == "__main__":
    main()
