"""Entry: a float recognizer and a manifest in, a folder with an int8 recognizer out."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from modicum.quant.integer_model import describe_layers
from modicum.speech.corpus import CorpusSettings, Progress, build_corpus
from modicum.speech.manifest import read_manifest
from modicum.speech.quantization import QuantizationResult, QuantizationSettings, float_model, quantize
from modicum.speech.recognizer import WEIGHTS, Recognizer
from modicum.weights.new_folder import STATE, check_new, check_places


@dataclass(frozen=True)
class QuantizeReport:
    """What was done."""

    result: QuantizationResult
    num_utterances: int
    """Learned from and calibrated with."""
    num_skipped: int
    """Files that were left out."""
    float_nbytes: int
    """Of the file that holds the weights of the given model."""
    nbytes: int
    """Of the file of the quantised ones."""

    def to_dict(self) -> dict[str, Any]:
        """As JSON takes it."""
        losses = self.result.losses
        return {
            "about": dict(self.result.recognizer.about),
            "layers": describe_layers(self.result.recognizer.model),
            "num_utterances": self.num_utterances,
            "num_skipped": self.num_skipped,
            "float_nbytes": self.float_nbytes,
            "nbytes": self.nbytes,
            "steps": len(losses),
            "loss_first": losses[0] if losses else None,
            "loss_last": losses[-1] if losses else None,
            "seconds": self.result.seconds,
        }


def quantize_recognizer(
    model: str | Path,
    manifest: str | Path,
    out: str | Path,
    settings: QuantizationSettings | None = None,
    features: str | Path | None = None,
    progress: Progress | None = None,
) -> QuantizeReport:
    """Quantise a recognizer and write it to a folder; see `quantize`.

    Args:
        model: a folder that `modicum speech train` wrote, or a packed file.
        manifest: as `read_manifest` takes it; what the float model was trained on serves best.
        out: a new or empty folder, or that of the same run, stopped.
        settings: how.
        features: a folder for the features, kept for other runs; None for one that is removed.
        progress: as in `quantize`, and "features".

    Raises:
        InputError, ModelError: as in `quantize`, or the manifest or the folder cannot be read.
    """
    out = Path(out)
    check_new(out)
    check_places(out, {"features": features})
    recognizer, model = Recognizer.load(model), Path(model)
    given_nbytes = (model if model.is_file() else model / WEIGHTS).stat().st_size
    float_model(recognizer)  # refuses what cannot be quantised before features are computed
    corpus = build_corpus(
        read_manifest(manifest),
        features or out / STATE / "features",
        CorpusSettings(recognizer.features),
        progress,
    )
    result = quantize(recognizer, corpus, settings, out=out, progress=progress)
    return QuantizeReport(
        result,
        result.recognizer.about["quantized"]["data"]["rows"],
        corpus.num_skipped,
        given_nbytes,
        (out / WEIGHTS).stat().st_size,
    )
