"""Detectors: a teacher, its pruned students, and what else the same compute or bytes buys. One thread,
resumable; about 75 minutes of one core for each seed.

    python benchmarks/detectors.py --data FOLDER --work FOLDER            # measures what rows.jsonl lacks
    python benchmarks/detectors.py --data FOLDER --work FOLDER --seeds 1  # one seed; several may run at once
    python benchmarks/detectors.py --data FOLDER --work FOLDER --quick    # very short, for a trial
    python benchmarks/detectors.py --data FOLDER --work FOLDER --docs     # the tables of docs/detect.md

The data is a folder in Pascal VOC's layout with the splits trainval and test, such as BCCD.
"""

from __future__ import annotations

import argparse
import math
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import machine
import report
import torch
from measured_rows import append_row, read_rows, work_folder, write_docs

from modicum.errors import InputError
from modicum.measure import Spread, TimingSettings, interleaved
from modicum.search.network import fingerprint
from modicum.vision.detect.cost import CostTable
from modicum.vision.detect.deletion import delete_branch_channels
from modicum.vision.detect.detector import Detector
from modicum.vision.detect.detector_file import file_bytes, load_detector, save_detector
from modicum.vision.detect.evaluation import Evaluation, evaluate, evaluate_with
from modicum.vision.detect.guidance import GuidanceSettings, Guide
from modicum.vision.detect.loaded_images import (
    TestImage,
    TrainingImage,
    images_digest,
    load_test_images,
    load_training_images,
)
from modicum.vision.detect.onnx_detector import OnnxDetector
from modicum.vision.detect.onnx_export import export_onnx
from modicum.vision.detect.pruning.budget import Budget
from modicum.vision.detect.pruning.channel_graph import channels_in
from modicum.vision.detect.pruning.prune import PruneSettings, prune
from modicum.vision.detect.quantization import quantized_bytes, quantized_detector
from modicum.vision.detect.read_dataset import read_dataset
from modicum.vision.detect.recipe import Recipe
from modicum.vision.detect.speed import runs_of
from modicum.vision.detect.ssd import SSD
from modicum.vision.detect.ssd_settings import SSDSettings
from modicum.vision.detect.training import DetectorTraining, new_network, training_checkpoint
from modicum.whole_file import write_whole

SHARE = 0.25
"""Of the teacher's multiply-accumulates, that a student has."""
BYTES_AIM, MAP_AIM = 0.2, 1.0
"""Aims: bytes of the student, as a share of the teacher's; points of mAP@.5 that it may lose."""

METRICS = {"map50": "mAP@.5", "map": "mAP@[.5:.95]"}

RATE, MOBILENET_RATE, PRUNED_RATE = 8e-3, 32e-3, 4e-3
"""Learning rates, chosen on a fifth of the images to learn from, held out (docs/detect.md)."""

TEACHER, ALL = "teacher", "all three"
NAMES = {
    TEACHER: "teacher, unpruned",
    "deletion": "fixed deletion alone",
    "pruning": "channel pruning alone",
    "guidance": "guidance alone: uniform width, guided from scratch",
    ALL: "all three, greedy by Taylor scores",
    "knapsack": "all three, knapsack by sensitivity",
    "bytes": "all three, to a fifth of the bytes",
    "int8": "all three, then int8",
    "scratch": "the network of all three, from scratch",
    "torch-pruning": "torch-pruning, one-shot, global magnitude",
    "uniform": "uniform width, from scratch",
    "mobilenet macs": "MobileNet-SSD of equal MACs",
    "mobilenet bytes": "MobileNet-SSD of equal bytes",
    "mobilenet time": "MobileNet-SSD of about equal time in onnxruntime",
}


RIVALS = (
    "guidance",
    "scratch",
    "uniform",
    "torch-pruning",
    "mobilenet macs",
    "mobilenet bytes",
    "mobilenet time",
)
"""Of about a student's compute, bytes or time."""
MOBILENET_WIDTH = 0.28
"""Of the MobileNet of about a student's time. A constant, so that it does not depend on one measurement."""


@dataclass(frozen=True)
class Sizes:
    """How long is trained."""

    epochs: int = 40
    step_epochs: int = 2
    final_epochs: int = 20
    steps: int = 4
    rounds: int = 51
    num_images: int | None = None

    @property
    def student_epochs(self) -> int:
        """Of a pruned network in all, those between cuts included."""
        return (self.steps - 1) * self.step_epochs + self.final_epochs

    @property
    def scratch_epochs(self) -> int:
        """As many as teacher and student have together."""
        return self.epochs + self.student_epochs


QUICK = Sizes(1, 1, 1, 2, 9, 24)


class Bench:
    """Trains and measures what is not in the rows yet."""

    def __init__(self, data: Path, work: Path, sizes: Sizes) -> None:
        self.work, self.sizes = work, sizes
        self.data = read_dataset(data, "trainval")
        self.test_data = read_dataset(data, "test", self.data.classes)
        self.teacher_settings = SSDSettings.of(self.data.classes)

    @cached_property
    def train(self) -> list[TrainingImage]:
        size = self.teacher_settings.height, self.teacher_settings.width
        return load_training_images(self.data, size)[: self.sizes.num_images]

    @cached_property
    def test(self) -> list[TestImage]:
        size = self.teacher_settings.height, self.teacher_settings.width
        return load_test_images(self.test_data, size)[: self.sizes.num_images]

    # -- variants --------------------------------------------------------------------------------------------

    def detector(self, name: str, seed: int) -> Detector:
        """Of a variant: from its file, or trained now."""
        path = self.work / f"{name.replace(' ', '-')}-{seed}.safetensors"
        if not path.exists():
            started = time.process_time()
            made = self._make(name, seed)
            about = {**made.about, "cpu_seconds": round(time.process_time() - started, 1)}
            if name == "int8":
                write_whole(path, quantized_bytes(Detector(made.network, about)))
            else:
                save_detector(Detector(made.network, about), path)
        return load_detector(path)

    def _make(self, name: str, seed: int) -> Detector:
        print(f"seed {seed}: {name}", file=sys.stderr, flush=True)
        if name == TEACHER:
            return self._trained(name, self.teacher_settings, self.sizes.epochs, seed, RATE)
        if name == "deletion":
            cut = delete_branch_channels(self.detector(TEACHER, seed).network, 0.5)
            return self._trained(name, cut, self.sizes.student_epochs, seed, PRUNED_RATE)
        if name in ("pruning", ALL, "knapsack", "bytes"):
            return self._pruned(name, seed)
        if name == "int8":
            inputs = [image.pixels for image in self._calibration()]
            batches = [torch.stack(inputs[k : k + 8]) for k in range(0, len(inputs), 8)]
            return quantized_detector(self.detector(ALL, seed), batches)
        if name == "torch-pruning":
            return self._trained(name, self._one_shot(seed), self.sizes.student_epochs, seed, PRUNED_RATE)
        if name == "scratch":
            settings = self.detector(ALL, seed).network.settings
        elif name == "mobilenet time":
            settings = SSDSettings.of(self.data.classes, "mobilenet", MOBILENET_WIDTH)
        elif name.startswith("mobilenet"):
            settings = self._like("mobilenet", seed, is_bytes=name.endswith("bytes"))
        else:
            settings = self._like("resnet26", seed, is_bytes=False)
        guided = self.detector(TEACHER, seed) if name == "guidance" else None
        rate = MOBILENET_RATE if name.startswith("mobilenet") else RATE
        return self._trained(name, settings, self.sizes.scratch_epochs, seed, rate, guided)

    def _trained(
        self,
        name: str,
        start: SSDSettings | SSD,
        epochs: int,
        seed: int,
        rate: float,
        teacher: Detector | None = None,
    ) -> Detector:
        """A record from scratch, or a network further."""
        recipe = Recipe(epochs=epochs, learning_rate=rate, seed=seed)
        network = new_network(start, seed) if isinstance(start, SSDSettings) else start
        guide = None
        if teacher is not None:
            guide = Guide.seeded(teacher.network, network, GuidanceSettings(), seed)
        path = self.work / f"{name.replace(' ', '-')}-{seed}.training"
        basis = [fingerprint(network), None if teacher is None else fingerprint(teacher.network)]
        checkpoint = training_checkpoint(path, recipe.to_dict(), images_digest(self.train), basis)
        DetectorTraining(network, self.train, recipe, guide, checkpoint).run()
        checkpoint.remove()
        return Detector(network, {"variant": name, "seed": seed})

    def _pruned(self, name: str, seed: int) -> Detector:
        sizes = self.sizes
        is_alone = name == "pruning"
        settings = PruneSettings(
            Budget("bytes", BYTES_AIM, True) if name == "bytes" else Budget("macs", SHARE, True),
            allocator="knapsack" if name == "knapsack" else "greedy",
            steps=sizes.steps,
            branch_factor=1.0 if is_alone else 0.5,
            step_recipe=Recipe(epochs=sizes.step_epochs, learning_rate=PRUNED_RATE, seed=seed + 100),
            recipe=Recipe(epochs=sizes.final_epochs, learning_rate=PRUNED_RATE, seed=seed),
            guidance=None if is_alone else GuidanceSettings(),
        )
        state = self.work / f"{name.replace(' ', '-')}-{seed}.state"
        return prune(self.detector(TEACHER, seed), self.train, settings, state=state).detector

    def _calibration(self) -> list[TestImage]:
        size = self.teacher_settings.height, self.teacher_settings.width
        some = replace(self.data, images=self.data.images[::9][:32])
        return load_test_images(some, size)

    def _like(self, backbone: str, seed: int, is_bytes: bool) -> SSDSettings:
        """The uniform network whose bytes or multiply-accumulates are nearest to the student's."""
        student = self.detector(ALL, seed).network

        def cost(settings: SSDSettings) -> int:
            return len(file_bytes(SSD(settings), {})) if is_bytes else macs(settings)

        target = cost(student.settings)
        tried = [SSDSettings.of(self.data.classes, backbone, step / 128) for step in range(4, 97)]
        distinct = {tuple(one.channels.values()): one for one in tried}.values()
        return min(distinct, key=lambda one: abs(math.log(cost(one) / target)))

    def _one_shot(self, seed: int) -> SSD:
        """torch-pruning's own pruner, with the least ratio that gives the student's multiply-accumulates."""
        import torch_pruning as tp

        limit = macs(self.detector(ALL, seed).network.settings)
        low, high, best = 0.0, 1.0, None
        for _ in range(8):
            ratio = (low + high) / 2
            network = self.detector(TEACHER, seed).network
            pruner = tp.pruner.BasePruner(
                network,
                torch.zeros(1, 3, network.settings.height, network.settings.width),
                importance=tp.importance.GroupMagnitudeImportance(p=2),
                global_pruning=True,
                pruning_ratio=ratio,
                max_pruning_ratio=0.9,
                round_to=8,
                ignored_layers=[conv for head in network.heads for conv in (head.classes, head.boxes)],
                forward_fn=lambda model, images: model.raw_outputs(images),
            )
            pruner.step()
            network.settings = network.settings.with_channels(channels_in(network))
            if macs(network.settings) <= limit:
                best, high = network, ratio
            else:
                low = ratio
        assert best is not None, "torch-pruning reaches no such network"
        return best

    # -- rows ------------------------------------------------------------------------------------------------

    def measure(self, name: str, seed: int) -> None:
        """Accuracy and size of a variant, by torch and, of int8, by onnxruntime."""
        key = {"kind": "accuracy", "variant": name, "seed": seed}
        if any(key.items() <= row.items() for row in read_rows(self.work)):
            return
        detector = self.detector(name, seed)
        found = evaluate(detector, self.test)
        settings = detector.network.settings
        row = (
            key
            | _scores(found)
            | {
                "parameters": CostTable.of(settings).num_parameters(settings.channels),
                "macs": macs(settings),
                "nbytes": (self.work / f"{name.replace(' ', '-')}-{seed}.safetensors").stat().st_size,
                "channels": dict(settings.channels),
                "cpu_seconds": detector.about.get("cpu_seconds"),
                "images": [_image_scores(found, number) for number in range(len(self.test))],
            }
        )
        runtime = self._runtime(name, seed, detector)
        other = evaluate_with(runtime.detect_inputs, detector.classes, self.test)
        append_row(self.work, row | {f"onnx_{k}": v for k, v in _scores(other).items()})

    def _runtime(self, name: str, seed: int, detector: Detector) -> OnnxDetector:
        path = self.work / f"{name.replace(' ', '-')}-{seed}.onnx"
        if not path.exists():
            export_onnx(detector, path)
        return OnnxDetector.load(path)

    def time(self, names: Sequence[str], seed: int) -> None:
        """Latency of all variants in turn, of one image, on one thread."""
        key = {"kind": "times", "seed": seed, "variants": list(names)}
        if any(key.items() <= row.items() for row in read_rows(self.work)):
            return
        image = self.test[0].pixels
        runs: dict[str, Callable[[], object]] = {}
        for name in names:
            detector = self.detector(name, seed)
            runtime = self._runtime(name, seed, detector)
            if name != "int8":  # torch computes int8 in float32, slower than float
                runs[f"torch {name}"] = runs_of(detector, image)["detect"]
            runs[f"onnx {name}"] = lambda runtime=runtime: runtime.detect_inputs(image[None])  # type: ignore[misc]
        samples = interleaved(runs, TimingSettings(self.sizes.rounds, 1e-9), time.thread_time)
        medians = {name: vars(Spread.of(values)) for name, values in samples.items()}
        append_row(self.work, key | {"seconds": medians})


def macs(settings: SSDSettings) -> int:
    """Multiply-accumulates of one image."""
    return CostTable.of(settings).macs(settings.channels)


def _scores(found: Evaluation) -> dict[str, Any]:
    return {"map50": found.map50, "map": found.map, "voc11": found.voc11, "ap50": list(found.by_class)}


def _image_scores(found: Evaluation, number: int) -> list[int]:
    """Missed and wrong at a score of 0.5, of one image."""
    from modicum.vision.detect.evaluation_page import mistakes

    return list(mistakes(found, number))


# -- tables --------------------------------------------------------------------------------------------------


def section(raw: dict[str, Any]) -> str:
    """All tables, markers left out."""
    rows = [row for row in raw["rows"] if row["kind"] == "accuracy"]
    times = [row for row in raw["rows"] if row["kind"] == "times"]
    seeds = sorted({row["seed"] for row in rows})
    m = raw["machine"]
    by = {(row["variant"], row["seed"]): row for row in rows}
    names = [name for name in NAMES if any((name, seed) in by for seed in seeds)]
    lines = []
    for name in names:
        mine = [by[name, seed] for seed in seeds if (name, seed) in by]
        lines.append(
            [
                NAMES[name],
                _points([row["map50"] for row in mine]),
                _points([row["map"] for row in mine]),
                f"{statistics.mean(row['parameters'] for row in mine) / 1e3:,.0f} K",
                f"{statistics.mean(row['macs'] for row in mine) / 1e6:.1f} M",
                f"{statistics.mean(row['nbytes'] for row in mine) / 1e3:,.0f} KB",
                _milliseconds(times, f"torch {name}"),
                _milliseconds(times, f"onnx {name}"),
            ]
        )
    head = ["", "mAP@.5, %", "mAP@[.5:.95], %", "parameters", "MACs", "file", "torch, ms", "onnxruntime, ms"]
    text = (
        f"Measured {raw['date']} on one thread ({m['processor']}, torch {m['torch']}); seeds "
        f"{', '.join(map(str, seeds))}. Accuracy is the mean over seeds and, in brackets, each seed; times "
        "are the thread's processor time from a letterboxed image to boxes, medians, all variants in turn."
    )
    return "\n\n".join([text, report.table(head, lines), _verdicts(by, seeds, times)])


def _points(values: Sequence[float]) -> str:
    each = ", ".join(f"{100 * value:.1f}" for value in values)
    return f"{100 * statistics.mean(values):.1f} ({each})"


def _milliseconds(times: Sequence[dict[str, Any]], name: str) -> str:
    found = [row["seconds"][name]["median"] for row in times if name in row["seconds"]]
    return f"{1e3 * statistics.median(found):.2f}" if found else "–"


def _verdicts(
    by: dict[tuple[str, int], dict[str, Any]], seeds: Sequence[int], times: Sequence[dict[str, Any]]
) -> str:
    def mean(name: str, what: str) -> float:
        return statistics.mean(by[name, seed][what] for seed in seeds if (name, seed) in by)

    have = {name for name, _ in by}
    if not {TEACHER, ALL} <= have:
        return "No verdict: teacher or student is missing."
    students = [name for name in (ALL, "knapsack", "bytes") if name in have]
    lines = []
    for name in students:
        lost = 100 * (mean(TEACHER, "map50") - mean(name, "map50"))
        share, size = (mean(name, what) / mean(TEACHER, what) for what in ("macs", "nbytes"))
        is_met = share <= SHARE and size <= BYTES_AIM and lost <= MAP_AIM
        lines.append(
            f"- A quarter of the teacher's MACs and a fifth of its bytes within {MAP_AIM:g} point of mAP@.5, "
            f"{NAMES[name]}: **{'yes' if is_met else 'no'}** ({share:.1%} of the MACs, {size:.1%} of the "
            f"bytes, {lost:+.1f} points lost)."
        )
    table = []
    for rival in RIVALS:
        if rival in have:
            gaps = [_gap(by, student, rival, seeds, what) for student in students[:2] for what in METRICS]
            table.append([NAMES[rival], *gaps, _milliseconds(times, f"onnx {rival}")])
    ours = ", ".join(f"{_milliseconds(times, f'onnx {name}')} ms" for name in students[:2])
    lead = (
        "Points that they are ahead of an alternative, mean and, in brackets, range over seeds; "
        f"times in onnxruntime (theirs: {ours})."
    )
    each = [f"{NAMES[name]}: {told}" for name in students[:2] for told in METRICS.values()]
    head = ["beside", *each, "onnxruntime, ms"]
    return "\n\n".join(["\n".join(lines), lead, report.table(head, table)])


def _gap(
    by: dict[tuple[str, int], dict[str, Any]], student: str, rival: str, seeds: Sequence[int], what: str
) -> str:
    """Points that a student is ahead, and whether it is so for every seed."""
    both = [seed for seed in seeds if (student, seed) in by and (rival, seed) in by]
    gaps = [100 * (by[student, seed][what] - by[rival, seed][what]) for seed in both]
    if not gaps:
        return "–"
    low, high = min(gaps), max(gaps)
    verdict = "ahead" if low > 0 else "behind" if high < 0 else "undecided"
    return f"**{verdict}**, {statistics.mean(gaps):+.1f} ({low:+.1f} to {high:+.1f})"


def main() -> None:
    """Measure what is missing, or write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="a folder in VOC's layout")
    parser.add_argument("--work", type=Path, required=True, help="gets models and rows.jsonl")
    parser.add_argument("--seeds", default="0,1,2", help="with commas between")
    parser.add_argument("--quick", action="store_true", help="one seed, very short; for a trial")
    parser.add_argument("--docs", action="store_true", help="write the tables of what was measured")
    asked = parser.parse_args()
    if asked.docs:
        write_docs(asked.work, section, "benchmarks_detectors.json", "detect.md", "detectors")
        return
    torch.set_num_threads(1)
    asked.work = work_folder(asked.work, asked.quick)
    seeds = [0] if asked.quick else [int(seed) for seed in asked.seeds.split(",")]
    try:
        bench = Bench(asked.data, asked.work, QUICK if asked.quick else Sizes())
    except InputError as error:
        raise SystemExit(str(error)) from error
    for seed in seeds:
        for name in NAMES:
            bench.measure(name, seed)
        bench.time(list(NAMES), seed)
    raw = {"date": time.strftime("%Y-%m-%d"), "machine": machine.describe()}
    print(section(raw | {"rows": read_rows(asked.work)}))


if __name__ == "__main__":
    main()
