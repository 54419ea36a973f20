"""int8 recognizers: error rates before and after RSQ training, and time end to end, beside fp32. One thread,
under an hour, resumable.

    python benchmarks/winograd_speech.py --work FOLDER          # measures what rows.jsonl does not have
    python benchmarks/winograd_speech.py --work FOLDER --quick  # one small seed, minutes; for a trial
    python benchmarks/winograd_speech.py --work FOLDER --docs   # docs/benchmarks_winograd_speech.json, tables

Strings of digits in synthetic speech, eight voices held out. Error rates are of models whose convolutions of
3 taps are all computed by the scheme; the latency oracle decides in the tables of times only.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import datetime
from functools import cached_property
from pathlib import Path
from typing import Any

import jiwer
import machine
import numpy as np
import report
import torch
from measured_rows import append_row, read_rows, work_folder, write_docs
from torch import Tensor

from modicum.errors import InputError
from modicum.measure import LatencyOracle, Spread, TimingSettings, interleaved
from modicum.quant import conv1d_oracle, native_kernels
from modicum.speech import (
    FeatureCorpus,
    FeatureSettings,
    QuantizationSettings,
    Recipe,
    Recognizer,
    SynthesisSettings,
    TokenSet,
    build_corpus,
    evaluate,
    load_audio,
    model_settings,
    quantize,
    read_manifest,
    synthesize,
    train,
)
from modicum.speech.examples import Examples, FrameRate
from modicum.speech.quantization import float_model
from modicum.speech.rsq_training import RSQTraining
from modicum.speech.tokens import normalize_text
from modicum.speech.training import TrainingLoop

MODELS = ("wav2letter", "convdfsmn")
SCHEMES = ("direct", "limited", "rsq")
FLOAT, ALIKE = "fp32", "fp32 alike"
"""Of fp32 alike the training is that of int8 in all but the rounding."""
AIM = 0.1
"""Points of word error rate that int8 may cost after training."""


@dataclass(frozen=True)
class Sizes:
    """How much is trained and tested."""

    hours: float = 0.3
    test_hours: float = 0.5
    size: str = "small"
    epochs: int = 15
    rsq_epochs: int = 2
    batch_seconds: float = 15.0
    seeds: tuple[int, ...] = (0, 1, 2)
    rounds: int = 31
    seconds: tuple[float, ...] = (3.0, 10.0)
    """Of the recordings that are timed."""


QUICK = Sizes(0.03, 0.02, "tiny", 2, 1, seeds=(0,), rounds=3)


# -- error rates ---------------------------------------------------------------------------------------------


class Bench:
    """Data, models and rows in a folder.

    Args:
        work: the folder.
        sizes: how much.
    """

    def __init__(self, work: Path, sizes: Sizes) -> None:
        self.work, self.sizes = work, sizes
        settings = SynthesisSettings(hours=sizes.hours, test_hours=sizes.test_hours, domains=("digits",))
        reports = synthesize(work / "speech", settings)
        self.manifests = {name: one.manifest for name, one in reports.items()}
        self.rows = read_rows(work)

    def corpus(self, split: str) -> FeatureCorpus:
        """The features of train or test."""
        return build_corpus(read_manifest(self.manifests[split]), self.work / "features" / split)

    @cached_property
    def train(self) -> FeatureCorpus:
        """Training features."""
        return self.corpus("train")

    @cached_property
    def test(self) -> FeatureCorpus:
        """Features of held-out voices."""
        return self.corpus("test")

    @cached_property
    def tokens(self) -> TokenSet:
        """Letters of the training texts."""
        return TokenSet.of_texts(utterance.text for utterance in self.train.utterances)

    def has(self, **key: Any) -> bool:
        """Whether there is such a row."""
        return any(key.items() <= row.items() for row in self.rows)

    def add(self, row: dict[str, Any]) -> None:
        """Write a row."""
        append_row(self.work, row)
        self.rows.append(row)
        print({k: v for k, v in row.items() if not isinstance(v, list)}, file=sys.stderr, flush=True)

    def float_recognizer(self, model: str, seed: int) -> Recognizer:
        """Trained, or loaded."""
        folder = self.work / "models" / f"{model}-{seed}"
        if (folder / "recognizer.json").exists():
            return Recognizer.load(folder)
        settings = model_settings(model, self.sizes.size)
        recipe = Recipe(settings, self.sizes.epochs, self.sizes.batch_seconds, seed=seed)
        return train(recipe, self.train, self.tokens, out=folder).recognizer

    def measure(self, model: str, seed: int) -> None:
        """All variants of a model and a seed that have no row."""
        key = {"kind": "errors", "model": model, "seed": seed}
        variants = [(scheme, epochs) for scheme in SCHEMES for epochs in (0, self.sizes.rsq_epochs)]
        wanted = [(s, e) for s, e in variants if not self.has(**key, scheme=s, epochs=e)]
        has_float = self.has(**key, scheme=FLOAT, epochs=0)
        controls = [c for c in (FLOAT, ALIKE) if not self.has(**key, scheme=c, epochs=self.sizes.rsq_epochs)]
        if not wanted and has_float and not controls:
            return
        started = time.process_time()
        exact = self.float_recognizer(model, seed)
        if not has_float:
            self.add(key | {"scheme": FLOAT, "epochs": 0} | self.score(exact, exact, started))
        for scheme in controls:
            started = time.process_time()
            longer = self.trained_on(exact, seed, is_distilled=scheme == ALIKE)
            told = {"scheme": scheme, "epochs": self.sizes.rsq_epochs}
            self.add(key | told | self.score(longer, exact, started))
        for scheme, epochs in wanted:
            started = time.process_time()
            settings = QuantizationSettings(
                scheme, epochs, batch_seconds=self.sizes.batch_seconds, use_oracle=False, seed=seed
            )
            out = self.work / "models" / f"{model}-{seed}-{scheme}-{epochs}"
            if (out / "recognizer.json").exists():
                found = Recognizer.load(out)
            else:
                found = quantize(exact, self.train, settings, out=out).recognizer
            self.add(key | {"scheme": scheme, "epochs": epochs} | self.score(found, exact, started))

    def trained_on(self, exact: Recognizer, seed: int, is_distilled: bool) -> Recognizer:
        """The float model, trained as long as the int8 ones: on the labels only, or with the same loss.

        It tells what more training brings without quantisation.
        """
        settings = QuantizationSettings(
            "direct", self.sizes.rsq_epochs, batch_seconds=self.sizes.batch_seconds, seed=seed
        )
        model = float_model(exact)
        recipe = settings.recipe(model.settings)
        examples = Examples(self.train, self.tokens, FrameRate(model.criterion, model.subsampling))
        loop = TrainingLoop(model, examples, recipe, None, None)
        if is_distilled:
            loop = RSQTraining(model, examples, recipe, None, None, teacher=float_model(exact))
        loop.run(lambda *_: None)
        return replace(exact, model=model.eval())

    def score(self, recognizer: Recognizer, exact: Recognizer, started: float) -> dict[str, Any]:
        """Error rates, errors of each utterance, and how far the logits are from the float model's."""
        found = evaluate([recognizer], self.test)
        assert found.word_error_rate is not None
        assert found.character_error_rate is not None
        errors = []
        for utterance, hypothesis in zip(self.test.utterances, found.hypotheses, strict=True):
            told = jiwer.process_words(normalize_text(utterance.text), hypothesis)
            errors.append(told.substitutions + told.deletions + told.insertions)
        assert sum(errors) == found.word_error_rate.count
        divergence, frames = 0.0, 0
        for row in range(0, len(self.test), 8):
            features = self.test.features(row)
            p, q = (one.logits(features).double().log_softmax(-1) for one in (exact, recognizer))
            divergence += float((p.exp() * (p - q)).sum())
            frames += len(p)
        return {
            "wer": found.word_error_rate.value,
            "cer": found.character_error_rate.value,
            "words": found.word_error_rate.total,
            "errors": errors,
            "divergence": divergence / frames,
            "parameters": recognizer.model.num_parameters,
            "cpu_seconds": round(time.process_time() - started, 1),
        }

    # -- times -----------------------------------------------------------------------------------------------

    def time(self, model: str, size: str) -> None:
        """Times of a model with random weights, which take as long as trained ones."""
        for seconds in self.sizes.seconds:
            key = {"kind": "times", "model": model, "size": size, "seconds": seconds}
            if not self.has(**key):
                self.add(key | self.times(model, size, seconds))

    def times(self, model: str, size: str, seconds: float) -> dict[str, Any]:
        """Medians, and ratios round by round, of fp32 and int8."""
        torch.manual_seed(0)
        network = model_settings(model, size).build(FeatureSettings().num_mels, self.tokens.num_classes)
        exact = Recognizer(network.eval(), self.tokens, FeatureSettings())
        samples = recording(self.test, seconds)
        timing = TimingSettings(self.sizes.rounds, 0.02)
        recognizers = {FLOAT: replace(exact, model=float_model(exact))}
        with tempfile.TemporaryDirectory(prefix="modicum-latency-") as folder:
            # Measured now, whatever the user's folder holds.
            oracle = LatencyOracle(conv1d_oracle().operation, Path(folder), TimingSettings())
            for name, scheme, use_oracle in (
                ("direct", "direct", False),
                ("limited", "limited", False),
                ("rsq", "rsq", False),
                ("rsq, oracle", "rsq", True),
            ):
                settings = QuantizationSettings(scheme, 0, use_oracle=use_oracle, num_calibration=8)
                found = quantize(exact, self.train, settings, oracle=oracle)
                recognizers[name] = found.recognizer
        features = features_of(samples)
        runs: dict[str, Callable[[], object]] = {}
        for name, one in recognizers.items():
            runs[f"model {name}"] = lambda one=one: one.logits(features)  # type: ignore[misc]
            runs[f"all {name}"] = lambda one=one: one.transcribe(samples)  # type: ignore[misc]
        measured = interleaved(runs, timing, time.thread_time)
        ratios = {}
        for part in ("model", "all"):
            for slow, fast in (
                (FLOAT, "rsq, oracle"),
                ("direct", "rsq, oracle"),
                ("direct", "rsq"),
                (FLOAT, "direct"),
            ):
                pairs = zip(measured[f"{part} {slow}"], measured[f"{part} {fast}"], strict=True)
                ratios[f"{part}: {fast} to {slow}"] = asdict(Spread.of([a / b for a, b in pairs]))
        layers = recognizers["rsq, oracle"].model
        return {
            "frames": len(features),
            "parameters": exact.model.num_parameters,
            "winograd_layers": sum(
                getattr(m, "scheme", None) is not None and m.scheme.name == "rsq" for m in layers.modules()
            ),
            "medians": {name: statistics.median(values) for name, values in measured.items()},
            "ratios": ratios,
        }


def recording(corpus: FeatureCorpus, seconds: float) -> Tensor:
    """Samples of so many seconds: test utterances one after another."""
    parts, size = [], 0
    for utterance in corpus.utterances:
        parts.append(load_audio(utterance.audio))
        size += len(parts[-1])
        if size >= seconds * 16_000:
            break
    return torch.cat(parts)[: int(seconds * 16_000)]


def features_of(samples: Tensor) -> Tensor:
    """As a recognizer computes them."""
    from modicum.speech import Fbank

    return Fbank(FeatureSettings())(samples)


# -- tables --------------------------------------------------------------------------------------------------


def section(raw: dict[str, Any]) -> str:
    """All tables, markers left out."""
    errors = [row for row in raw["rows"] if row["kind"] == "errors"]
    times = [row for row in raw["rows"] if row["kind"] == "times"]
    m = raw["machine"]
    parts = [
        f"Measured {raw['date']} on one thread of a machine that other jobs shared ({m['processor']}, torch "
        f"{m['torch']}, kernels for {raw['kernels']})."
    ]
    for model in MODELS:
        mine = [row for row in errors if row["model"] == model]
        if mine:
            parts.append(_errors(model, mine))
    if times:
        parts.append(_times(times))
    return "\n\n".join(parts)


def _errors(model: str, rows: Sequence[dict[str, Any]]) -> str:
    counts = Counter(row["seed"] for row in rows)
    seeds = sorted(seed for seed, count in counts.items() if count == max(counts.values()))
    rows = [row for row in rows if row["seed"] in seeds]  # those of which everything was measured
    first = rows[0]
    lines = []
    of = {(r["scheme"], r["epochs"], r["seed"]): r for r in rows}
    alike = max((row["epochs"] for row in rows if row["scheme"] == ALIKE), default=0)
    for scheme, epochs in sorted(dict.fromkeys((r["scheme"], r["epochs"]) for r in rows), key=_place):
        mine = {seed: of[scheme, epochs, seed] for seed in seeds if (scheme, epochs, seed) in of}
        cells = [_name(scheme, epochs), _values(mine, "wer"), _values(mine, "cer")]
        is_base = (scheme, epochs) == (FLOAT, 0)
        cells += ["", ""] if is_base else _gap(mine, {s: of[FLOAT, 0, s] for s in mine})
        is_trained = scheme in SCHEMES and epochs > 0
        others = {s: of[ALIKE, alike, s] for s in mine if (ALIKE, alike, s) in of}
        cells += _gap(mine, others) if is_trained and others else ["", ""]
        divergence = statistics.mean(row["divergence"] for row in mine.values())
        lines.append([*cells, "" if is_base else f"{divergence:.1e}"])
    head = ["", "WER, %", "CER, %", "WER − that of fp32, points", f"at most {AIM} more"]
    head += ["WER − that of fp32 trained alike", f"at most {AIM} more", "divergence from fp32, nats a frame"]
    return (
        f"**Error rates of `{model}`**, {first['parameters']:,} parameters, seeds "
        f"{', '.join(map(str, seeds))}; "
        f"{first['words']:,} words of 8 held-out voices. In brackets the 95 % interval of the difference "
        "over utterances (bootstrap of pairs, the seeds of an utterance together); the verdict is "
        "yes if all of the interval is at or below the aim, no if none of it, and else undecided.\n\n"
        + report.table(head, lines)
    )


def _place(variant: tuple[str, int]) -> tuple[int, int]:
    return (FLOAT, ALIKE, *SCHEMES).index(variant[0]), variant[1]


def _name(scheme: str, epochs: int) -> str:
    if scheme == FLOAT:
        return f"fp32, {epochs} epochs more on the labels" if epochs else "fp32"
    if scheme == ALIKE:
        return f"fp32, {epochs} epochs more with the loss of RSQ training"
    return f"{scheme}, {epochs} epochs of RSQ training" if epochs else f"{scheme}, ranges only"


def _gap(mine: dict[int, dict[str, Any]], others: dict[int, dict[str, Any]]) -> list[str]:
    """Points of WER over others, of the same seeds, and whether the aim is reached."""
    ours, theirs = ([rows[seed]["errors"] for seed in others] for rows in (mine, others))
    mean, low, high = difference(ours, theirs, next(iter(mine.values()))["words"])
    return [f"{mean:+.2f} [{low:+.2f}, {high:+.2f}]", _verdict(low, high)]


def _verdict(low: float, high: float) -> str:
    return "yes" if high <= AIM else "no" if low > AIM else "undecided"


def _values(rows: dict[int, dict[str, Any]], name: str) -> str:
    return ", ".join(f"{100 * rows[seed][name]:.2f}" for seed in sorted(rows))


def difference(
    ours: Sequence[Sequence[int]], exact: Sequence[Sequence[int]], words: int
) -> tuple[float, float, float]:
    """Points of word error rate, mean over seeds, with a 95 % interval over utterances."""
    gaps = (np.asarray(ours) - np.asarray(exact)).mean(0) * 100 * len(ours[0]) / words
    generator = np.random.default_rng(0)
    draws = [gaps[generator.integers(len(gaps), size=len(gaps))].mean() for _ in range(10_000)]
    low, high = np.percentile(draws, [2.5, 97.5])
    return float(gaps.mean()), float(low), float(high)


def _times(rows: Sequence[dict[str, Any]]) -> str:
    names = (FLOAT, "direct", "limited", "rsq", "rsq, oracle")
    lines, ratios = [], []
    for row in rows:
        what = f"{row['model']} {row['size']}, {row['parameters'] / 1e6:.1f} M, {row['seconds']:g} s"
        lines.append([what, *(f"{1e3 * row['medians'][f'model {name}']:.2f}" for name in names)])
        lines[-1] += [
            f"{1e3 * row['medians'][f'all {name}']:.1f}" for name in (FLOAT, "direct", "rsq, oracle")
        ]
        keys = [f"{part}: rsq, oracle to {slow}" for slow in ("direct", FLOAT) for part in ("model", "all")]
        cells = [row["ratios"][key] for key in keys]
        told = [f"{one['median']:.2f} ({one['low']:.2f} to {one['high']:.2f})" for one in cells]
        ratios.append([what, str(row["winograd_layers"]), *told])
    head = ["", *(f"{name}: model" for name in names)]
    head += [f"{name}: audio to text" for name in (FLOAT, "direct", "rsq, oracle")]
    return (
        "**Milliseconds of one recording**, medians of the thread's processor time, all candidates in turn. "
        "*Model* is from features to logits, *audio to text* has features and greedy decoding, too. fp32 has "
        "its norms folded, as int8 has.\n\n"
        + report.table(head, lines)
        + "\n\n**How many times faster int8 Winograd with the oracle is**, median and quartiles over "
        "rounds.\n\n"
        + report.table(
            [
                "",
                "Winograd layers",
                "direct: model",
                "direct: audio to text",
                "fp32: model",
                "fp32: audio to text",
            ],
            ratios,
        )
    )


def main() -> None:
    """Measure what is missing, or write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="gets speech, models and rows.jsonl")
    parser.add_argument("--quick", action="store_true", help="one seed, very small; for a trial")
    parser.add_argument("--docs", action="store_true", help="write the tables of what was measured")
    asked = parser.parse_args()
    kernels = native_kernels()
    if kernels is None:
        raise SystemExit("the kernels are not built: install a C++ compiler and ninja")
    if asked.docs:
        data, page = "benchmarks_winograd_speech.json", "winograd.md"
        write_docs(asked.work, section, data, page, "winograd-speech", {"kernels": kernels.name})
        return
    torch.set_num_threads(1)
    warnings.simplefilter("once")
    sizes = QUICK if asked.quick else Sizes()
    asked.work = work_folder(asked.work, asked.quick)
    try:
        bench = Bench(asked.work, sizes)
    except InputError as error:
        raise SystemExit(str(error)) from error
    for model in MODELS:
        for size in (sizes.size,) if asked.quick else (sizes.size, "base"):
            bench.time(model, size)
    for seed in sizes.seeds:
        for model in MODELS:
            bench.measure(model, seed)
    raw = {"date": datetime.now().date().isoformat(), "machine": machine.describe(), "kernels": kernels.name}
    print(section(raw | {"rows": bench.rows}))


if __name__ == "__main__":
    main()
