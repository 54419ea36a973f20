"""Compact speech: error rates against bytes of shared layers, zeros and few bits, beside narrower models of
as many bytes and of as many products. One core, some three hours, resumable.

    python benchmarks/compact_speech.py --work FOLDER [--digits FSDD]  # measures what is missing
    python benchmarks/compact_speech.py --work FOLDER --quick          # one small seed, minutes
    python benchmarks/compact_speech.py --work FOLDER --docs           # docs/compact_speech.md

Two tasks, both letters by CTC. "sentences": digits and commands by a synthesiser, in noise of 10 to 40 dB,
eight voices held out. "digits": spoken digits of the Free Spoken Digit Dataset, two speakers held out.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
import warnings
import zlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import fresh
import machine
import torch
from compact_speech_tables import section
from measured_rows import append_row, read_rows, work_folder, write_docs

from modicum.distill import SparseTargets
from modicum.speech import (
    CorpusSettings,
    FeatureCorpus,
    NoiseSettings,
    Recipe,
    Recognizer,
    SynthesisSettings,
    TokenSet,
    build_corpus,
    evaluate,
    load_audio,
    read_digits,
    read_manifest,
    record_targets,
    split_speakers,
    synthesize,
    train,
)
from modicum.speech.compact import (
    PruningSettings,
    RefiningRecipe,
    SanmSettings,
    compress_recognizer,
    file_nbytes,
    load_packed,
    planned_sections,
    save_packed,
)
from modicum.speech.compact.pruning import parameter_uses

HEADER = 1100
"""Bytes that a file's header takes, about; for the search of a width only."""


@dataclass(frozen=True)
class Sizes:
    """How much is trained."""

    hours: float = 0.4
    test_hours: float = 0.08
    epochs: int = 16
    digit_epochs: int = 8
    """Of the recorded digits, each of which is there at two speeds."""
    refine_epochs: int = 3
    seeds: tuple[int, ...] = (0, 1, 2)


QUICK = Sizes(hours=0.02, test_hours=0.01, epochs=1, digit_epochs=1, refine_epochs=1, seeds=(0,))

BASE = SanmSettings(width=64, num_layers=4, num_heads=4, hidden=192)


@dataclass(frozen=True)
class Cell:
    """One compact model. Its name is its row in the table.

    Attributes:
        model: what it begins from.
        sparsity, bits: of its weights.
        is_taught: by the unshared model, in both trainings.
    """

    name: str
    model: SanmSettings
    sparsity: float = 0.0
    bits: int = 8
    is_taught: bool = False


def cells(stride: int) -> list[Cell]:
    """All models of a task."""
    base = replace(BASE, subsampling=stride)
    cycle = replace(base, sharing="cycle", num_sets=2)
    adapters = replace(cycle, adapter=8)
    found = [
        Cell("unshared", base),
        Cell("all", replace(base, sharing="all")),
        Cell("sequence", replace(cycle, sharing="sequence")),
        Cell("cycle", cycle),
        Cell("cycle-reversed", replace(cycle, sharing="cycle-reversed")),
        Cell("cycle, adapters", adapters),
        Cell("cycle, low rank", replace(cycle, rank=2)),
        Cell("half zeros", base, sparsity=0.5),
        Cell("three quarters zeros", base, sparsity=0.75),
        Cell("4 bits", base, bits=4),
        Cell("together", adapters, sparsity=0.5, is_taught=True),
    ]
    small, together = found[1:], found[-1]
    found += [Cell(f"narrow, bytes of {cell.name}", narrow(base, planned(cell))) for cell in small]
    # Sharing leaves the products as they are: its model of equal products is the unshared one.
    found += [
        Cell(f"narrow, products of {cell.name}", narrow_by_products(base, 1 - cell.sparsity))
        for cell in small
        if cell.sparsity
    ]
    return [*found, Cell("narrow, taught", narrow(base, planned(together)), is_taught=True)]


def planned(cell: Cell) -> int:
    """Bytes of a cell's file, about."""
    model = cell.model.build(40, 29)
    return file_nbytes(planned_sections(model, cell.bits, cell.sparsity, 1), {}) + HEADER


def narrow(base: SanmSettings, nbytes: int) -> SanmSettings:
    """The widest unshared model in 8 bits of no more bytes."""
    widths = [replace(base, width=width, hidden=3 * width) for width in range(8, base.width + 1, 4)]
    return max((one for one in widths if planned(Cell("", one)) <= nbytes), key=lambda one: one.width)


def narrow_by_products(base: SanmSettings, share: float) -> SanmSettings:
    """The widest unshared model of no more products than a share of the base's."""
    most = share * products(base.build(40, 29))
    widths = [replace(base, width=width, hidden=3 * width) for width in range(8, base.width + 1, 4)]
    return max((one for one in widths if products(one.build(40, 29)) <= most), key=lambda one: one.width)


def products(model: torch.nn.Module) -> int:
    """Of weights other than 0 with numbers, for each output frame; attention's own are left out."""
    uses = parameter_uses(model)
    return sum(uses[name] * int((x != 0).sum()) for name, x in model.named_parameters() if x.dim() >= 2)


@dataclass
class Task:
    """Data and recipe."""

    name: str
    train: FeatureCorpus
    test: FeatureCorpus
    tokens: TokenSet
    recipe: Recipe
    refine_epochs: int
    stride: int


def sentences_task(work: Path, sizes: Sizes) -> Task:
    """Synthetic sentences, voices held out."""
    settings = SynthesisSettings(
        sizes.hours, sizes.test_hours, domains=("digits", "commands"), noise_snr=(10.0, 40.0)
    )
    found = synthesize(work / "speech", settings)
    rows = {name: read_manifest(found[name].manifest) for name in ("train", "test")}
    corpora = [build_corpus(rows[name], work / f"{name}_features") for name in ("train", "test")]
    tokens = TokenSet.of_texts(row.text for row in rows["train"])
    recipe = Recipe(epochs=sizes.epochs, batch_seconds=20, learning_rate=4e-3)
    return Task("sentences", corpora[0], corpora[1], tokens, recipe, sizes.refine_epochs, 4)


def digits_task(work: Path, sizes: Sizes, folder: Path) -> Task:
    """Recorded digits, speakers held out."""
    split = split_speakers(read_digits(folder), 2)
    learned = split.train if sizes.digit_epochs > 1 else split.train[::20]
    settings = CorpusSettings(copies=2, speeds=(1.0, 0.9), noise=NoiseSettings((5.0, 40.0)))
    learned_features = build_corpus(learned, work / "digits_train", settings)
    test = build_corpus(split.test if sizes.digit_epochs > 1 else split.test[::20], work / "digits_test")
    tokens = TokenSet.of_texts(row.text for row in learned)
    recipe = Recipe(epochs=sizes.digit_epochs, batch_seconds=15, learning_rate=4e-3)
    return Task("digits", learned_features, test, tokens, recipe, sizes.refine_epochs, 2)


@dataclass
class Bench:
    """Measures cells; trainings that several cells begin from are done once."""

    work: Path

    def measure(self, task: Task, cell: Cell, seed: int) -> None:
        """Append the row of a cell, unless it is there."""
        key = json.dumps([task.name, seed, asdict(replace(cell, name=""))], sort_keys=True)
        alike = [row for row in read_rows(self.work) if row["key"] == key]
        if any(row["name"] == cell.name for row in alike):
            return
        if alike:  # a rival of the same width
            append_row(self.work, alike[0] | {"name": cell.name, "cpu_seconds": 0.0})
            return
        started = time.process_time()
        begun = self.begun(task, cell, seed)
        training = replace(task.recipe, epochs=task.refine_epochs, learning_rate=1e-3, seed=seed)
        pruning = PruningSettings(cell.sparsity, every=5)
        recipe = RefiningRecipe(training, pruning, cell.bits, quantize_from=0.5)
        targets = self.targets(task, cell, seed)
        compact = compress_recognizer(begun, task.train, recipe, targets=targets)
        path = self.work / "packed" / f"{task.name}-{seed}-{cell.name.replace(' ', '_').replace(',', '')}"
        nbytes = save_packed(compact, path)
        model = compact.recognizer.model
        row: dict[str, Any] = {
            "key": key, "task": task.name, "seed": seed, "name": cell.name, "width": cell.model.width,
            "nbytes": nbytes, "float_nbytes": 4 * sum(x.numel() for x in model.state_dict().values()),
            "parameters": model.num_parameters,
            "products_per_second": round(products(model) * compact.recognizer.frame_rate),
            "float": rates(begun, task), "packed": rates(compact.recognizer, task),
        }  # fmt: skip
        row["cpu_seconds"] = round(time.process_time() - started, 1)
        if seed == 0:
            audio = [str(row.audio) for row in task.test.utterances[:20]]
            row |= fresh.answer(Path(__file__).name, ["--work=.", f"--run={path}", *audio])
        append_row(self.work, row)

    def begun(self, task: Task, cell: Cell, seed: int) -> Recognizer:
        """Trained in floating point, or loaded."""
        name = json.dumps([asdict(cell.model), cell.is_taught], sort_keys=True)
        folder = self.work / "begun" / f"{task.name}-{seed}-{zlib.crc32(name.encode()):x}"
        if (folder / "recognizer.json").exists():
            return Recognizer.load(folder)
        recipe = replace(task.recipe, model=cell.model, seed=seed)
        targets = self.targets(task, cell, seed)
        return train(recipe, task.train, task.tokens, out=folder, targets=targets).recognizer

    def targets(self, task: Task, cell: Cell, seed: int) -> SparseTargets | None:
        """Of the unshared model."""
        if not cell.is_taught:
            return None
        teacher = self.begun(task, Cell("unshared", replace(BASE, subsampling=task.stride)), seed)
        return record_targets([teacher], task.train, self.work / "targets" / f"{task.name}-{seed}")


def rates(recognizer: Recognizer, task: Task) -> dict[str, float]:
    """Of characters and words, on the test."""
    found = evaluate([recognizer], task.test)
    assert found.character_error_rate is not None
    assert found.word_error_rate is not None
    return {"cer": found.character_error_rate.value, "wer": found.word_error_rate.value}


def run_packed(path: Path, audio: Sequence[str]) -> None:
    """Print peak memory and the real-time factor of a packed model in this process, on one thread: its
    processor time, as other programs may be running.
    """
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    before = machine.peak_memory()
    recognizer = load_packed(path).recognizer
    samples = [load_audio(one) for one in audio]
    recognizer.transcribe(samples[0])
    seconds = []
    for _ in range(3):
        started = time.thread_time()
        for one in samples:
            recognizer.transcribe(one)
        seconds.append(time.thread_time() - started)
    spoken = sum(map(len, samples)) / recognizer.features.sample_rate
    told = {
        "peak_nbytes": machine.peak_memory(),
        "before_nbytes": before,
        "real_time_factor": statistics.median(seconds) / spoken,
    }
    print(json.dumps(told))


def main() -> None:
    """Measure what is missing, or write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="gets models and rows.jsonl")
    parser.add_argument("--digits", type=Path, help="the dataset; by default fsdd in $MODICUM_DATA")
    parser.add_argument("--tasks", nargs="+", choices=("sentences", "digits"), help="both by default")
    parser.add_argument("--seeds", type=int, nargs="+", help="0, 1 and 2 by default")
    parser.add_argument("--quick", action="store_true", help="one seed, very small; for a trial")
    parser.add_argument("--docs", action="store_true", help="write the tables of what was measured")
    parser.add_argument("--show", action="store_true", help="print the tables of what was measured")
    parser.add_argument("--run", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("audio", nargs="*", help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.run is not None:
        run_packed(asked.run, asked.audio)
        return
    if asked.docs:
        write_docs(
            asked.work, section, "benchmarks_compact_speech.json", "compact_speech.md", "compact-speech"
        )
        return
    if asked.show:
        print(section({"date": "", "machine": machine.describe(), "rows": read_rows(asked.work)}))
        return
    torch.set_num_threads(1)
    warnings.simplefilter("once")
    sizes = QUICK if asked.quick else Sizes()
    asked.work = work_folder(asked.work, asked.quick)
    wanted = asked.tasks or ["sentences", "digits"]
    tasks = [sentences_task(asked.work, sizes)] if "sentences" in wanted else []
    dataset = asked.digits or Path(os.environ.get("MODICUM_DATA", "")) / "fsdd"
    if "digits" in wanted and dataset.is_dir():
        tasks.append(digits_task(asked.work, sizes, dataset))
    elif "digits" in wanted:
        print(f"there are no digits in {dataset}: give --digits", file=sys.stderr)
    bench = Bench(asked.work)
    plan = [
        (task, cell, seed)
        for seed in asked.seeds or sizes.seeds
        for task in tasks
        for cell in cells(task.stride)
    ]
    for number, (task, cell, seed) in enumerate(plan, 1):
        print(f"{number} of {len(plan)}: {task.name}, seed {seed}, {cell.name}", file=sys.stderr, flush=True)
        bench.measure(task, cell, seed)


if __name__ == "__main__":
    main()
