"""Essence distillation of speech models: what an ensemble's soft targets bring to a student, how many of them
are needed, and whether a student beats its ensemble. One core, some two hours, resumable.

    python benchmarks/essence.py --work FOLDER [--digits FSDD]  # measures what rows.jsonl does not have
    python benchmarks/essence.py --work FOLDER --quick          # one small seed of each task, minutes
    python benchmarks/essence.py --work FOLDER --docs           # docs/benchmarks_essence.json and the tables

Two tasks. "phones": thirds of phones in synthetic speech with noise of 0 to 20 dB, eight voices held out.
"digits": letters of spoken digits, by CTC, of the Free Spoken Digit Dataset, two speakers held out.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import sys
import time
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from essence_tables import CONDITIONS, MEMBERS, WRONG, section
from measured_rows import append_row, read_rows, work_folder, write_docs

from modicum.distill import Ensemble, SparseTargets, TargetsWriter
from modicum.speech import (
    ConvCtcSettings,
    CorpusSettings,
    DfsmnCtcSettings,
    Evaluation,
    FeatureCorpus,
    FrameModelSettings,
    ModelSettings,
    NoiseSettings,
    Recipe,
    Recognizer,
    SynthesisSettings,
    TeachingSettings,
    TokenSet,
    Utterance,
    build_corpus,
    evaluate,
    read_digits,
    read_manifest,
    record_targets,
    split_speakers,
    synthesize,
    train,
    word_error_rate,
)
from modicum.speech.examples import reference_text
from modicum.speech.viterbi import PhoneViterbi

SEEDS = (0, 1, 2)
RULES = ("threshold=0.001", "threshold=0.01", "mass=0.9", "mass=0.95", "mass=0.99")
GUIDED = 0.75
"""λ of members in the condition "guided"."""


@dataclass(frozen=True)
class Sizes:
    """How much is trained."""

    hours: float = 0.3
    test_hours: float = 0.1
    more_hours: float = 0.6
    frame_epochs: int = 7
    ctc_epochs: int = 10
    seeds: tuple[int, ...] = SEEDS


QUICK = Sizes(hours=0.03, test_hours=0.01, more_hours=0.06, frame_epochs=2, ctc_epochs=2, seeds=(0,))


@dataclass(frozen=True)
class Cell:
    """One student, or an ensemble's member (a number) or the ensemble itself ("all")."""

    task: str
    seed: int
    condition: str = "plain"
    """Of the ensemble and the labels: plain, wrong (labels), mixed (architectures), more (speech); for CTC
    also guided (members learn from the first where to speak) and one (the first member is the only teacher).
    """
    model: str = "quarter"
    """base (as a member), quarter, large."""
    member: int | None = None
    is_ensemble: bool = False
    keep: str = ""
    """Empty: hard labels only; "full": all classes."""
    hard_weight: float = 0.5
    temperature: float = 1.0
    longer: int = 1
    """Factor of the epochs."""

    @property
    def key(self) -> str:
        """Tells it from all others."""
        return json.dumps(asdict(self), sort_keys=True)


# -- tasks ---------------------------------------------------------------------------------------------------


@dataclass
class Task:
    """Data and models."""

    name: str
    work: Path
    sizes: Sizes
    models: dict[str, ModelSettings]
    others: tuple[ModelSettings, ...]
    """Members of the condition "mixed"."""
    recipe: Recipe
    rules: tuple[str, ...]
    middle: str
    """What is kept where other things are varied."""
    corpora: dict[str, FeatureCorpus] = field(default_factory=dict)

    def train_utterances(self, condition: str) -> list[Utterance]:
        """With labels, in the condition."""
        raise NotImplementedError

    def test_utterances(self) -> list[Utterance]:
        """By other voices."""
        raise NotImplementedError

    def corpus_settings(self, is_test: bool) -> CorpusSettings:
        """Of features."""
        raise NotImplementedError

    @cached_property
    def tokens(self) -> TokenSet:
        """Classes."""
        raise NotImplementedError

    @cached_property
    def test(self) -> FeatureCorpus:
        """Features of the test."""
        return build_corpus(
            self.test_utterances(), self.work / self.name / "test", self.corpus_settings(True)
        )

    def corpus(self, condition: str) -> FeatureCorpus:
        """Features to train on."""
        name = condition if condition in ("wrong", "more") else "plain"
        if name not in self.corpora:
            folder = self.work / self.name / f"train-{name}"
            utterances = self.train_utterances(name)
            self.corpora[name] = build_corpus(utterances, folder, self.corpus_settings(False))
        return self.corpora[name]

    def score(self, recognizers: Sequence[Recognizer]) -> dict[str, float]:
        """Rates in the test."""
        raise NotImplementedError


class Phones(Task):
    """Thirds of phones in synthetic speech."""

    def _folder(self, seed: int, hours: float) -> Path:
        folder = self.work / f"speech-{seed}"
        synthesize(folder, SynthesisSettings(hours, self.sizes.test_hours, num_voices=24, seed=seed))
        return folder

    def train_utterances(self, condition: str) -> list[Utterance]:
        if condition == "more":
            return read_manifest(self._folder(1, self.sizes.more_hours) / "train")
        rows = read_manifest(self._folder(0, self.sizes.hours) / "train")
        if condition != "wrong":
            return rows
        chance, phones = random.Random(0), self.tokens.symbols[1:]
        return [
            replace(
                row,
                phones=tuple(
                    replace(x, phone=chance.choice(phones)) if chance.random() < WRONG else x
                    for x in row.phones
                ),
            )
            for row in rows
        ]

    def test_utterances(self) -> list[Utterance]:
        return read_manifest(self._folder(0, self.sizes.hours) / "test")

    def corpus_settings(self, is_test: bool) -> CorpusSettings:
        return CorpusSettings(noise=NoiseSettings((0.0, 20.0)), seed=int(is_test))

    @cached_property
    def tokens(self) -> TokenSet:
        rows = [*self.test_utterances(), *read_manifest(self._folder(0, self.sizes.hours) / "train")]
        rows += self.train_utterances("more")
        return TokenSet.of_phones([row.phones for row in rows], thirds=True)

    def score(self, recognizers: Sequence[Recognizer]) -> dict[str, float]:
        ensemble = Ensemble.of([one.logits for one in recognizers])
        viterbi, shift = PhoneViterbi(self.tokens), 1 / self.test.settings.features.frames_per_second
        right = total = 0
        loss, references, hypotheses = 0.0, [], []
        for row, utterance in enumerate(self.test.utterances):
            (probabilities,) = ensemble.probabilities([self.test.features(row)])
            labels = self.tokens.frame_labels(utterance.phones, len(probabilities), shift)
            log_probs = probabilities.clamp_min(1e-30).log()
            right += int((probabilities.argmax(-1) == labels).sum())
            loss -= float(log_probs.gather(1, labels[:, None]).double().sum())
            total += len(labels)
            references.append(reference_text(utterance, TokenSet("phones", self.tokens.symbols[1:])))
            hypotheses.append(" ".join(viterbi(log_probs)))
        errors = word_error_rate(references, hypotheses)
        return {
            "frame_accuracy": right / total,
            "frame_loss": loss / total,
            "phone_error_rate": errors.value,
        }


class Digits(Task):
    """Letters of spoken digits."""

    dataset: Path

    @cached_property
    def _split(self) -> Any:
        return split_speakers(read_digits(self.dataset))

    def train_utterances(self, condition: str) -> list[Utterance]:
        rows: list[Utterance] = self._split.train
        if self.sizes is QUICK:
            rows = rows[::20]
        if condition != "wrong":
            return rows
        chance, words = random.Random(0), sorted({row.text for row in rows})
        return [replace(row, text=chance.choice(words)) if chance.random() < WRONG else row for row in rows]

    def test_utterances(self) -> list[Utterance]:
        rows: list[Utterance] = self._split.test
        return rows[:: 10 if self.sizes is QUICK else 1]

    def corpus_settings(self, is_test: bool) -> CorpusSettings:
        if is_test:
            return CorpusSettings()
        return CorpusSettings(copies=3, speeds=(1.0, 0.9, 1.1), noise=NoiseSettings((5.0, 30.0)))

    @cached_property
    def tokens(self) -> TokenSet:
        return TokenSet("graphemes", tuple(sorted(set().union(*(row.text for row in self._split.train)))))

    def score(self, recognizers: Sequence[Recognizer]) -> dict[str, float]:
        found: Evaluation = evaluate(recognizers, self.test)
        assert found.word_error_rate is not None
        assert found.character_error_rate is not None
        return {
            "word_error_rate": found.word_error_rate.value,
            "character_error_rate": found.character_error_rate.value,
        }


def phones_task(work: Path, sizes: Sizes) -> Phones:
    """The first task. A quarter has about a quarter of a member's parameters."""
    return Phones(
        "phones",
        work,
        sizes,
        {
            "base": FrameModelSettings(width=128, num_layers=3),
            "quarter": FrameModelSettings(width=40, num_layers=2),
            "large": FrameModelSettings(width=192, num_layers=3),
        },
        (
            FrameModelSettings(width=128, num_layers=3),
            FrameModelSettings(width=160, num_layers=2, context=5),
            FrameModelSettings(width=96, num_layers=4, context=11),
            FrameModelSettings(width=192, num_layers=2, context=4),
        ),
        Recipe(epochs=sizes.frame_epochs, batch_seconds=20.0, spec_augment=False),
        ("topk=1", "topk=3", "topk=5", "topk=10", "topk=20", *RULES),
        "topk=10",
    )


def digits_task(work: Path, sizes: Sizes, dataset: Path) -> Digits:
    """The second task."""
    task = Digits(
        "digits",
        work,
        sizes,
        {
            "base": ConvCtcSettings(width=64, num_blocks=4),
            "quarter": ConvCtcSettings(width=28, num_blocks=3),
            "large": ConvCtcSettings(width=128, num_blocks=5),
        },
        (
            ConvCtcSettings(width=64, num_blocks=4),
            ConvCtcSettings(width=80, num_blocks=3, kernel=7),
            DfsmnCtcSettings(hidden=96, projection=48, num_layers=3),
            ConvCtcSettings(width=48, num_blocks=6, kernel=15),
        ),
        Recipe(epochs=sizes.ctc_epochs, batch_seconds=8.0, learning_rate=5e-3),
        ("topk=1", "topk=3", "topk=5", "topk=10", *RULES[1:4:2]),
        "topk=5",
    )
    task.dataset = dataset
    return task


# -- cells ---------------------------------------------------------------------------------------------------


def main_cells(task: Task, seed: int) -> Iterator[Cell]:
    """Section by section: ensembles, then students of a quarter, then of a member's size."""
    cell = Cell(task.name, seed)
    yield from ensemble_cells(task, seed, "plain")
    yield cell
    for share in (0.0, 0.25, 0.5, 0.75):
        yield replace(cell, keep=task.middle, hard_weight=share)
        if task.name == "phones" or share == 0.5:
            yield replace(cell, keep="full", hard_weight=share)
    for rule in task.rules:
        if rule != task.middle:
            yield replace(cell, keep=rule)
    for rule in ("full", task.middle):
        yield replace(cell, keep=rule, temperature=2.0)
    base = replace(cell, model="base")
    yield base
    yield replace(base, keep="full")
    for share in (0.0, 0.25, 0.5):
        yield replace(base, keep=task.middle, hard_weight=share)


def search_cells(task: Task, seed: int) -> Iterator[Cell]:
    """Conditions under which a student might beat its ensemble."""
    base = Cell(task.name, seed, model="base", hard_weight=0.25)
    rule = task.middle
    large = replace(base, model="large")
    yield replace(large, keep="")
    yield replace(large, keep=rule)
    if task.name == "phones":
        yield replace(base, longer=2)
        yield replace(base, keep=rule, longer=2)
        yield replace(large, keep=rule, longer=2)
    yield from ensemble_cells(task, seed, "wrong")
    yield replace(base, condition="wrong", keep=rule, hard_weight=0.0)
    if task.name == "phones":
        yield replace(large, condition="wrong", keep=rule, hard_weight=0.0)
    yield from ensemble_cells(task, seed, "mixed")
    yield replace(base, condition="mixed", keep=rule)
    if task.name == "phones":
        yield replace(large, condition="mixed", keep=rule)
        yield replace(base, condition="more", keep=rule, hard_weight=0.0)
        yield replace(large, condition="more", keep=rule, hard_weight=0.0)
        return
    yield from ensemble_cells(task, seed, "guided")
    yield Cell(task.name, seed, "one", "base", hard_weight=1.0, is_ensemble=True)
    for condition in ("guided", "one"):
        for model, share in (("quarter", 0.25), ("quarter", 0.5), ("base", 0.25), ("base", 0.5)):
            yield replace(base, condition=condition, model=model, keep=rule, hard_weight=share)


def ensemble_cells(task: Task, seed: int, condition: str) -> Iterator[Cell]:
    """Members, then all of them."""
    cell = Cell(task.name, seed, condition, "base", hard_weight=1.0)
    for member in range(MEMBERS):
        yield replace(cell, member=member)
    yield replace(cell, is_ensemble=True)


# -- measuring -----------------------------------------------------------------------------------------------


@dataclass
class Bench:
    """Measures cells and appends their rows."""

    work: Path
    tasks: dict[str, Task]
    known: set[str] = field(default_factory=set)

    def __post_init__(self) -> None:
        self.known = {row["key"] for row in read_rows(self.work)}

    def measure(self, cell: Cell) -> None:
        """Measure a cell, unless its row is there."""
        if cell.key in self.known:
            return
        started = time.process_time()
        task = self.tasks[cell.task]
        told: dict[str, Any] = {}
        if cell.is_ensemble:
            recognizers = self.members(task, cell)
        elif cell.member is not None:
            recognizers = [self.member(task, cell, cell.member)]
        else:
            recognizers = [self.student(task, cell, told)]
        row = {"key": cell.key, **asdict(cell), **task.score(recognizers), **told}
        row["parameters"] = sum(one.model.num_parameters for one in recognizers)
        corpus = task.corpus(cell.condition)
        row["classes"] = task.tokens.num_classes
        row["frames"] = sum(map(corpus.num_frames, range(len(corpus))))
        row["cpu_seconds"] = round(time.process_time() - started, 1)
        append_row(self.work, row)
        self.known.add(cell.key)

    def members(self, task: Task, cell: Cell) -> list[Recognizer]:
        """The ensemble of a cell; of the condition "more" the plain one."""
        return [self.member(task, cell, index) for index in range(1 if cell.condition == "one" else MEMBERS)]

    def member(self, task: Task, cell: Cell, index: int) -> Recognizer:
        """Trained on hard labels, and "guided" ones on the first's choices, too; or loaded."""
        is_guided = cell.condition == "guided" and index > 0
        condition = cell.condition if cell.condition in ("wrong", "mixed") or is_guided else "plain"
        settings = task.others[index] if condition == "mixed" else task.models["base"]
        folder = self.work / task.name / "members" / f"{condition}-{cell.seed}-{index}"
        if (folder / "recognizer.json").exists():
            return Recognizer.load(folder)
        recipe = replace(task.recipe, model=settings, seed=100 * cell.seed + index)
        corpus, targets = task.corpus(condition), None
        if is_guided:
            recipe = replace(recipe, hard_weight=GUIDED)
            targets = record_targets(
                [self.member(task, cell, 0)],
                corpus,
                self.work / task.name / "targets" / f"guide-{cell.seed}",
                TeachingSettings("topk=1"),
            )
        return train(recipe, corpus, task.tokens, out=folder, targets=targets).recognizer

    def student(self, task: Task, cell: Cell, told: dict[str, Any]) -> Recognizer:
        """Trained; what its targets take is told."""
        recipe = replace(
            task.recipe,
            model=task.models[cell.model],
            epochs=task.recipe.epochs * cell.longer,
            hard_weight=cell.hard_weight,
            seed=100 * cell.seed + 50,
        )
        corpus = task.corpus(cell.condition)
        if not cell.keep:
            return train(recipe, corpus, task.tokens).recognizer
        targets = self.targets(task, cell, corpus)
        stored = targets.statistics
        told["nbytes_per_frame"] = stored.nbytes_per_frame
        told["captured_mass"] = stored.captured_mass
        told["kept_classes"] = stored.kept_classes
        return train(recipe, corpus, task.tokens, targets=targets).recognizer

    def targets(self, task: Task, cell: Cell, corpus: FeatureCorpus) -> SparseTargets:
        """Those of all classes are recorded in 16 bits, those of a rule selected from them, in 8."""
        name = f"{cell.condition}-{cell.seed}-{cell.temperature:g}"
        folder = self.work / task.name / "targets"
        settings = TeachingSettings(f"topk={task.tokens.num_classes}", 16, cell.temperature)
        full = record_targets(self.members(task, cell), corpus, folder / f"{name}-full", settings)
        if cell.keep == "full":
            return full
        header = replace(full.header, rule=cell.keep, bits=8)
        with TargetsWriter(folder / f"{name}-{cell.keep}", header) as writer:
            while writer.num_frames < len(full):
                essence = full.read(writer.num_frames, min(len(full), writer.num_frames + 4096))
                dense = torch.zeros(len(essence), full.header.num_classes)
                writer.append(dense.scatter_(1, essence.classes, essence.probabilities))
            if not writer.is_complete:
                writer.finish()
        return SparseTargets(folder / f"{name}-{cell.keep}")


# -- command -------------------------------------------------------------------------------------------------


def main() -> None:
    """Measure what is missing, or write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="gets models, targets and rows.jsonl")
    parser.add_argument("--digits", type=Path, help="the dataset; by default fsdd in $MODICUM_DATA")
    parser.add_argument("--tasks", nargs="+", default=["phones", "digits"], choices=["phones", "digits"])
    parser.add_argument("--seeds", type=int, nargs="+", help="0, 1 and 2 by default")
    parser.add_argument("--conditions", nargs="+", choices=list(CONDITIONS), help="all by default")
    parser.add_argument("--quick", action="store_true", help="one seed, very small; for a trial")
    parser.add_argument("--docs", action="store_true", help="write the tables of what was measured")
    asked = parser.parse_args()
    if asked.docs:
        write_docs(asked.work, section, "benchmarks_essence.json", "distill.md", "essence")
        return
    torch.set_num_threads(1)
    warnings.simplefilter("once")
    sizes = QUICK if asked.quick else Sizes()
    asked.work = work_folder(asked.work, asked.quick)
    tasks: dict[str, Task] = {}
    if "phones" in asked.tasks:
        tasks["phones"] = phones_task(asked.work, sizes)
    dataset = asked.digits or Path(os.environ.get("MODICUM_DATA", "")) / "fsdd"
    if "digits" in asked.tasks and dataset.is_dir():
        tasks["digits"] = digits_task(asked.work, sizes, dataset)
    elif "digits" in asked.tasks:
        print(f"there are no digits in {dataset}: give --digits", file=sys.stderr)
    bench = Bench(asked.work, tasks)
    seeds = asked.seeds or sizes.seeds
    cells = [cell for seed in seeds for task in tasks.values() for cell in main_cells(task, seed)]
    cells += [cell for seed in seeds for task in tasks.values() for cell in search_cells(task, seed)]
    cells = [cell for cell in cells if asked.conditions is None or cell.condition in asked.conditions]
    for number, cell in enumerate(cells, 1):
        print(f"{number} of {len(cells)}: {cell.key}", file=sys.stderr, flush=True)
        bench.measure(cell)


if __name__ == "__main__":
    main()
