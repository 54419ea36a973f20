"""Quantization: a float recognizer becomes one whose convolutions are int8, with RSQ training in between.

The steps: norms are folded into the convolutions. Each convolution gets a scheme (see `modicum.quant`), by
the latency oracle where it is asked. Ranges are calibrated on utterances of a corpus, and α of each RSQ layer
is searched. Weights are trained with fake quantisation and distilled from the float model. Weights and scales
become integers. After "INT8 Winograd Acceleration for Conv1D Equipped ASR Models Deployed on Mobile Devices"
(Yao et al. 2020, arXiv 2010.14841), of which we could read the abstract: the steps and settings are ours.
"""

from __future__ import annotations

import copy
import hashlib
import json
import shutil
import statistics
import time
import warnings
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from modicum.distill.checkpoint import TrainingCheckpoint
from modicum.errors import InputError, ModelError
from modicum.measure import LatencyOracle
from modicum.quant.calibration import calibrate, quantized_layers, search_alphas
from modicum.quant.choice import Conv1dShape, fastest
from modicum.quant.integer_model import describe_layers
from modicum.quant.loss import RSQLossSettings
from modicum.quant.replacement import QuantSettings, convert_model, quantize_model
from modicum.quant.schemes import RSQWinograd
from modicum.speech.acoustic_model import AcousticModel, ModelSettings, check_float
from modicum.speech.corpus import FeatureCorpus, Progress
from modicum.speech.examples import Examples, FrameRate
from modicum.speech.normed_conv import fold_norms
from modicum.speech.recipe import Recipe
from modicum.speech.recognizer import Recognizer
from modicum.speech.rsq_training import RSQTraining
from modicum.speech.teaching import check_teachers
from modicum.weights.new_folder import STATE, check_new

SCHEMES = ("direct", "rsq", "limited", "tapwise")
"""Names of schemes, as `modicum.quant.QuantSettings` takes them. Its `exact` needs 16-bit products."""


@dataclass(frozen=True)
class QuantizationSettings:
    """How a recognizer is quantised.

    Attributes:
        scheme: of the convolutions that F(2, r) can compute; the others are direct.
        epochs: of RSQ training; 0 for none.
        learning_rate: the highest.
        batch_seconds: of audio in a step, with padding.
        spec_augment: mask bands of features in training.
        loss: weights of noise and distillation beside the labels' CTC loss.
        use_oracle: use the scheme only in layers in which its kernel is faster than direct int8 on this
            machine.
        num_calibration: utterances that set the ranges, spread over the corpus.
        num_search: of those, utterances on which α is searched.
        seed: of the order of utterances, and of masks.

    Raises:
        InputError: a value is out of range.
    """

    scheme: str = "rsq"
    epochs: int = 2
    learning_rate: float = 3e-4
    batch_seconds: float = 30.0
    spec_augment: bool = True
    loss: RSQLossSettings = field(default_factory=RSQLossSettings)
    use_oracle: bool = True
    num_calibration: int = 32
    num_search: int = 8
    seed: int = 0

    def __post_init__(self) -> None:
        if self.scheme not in SCHEMES:
            raise InputError(f"scheme is {self.scheme!r}: choose one of {', '.join(SCHEMES)}")
        if self.scheme == "tapwise" and self.use_oracle:
            raise InputError(
                "tapwise has no compiled kernel, so the latency oracle would use direct int8 in every layer: "
                "turn the oracle off (--no-oracle) to compute it by torch, slowly"
            )
        if self.epochs < 0:
            raise InputError(f"epochs is {self.epochs}: give 0 (no training) or more")
        for name in ("num_calibration", "num_search"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} is {getattr(self, name)}: give 1 utterance or more")
        self.recipe(ModelSettings())  # checks the rest

    def recipe(self, model: ModelSettings) -> Recipe:
        """Of the training; at least one epoch."""
        return Recipe(
            model,
            max(self.epochs, 1),
            self.batch_seconds,
            self.learning_rate,
            spec_augment=self.spec_augment,
            seed=self.seed,
        )


@dataclass(frozen=True)
class QuantizationResult:
    """What quantising gave."""

    recognizer: Recognizer
    """With integer convolutions."""
    losses: list[float] = field(repr=False)
    """Of each step of the training, in nats; empty without."""
    seconds: float
    """Of this run."""


def quantize(
    recognizer: Recognizer,
    corpus: FeatureCorpus,
    settings: QuantizationSettings | None = None,
    *,
    out: str | Path | None = None,
    oracle: LatencyOracle[Conv1dShape] | None = None,
    progress: Progress | None = None,
) -> QuantizationResult:
    """Quantise a recognizer whose layers are all convolutions (`convdfsmn`, `wav2letter`); it stays as it is.

    A run that was stopped in its training goes on if it is started again with the same `out`, and gives what
    it would have given without a stop, bit for bit (on one machine, with one number of threads).

    Args:
        recognizer: a float one.
        corpus: to calibrate and to train with, of the recognizer's features.
        settings: how.
        out: a new or empty folder, which gets the recognizer, and until then a checkpoint in its folder
            state; None to keep it in memory only.
        oracle: asked in the place of the one of this machine.
        progress: called with "calibrating", "searching" or "training", how much is done, and of how much.

    Raises:
        ModelError: the model cannot be quantised, the corpus has other features, the loss is not a number,
            or a file cannot be written.
        InputError: no utterance can be learned from, a layer is given values that are not finite numbers,
            `out` is not empty, or its checkpoint is of another run.
    """
    started = time.perf_counter()
    settings, tell = settings or QuantizationSettings(), progress or (lambda *_: None)
    folder = None if out is None else Path(out)
    if folder is not None:
        check_new(folder)
    check_teachers([recognizer], corpus)
    teacher = float_model(recognizer)
    examples = Examples(corpus, recognizer.tokens, FrameRate(teacher.criterion, teacher.subsampling))
    student = _prepared(teacher, examples, settings, oracle, tell)
    losses: list[float] = []
    if settings.epochs:
        checkpoint = None
        if folder is not None:
            digest = _digest(recognizer, examples, settings, student)
            checkpoint = TrainingCheckpoint(folder / STATE / "training.safetensors", digest)
        recipe = settings.recipe(student.settings)
        losses = RSQTraining(
            student, examples, recipe, None, checkpoint, teacher=teacher, weights=settings.loss
        ).run(tell)
    convert_model(student.eval())
    about = {
        "quantization": asdict(settings),
        "float_model": recognizer.digest,
        "data": {"digest": corpus.digest, "rows": len(examples.rows), "seconds": corpus.seconds},
        "steps": len(losses),
    }
    quantized = Recognizer(
        student, recognizer.tokens, recognizer.features, {**recognizer.about, "quantized": about}
    )
    if folder is not None:
        quantized.save(folder)
        shutil.rmtree(folder / STATE, ignore_errors=True)
    return QuantizationResult(quantized, losses, time.perf_counter() - started)


def float_model(recognizer: Recognizer) -> AcousticModel:
    """A copy of a recognizer's model in evaluation mode, with norms folded: what int8 models are made from.

    Raises:
        ModelError: the model is quantised already, or has layers that are not convolutions.
    """
    check_float(recognizer.model)
    model = copy.deepcopy(recognizer.model).eval()
    fold_norms(model)
    convs = [module for module in model.modules() if isinstance(module, nn.Conv1d)]
    counted = {id(parameter) for conv in convs for parameter in conv.parameters()}
    others = [name for name, parameter in model.named_parameters() if id(parameter) not in counted]
    if others:
        raise ModelError(
            f"the {model.settings.name} model has weights that are not of convolutions ({others[0]} and "
            f"{len(others) - 1} more) and would stay in float32: quantise a convdfsmn or wav2letter model"
        )
    return model


class _Alone(nn.Module):
    """A model that is called with the features [T, F] of one utterance, as calibration does."""

    def __init__(self, model: AcousticModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, features: Tensor) -> Tensor:
        logits: Tensor = self.model(features[None], torch.tensor([len(features)]))
        return logits


class _Told(list[Tensor]):
    """Batches that tell how many of them were given."""

    def __init__(self, batches: list[Tensor], what: str, tell: Progress) -> None:
        super().__init__(batches)
        self._what, self._tell = what, tell

    def __iter__(self) -> Iterator[Tensor]:
        for number, batch in enumerate(super().__iter__()):
            self._tell(self._what, number, len(self))
            yield batch
        self._tell(self._what, len(self), len(self))


def _prepared(
    teacher: AcousticModel,
    examples: Examples,
    settings: QuantizationSettings,
    oracle: LatencyOracle[Conv1dShape] | None,
    tell: Progress,
) -> AcousticModel:
    """A copy with fake quantisation, ranges and α."""
    student = copy.deepcopy(teacher)
    corpus, rows = examples.corpus, examples.rows
    choose = None
    if settings.use_oracle and settings.scheme != "direct":
        length = examples.rate.num_frames(int(statistics.median(corpus.num_frames(row) for row in rows)))
        choose = fastest(length, oracle)
    with warnings.catch_warnings():
        # Which layers are direct is part of the result.
        warnings.filterwarnings("ignore", message="direct int8 is used for")
        quantize_model(student, QuantSettings(settings.scheme), choose)
    alone = _Alone(student)
    batches = _spread(corpus, rows, settings.num_calibration)
    calibrate(alone, _Told(batches, "calibrating", tell))
    if any(isinstance(layer.scheme, RSQWinograd) for layer in quantized_layers(student).values()):
        few = batches[:: -(-len(batches) // settings.num_search)]
        search_alphas(alone, _Told(few, "searching", tell))
    return student


def _spread(corpus: FeatureCorpus, rows: list[int], num: int) -> list[Tensor]:
    num = min(num, len(rows))
    return [corpus.features(rows[index * len(rows) // num]) for index in range(num)]


def _digest(
    recognizer: Recognizer, examples: Examples, settings: QuantizationSettings, student: AcousticModel
) -> str:
    basis: list[Any] = [
        recognizer.digest,
        examples.corpus.digest,
        asdict(settings),
        {name: str(layer.scheme) for name, layer in quantized_layers(student).items()},
    ]
    return hashlib.sha256(json.dumps(basis, sort_keys=True).encode()).hexdigest()[:16]


def layer_lines(recognizer: Recognizer) -> list[str]:
    """One line for each scheme of a quantised recognizer, with its layers: "direct: first, output"."""
    names: dict[str, list[str]] = {}
    for name, fields in describe_layers(recognizer.model).items():
        alpha = f" (α {fields['alpha']:.2f})" if "alpha" in fields else ""
        label = (
            fields["scheme"]
            if "outputs" not in fields
            else f"{fields['scheme']} F({fields['outputs']},{fields['taps']})"
        )
        names.setdefault(label, []).append(name + alpha)
    return [f"{label}: {', '.join(layers)}" for label, layers in names.items()]
