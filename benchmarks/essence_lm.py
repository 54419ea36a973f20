"""Essence distillation of language models: perplexity and recall of a pruned model before and after it learns
from itself unpruned, and the bytes of the recorded targets. One core, resumable.

    python benchmarks/essence_lm.py --work FOLDER                  # `reference`: about ten minutes a seed
    python benchmarks/essence_lm.py --work FOLDER --model smollm2  # about an hour
    python benchmarks/essence_lm.py --work FOLDER --quick          # one way and seed; for a trial
    python benchmarks/essence_lm.py --work FOLDER --docs           # docs/benchmarks_essence_lm.json, tables
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import prune
import report
import torch
from measured_rows import append_row, read_rows, work_folder, write_docs

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
from modicum.distill.checkpoint import TrainingCheckpoint
from modicum.distill.essence import Tail
from modicum.distill.model_digest import model_digest
from modicum.distill.sequences import Questions, Sequences, digest, with_questions
from modicum.distill.teachers import greedy_answers
from modicum.weights import calibration, packed, save
from modicum.weights.perplexity import perplexity
from modicum.whole_file import whole_file

KEEP, LENGTH = "topk=16", 512
TASKS = "niah_single_2:max_new_tokens=24,niah_multikey_1:keys=8,max_new_tokens=24"
QUESTION_SEEDS = 2
"""Of the questions that recall is measured by: 32 each."""


@dataclass(frozen=True)
class Way:
    """One way to distil. The text is learned from once, with `questions` times as many generated ones."""

    tail: Tail
    hard_weight: float
    questions: int = 2
    rate: float = 1e-4
    answer_weight: float = 0.0

    @property
    def title(self) -> str:
        """As the table names it."""
        parts = [f"λ = {self.hard_weight:g}", f"tail `{self.tail}`"]
        if self.questions != Way.questions:
            parts.append(f"{self.questions} questions for each sequence")
        if self.rate != Way.rate:
            parts.append(f"learning rate {self.rate:g}")
        if self.answer_weight:
            parts.append(f"answers weigh {self.answer_weight:g} more")
        return ", ".join(parts)


@dataclass(frozen=True)
class Subject:
    """A model, how it is pruned, and how it learns.

    Attributes:
        sequences: of the text, at most; None for all there are.
        held: sequences of calibration length that perplexity is measured on.
    """

    sparsity: float
    batch: int
    ways: tuple[Way, ...]
    seeds: tuple[int, ...]
    method: str = "alps"
    update: str | None = None
    sequences: int | None = None
    calibrating: int = prune.SEQUENCES
    held: int = prune.HELD
    length: int = 256


SUBJECTS = {
    "reference": Subject(
        0.7,
        4,
        (
            Way("bin", 0.0),
            Way("bin", 0.25),
            Way("renormalize", 0.0),
            Way("bin", 0.25, answer_weight=0.5),
            Way("bin", 0.25, answer_weight=1.0),
            Way("bin", 0.25, answer_weight=2.0),
        ),
        (0, 1, 2),
    ),
    # ALPS takes an hour there.
    "smollm2": Subject(
        0.6, 4, (Way("bin", 0.25, rate=5e-5, answer_weight=1.0),), (0,), "wanda", "lsq", sequences=24
    ),
}


class Recall:
    """Questions of several seeds."""

    def __init__(self, tokenizer: Any) -> None:
        self.parts = [prune.Recall(tokenizer, seed) for seed in range(QUESTION_SEEDS)]

    def of(self, model: Any) -> float:
        """The share of the wanted answers that are given."""
        return statistics.mean(part.of(model) for part in self.parts)


class Bench:
    """One model and seed: the pruned model in a folder, what it is measured on, and what it learns from."""

    def __init__(self, work: Path, name: str, seed: int) -> None:
        self.work, self.name, self.seed = work, name, seed
        self.folder = work / f"{name}-{seed}"
        self.subject = SUBJECTS[name]
        self.teacher, self.tokenizer = modicum.load(name, dtype="float32", device="cpu")
        subject = self.subject
        windows = calibration.tokens(modicum.sample_text(), self.tokenizer, None, subject.length, seed)
        end = subject.calibrating + subject.held
        self.calibrating, self.held = windows[: subject.calibrating], windows[subject.calibrating : end]
        # Nothing is learned from the windows that perplexity is measured on.
        rest = torch.cat([self.calibrating, windows[end:]])
        self.text = rest[: len(rest) // 2 * 2].view(-1, LENGTH)[: subject.sequences]
        self.recall = Recall(self.tokenizer)

    def run(self, ways: Sequence[Way]) -> None:
        """Measure what has no row yet."""
        self.once("dense", lambda: self.measure(self.teacher))
        self.once("pruned", self.prune)
        for way in ways:
            self.once(way.title, lambda way=way: self.distill(way))  # type: ignore[misc]

    def once(self, title: str, measure: Callable[[], dict[str, Any]]) -> None:
        """Append a row, unless it is there."""
        key = f"{self.name}, {self.seed}, {title}"
        if any(row["key"] == key for row in read_rows(self.work)):
            return
        started = time.process_time()
        row = {"key": key, "model": self.name, "seed": self.seed, "title": title, **measure()}
        row["cpu_seconds"] = round(time.process_time() - started, 1)
        append_row(self.work, row)
        print(json.dumps(row), file=sys.stderr, flush=True)

    def measure(self, model: Any) -> dict[str, float]:
        """Perplexity of held-back text, and recall."""
        return {"perplexity": perplexity(model, self.held), "recall": self.recall.of(model)}

    def prune(self) -> dict[str, Any]:
        """The folder gets the packed file."""
        model, _ = modicum.load(self.name, dtype="float32", device="cpu")
        found = modicum.prune(
            model,
            self.calibrating,
            method=self.subject.method,
            update=self.subject.update,
            refine=None,
            sparsity=self.subject.sparsity,
            resume=self.folder / "pruning",
            progress=_tell,
        )
        shutil.rmtree(self.folder / "pruned", ignore_errors=True)  # of a run that was stopped before its row
        save(found, model, self.tokenizer, self.folder / "pruned")
        return {**self.measure(model), "file_bytes": _file_bytes(self.folder / "pruned")}

    def sequences(self, way: Way) -> Sequences:
        """What is learned from: kept in the folder, as questions are answered for a while."""
        path = self.folder / f"sequences-{way.questions}.pt"
        if path.exists():
            return Sequences(*torch.load(path))
        copies = torch.cat([self.text] * (1 + way.questions))
        # The first copies become questions, so that each stretch of text is there once.
        questions = Questions(TASKS, 1 - 1 / (1 + way.questions), self.seed)
        found = with_questions(
            copies,
            self.tokenizer,
            questions,
            lambda prompts, room: greedy_answers(self.teacher, self.tokenizer, prompts, room),
            lambda done, total: _tell("answers", done, total),
        )
        with whole_file(path) as part:
            torch.save((found.ids, found.answers), part)
        return found

    def distill(self, way: Way) -> dict[str, Any]:
        """Record, unless it was, train, measure."""
        found, subject = self.sequences(way), self.subject
        ids = found.ids
        about = {"teacher": model_digest(self.teacher), "ids": digest(ids)}
        header = TargetsHeader(self.teacher.config.vocab_size, KEEP, about=about)
        targets_folder = self.folder / f"targets-{way.questions}"
        with TargetsWriter(targets_folder, header) as writer:
            record(Ensemble.of([lambda x: self.teacher(x).logits[:, :-1]]), ids, writer)
        targets = SparseTargets(targets_folder)
        student = Student.load(self.folder / "pruned", "cpu")
        settings = TrainingSettings(
            epochs=1,
            batch=subject.batch,
            learning_rate=way.rate,
            hard_weight=way.hard_weight,
            tail=way.tail,
            answer_weight=way.answer_weight,
            seed=self.seed,
            save_every=10,
        )
        name = f"{way.tail}-{way.hard_weight:g}-{way.questions}-{way.rate:g}-{way.answer_weight:g}"
        out = self.folder / name
        checkpoint = TrainingCheckpoint(self.folder / f"{name}.safetensors", f"{header.digest}, {settings}")
        shutil.rmtree(out, ignore_errors=True)
        started = time.process_time()
        losses = train(
            student, ids, targets, settings, answers=found.answers, checkpoint=checkpoint, progress=_step
        )
        trained = time.process_time()
        student.save(out, {})
        checkpoint.path.unlink(missing_ok=True)
        stored = targets.statistics
        return {
            **asdict(way),
            **self.measure(student.model),
            "sequences": len(ids),
            "steps": len(losses),
            "seconds_training": trained - started,
            "masks_unchanged": _same_masks(self.folder / "pruned", out),
            "sparsity": student.sparsity,
            "captured_mass": stored.captured_mass,
            "nbytes_per_frame": stored.nbytes_per_frame,
            "dense_nbytes_per_frame": stored.dense_nbytes_per_frame,
            "file_bytes": _file_bytes(out),
        }


def _file_bytes(folder: Path) -> int:
    return (folder / packed.FILE).stat().st_size


def _same_masks(before: Path, after: Path) -> bool:
    """Whether two packed files have the same masks, bit for bit."""
    masks = [packed.masks_of(*packed.read(folder)) for folder in (before, after)]
    return masks[0].keys() == masks[1].keys() and all(
        torch.equal(mask, masks[1][name]) for name, mask in masks[0].items()
    )


def _step(done: int, total: int) -> None:
    if done % 10 == 0:
        _tell("step", done, total)


def _tell(what: str, done: int, total: int) -> None:
    print(f"{what}: {done} of {total}", file=sys.stderr, flush=True)


# -- tables --------------------------------------------------------------------------------------------------


def section(raw: dict[str, Any]) -> str:
    """All tables, markers left out."""
    minutes = sum(row["cpu_seconds"] for row in raw["rows"]) / 60
    parts = [
        f"Measured {raw['date']} in {minutes:.0f} minutes of one core ({raw['machine']['processor']}), "
        f"float32; mean and, behind ±, standard deviation over seeds. Pruned on "
        f"{prune.SEQUENCES} sequences of 256 tokens of the sample text. Learned from once: sequences of "
        f"{LENGTH} tokens of the rest of that text, and generated questions with the teacher's answers; "
        f"`{KEEP}`. Perplexity is of {prune.HELD} sequences that nothing was learned from, recall of "
        f"{QUESTION_SEEDS * prune.ASKED} questions each of {' and '.join(f'`{x}`' for x in prune.TASKS)}, "
        "other ones than were learned from."
    ]
    for name, subject in SUBJECTS.items():
        rows = [row for row in raw["rows"] if row["model"] == name]
        if any("tail" in row for row in rows):
            how = {"alps": "ALPS", "wanda": "Wanda, with least squares"}[subject.method]
            title = f"**{name}**, {subject.sparsity:.0%} of the weights pruned by {how}:"
            parts += [title, *_table(rows, subject)]
    return "\n\n".join(parts)


def _table(rows: Sequence[dict[str, Any]], subject: Subject) -> list[str]:
    titles = {"dense": "dense (the teacher)", "pruned": "pruned"}
    lines = []
    for title in dict.fromkeys(row["title"] for row in rows):
        some = [row for row in rows if row["title"] == title]
        learned = f"{some[0]['sequences']}" if "sequences" in some[0] else ""
        seconds = f"{statistics.mean(x['seconds_training'] for x in some):.0f} s" if learned else ""
        recall = report.mean_and_deviation([100 * x["recall"] for x in some], 1)
        lines.append([
            titles.get(title, title), report.mean_and_deviation([x["perplexity"] for x in some], 1),
            f"{recall}%", learned, seconds, str(len(some)),
        ])  # fmt: skip
    taught = [row for row in rows if "tail" in row]
    first = taught[0]
    before = {row["seed"]: row["file_bytes"] for row in rows if row["title"] == "pruned"}
    same = "the same" if all(x["masks_unchanged"] for x in taught) else "NOT the same"
    sizes = "has" if all(x["file_bytes"] == before[x["seed"]] for x in taught) else "has not"
    ratio = first["dense_nbytes_per_frame"] / first["nbytes_per_frame"]
    return [
        report.table(["", "perplexity", "recall", "sequences", "training", "seeds"], lines),
        f"The masks are {same} bit for bit, and the packed file {sizes} the bytes that it had, "
        f"{first['file_bytes']:,}; {subject.batch} sequences a step, learning rate "
        f"{Way.rate:g} but where another is given. A "
        f"recorded token takes {first['nbytes_per_frame']:.1f} bytes, its logits in 16 bits "
        f"{first['dense_nbytes_per_frame']:,}, {ratio:.0f} times as many. Its 16 classes hold "
        f"{first['captured_mass']:.0%} of the probability.",
    ]


def main() -> None:
    """Measure what is missing, or write the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="gets models and rows.jsonl")
    parser.add_argument("--model", default="reference", choices=list(SUBJECTS))
    parser.add_argument("--seeds", type=int, nargs="+", help="by default all of the model")
    parser.add_argument("--quick", action="store_true", help="one way and seed; for a trial")
    parser.add_argument("--docs", action="store_true", help="write the tables of what was measured")
    asked = parser.parse_args()
    if asked.docs:
        write_docs(asked.work, section, "benchmarks_essence_lm.json", "distill.md", "essence-lm")
        return
    torch.manual_seed(0)
    subject = SUBJECTS[asked.model]
    work = work_folder(asked.work, asked.quick)
    for seed in subject.seeds[:1] if asked.quick else asked.seeds or subject.seeds:
        Bench(work, asked.model, seed).run(subject.ways[:1] if asked.quick else subject.ways)


if __name__ == "__main__":
    main()
