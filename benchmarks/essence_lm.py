"""Essence distillation of a language model: perplexity and recall of `reference`, pruned to 70 % by ALPS,
before and after it learns from itself unpruned; and the bytes of the recorded targets. One core, about four
minutes.

    python benchmarks/essence_lm.py            # writes docs/benchmarks_essence_lm.json and the table
    python benchmarks/essence_lm.py --quick    # a few steps; writes nothing
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
import time
from datetime import datetime
from pathlib import Path
from typing import Any

import machine
import prune
import report
import torch
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
from modicum.distill.sequences import with_questions
from modicum.kv.fingerprint import weights_digest
from modicum.weights import calibration, packed, save
from modicum.weights.perplexity import perplexity

_DOCS = Path(__file__).resolve().parent.parent / "docs"
NAME, KEEP, SPARSITY, LENGTH = "reference", "topk=16", 0.7, 512
TASKS = "niah_single_2:max_new_tokens=24,niah_multikey_1:keys=8,max_new_tokens=24"
EPOCHS, BATCH, RATE = 4, 4, 1e-3
SOURCES = ("text", "text and questions")


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
        self.recall = prune.Recall(self.tokenizer, seed)
        self.digest = weights_digest(self.teacher)
        model, _ = modicum.load(NAME, dtype="float32", device="cpu")
        self.dense = self.measure(model)
        found = modicum.prune(model, calibrating, method="alps", refine=None, sparsity=SPARSITY)
        save(found, model, self.tokenizer, folder / "pruned")
        self.pruned = self.measure(model)

    def measure(self, model: Any) -> dict[str, float]:
        """Perplexity of held-back text, and recall."""
        return {"perplexity": perplexity(model, self.held), "recall": self.recall.of(model)}

    def ids(self, source: str) -> Tensor:
        """What is learned from: the text twice, or the text and as many questions."""
        twice = torch.cat([self.text, self.text])
        if source == SOURCES[0]:
            return twice
        # The first half becomes questions, so that each stretch of text is there once.
        return with_questions(twice, self.tokenizer, TASKS, 0.5, self.seed)

    def distill(self, source: str, epochs: int) -> dict[str, Any]:
        """Record, train, measure."""
        ids = self.ids(source)
        header = TargetsHeader(self.teacher.config.vocab_size, KEEP, about={"teacher": self.digest})
        targets_folder = self.folder / f"targets of {source}"
        started = time.perf_counter()
        with TargetsWriter(targets_folder, header) as writer:
            record(Ensemble.of([lambda x: self.teacher(x).logits[:, :-1]]), ids, writer)
        recorded = time.perf_counter()
        targets = SparseTargets(targets_folder)
        student = Student.load(self.folder / "pruned", "cpu")
        settings = TrainingSettings(epochs=epochs, batch=BATCH, learning_rate=RATE, seed=self.seed)
        losses = train(student, ids, targets, settings, progress=_tell)
        trained = time.perf_counter()
        student.save(self.folder / source, {})
        stored = targets.statistics
        return {
            "source": source,
            **self.measure(student.model),
            "sequences": len(ids),
            "steps": len(losses),
            "seconds_recording": recorded - started,
            "seconds_training": trained - recorded,
            "loss_first": losses[0],
            "loss_last": losses[-1],
            "masks_unchanged": _same_masks(self.folder / "pruned", self.folder / source),
            "sparsity": student.sparsity,
            "captured_mass": stored.captured_mass,
            "nbytes_per_frame": stored.nbytes_per_frame,
            "dense_nbytes_per_frame": stored.dense_nbytes_per_frame,
            "file_bytes": (self.folder / source / packed.FILE).stat().st_size,
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
        *(
            [f"distilled on {x['source']}", *_cells(x), f"{x['seconds_training']:.0f} s"]
            for x in raw["found"]
        ),
    ]
    ratio = first["dense_nbytes_per_frame"] / first["nbytes_per_frame"]
    same = all(x["masks_unchanged"] for x in raw["found"])
    return "\n\n".join(
        [
            f"Measured {raw['date']} in {raw['minutes']} minutes on one core ({m['processor']}), float32, "
            f"one seed: `{NAME}`, calibrated on {prune.SEQUENCES} sequences of 256 tokens of the sample "
            f"text; {first['sequences']} sequences of {LENGTH} tokens to learn from, the rest of that text "
            f"twice, or once and as many generated questions; {first['steps']} steps of {BATCH} sequences, "
            f"`{KEEP}`, hard weight 0.5. Perplexity is of {prune.HELD} sequences that nothing was learned "
            f"from, recall of {prune.ASKED} questions each of {' and '.join(f'`{x}`' for x in prune.TASKS)} "
            "that were not learned from either.",
            report.table(["", "perplexity", "recall", "training"], rows),
            f"The masks are {'' if same else 'NOT '}the same bit for bit, and the packed file has "
            f"{first['file_bytes']:,} bytes, {raw['pruned_bytes']:,} before. A recorded token takes "
            f"{first['nbytes_per_frame']:.1f} bytes and not the {first['dense_nbytes_per_frame']:,} of its "
            f"logits in 16 bits ({ratio:.0f} times as many), and its 16 classes hold "
            + " and ".join(f"{x['captured_mass']:.0%}" for x in raw["found"])
            + " of the probability.",
        ]
    )


def _cells(found: dict[str, Any]) -> list[str]:
    return [f"{found['perplexity']:.1f}", f"{found['recall']:.0%}"]


def main() -> None:
    """Measure, write, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a few steps; writes nothing")
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
        for source in SOURCES:
            raw["found"].append(bench.distill(source, 1 if asked.quick else EPOCHS))
            print(json.dumps(raw["found"][-1]), file=sys.stderr, flush=True)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    raw |= machine.since(started)
    print(section(raw))
    if not asked.quick:
        text = json.dumps(raw, indent=1) + "\n"
        (_DOCS / "benchmarks_essence_lm.json").write_text(text, encoding="utf-8")
        report.write(section(raw), _DOCS / "distill.md", "essence-lm")


if __name__ == "__main__":
    main()
