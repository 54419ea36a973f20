"""ONNX: a recognizer as a file that onnxruntime runs and sherpa-onnx decodes.

The file has the interface of icefall's CTC models, which sherpa-onnx loads as a "zipformer CTC" model: inputs
x [N, T, F] float32 (log mel energies) and x_lens [N] int64, outputs log_probs [N, T', C] float32 and
log_probs_len [N] int64. Beside it lies tokens.txt, a line "symbol number" for each class.
"""

from __future__ import annotations

import copy
import json
import logging
import warnings
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from modicum.errors import InputError, ModelError
from modicum.speech.acoustic_model import check_float
from modicum.speech.features import SHERPA_HIGH_FREQUENCY
from modicum.speech.frame_norm import FrameNorm
from modicum.speech.recognizer import Recognizer
from modicum.whole_file import write_whole

OPSET = 18
_LEAST_STANDARD_DEVIATION = 1e-3


@dataclass(frozen=True)
class OnnxFiles:
    """What was written."""

    model: Path
    tokens: Path
    is_for_sherpa: bool
    """Whether sherpa-onnx computes the features with which the model was trained."""


def export_onnx(recognizer: Recognizer, folder: str | Path) -> OnnxFiles:
    """Write model.onnx and tokens.txt into a folder.

    Normalisation of features over the utterance, where the recognizer has it, becomes part of the model.
    Weights are float32: a file of few bits grows.

    Raises:
        InputError: the packages onnx and onnxscript are not installed, or the files cannot be written.
        ModelError: it is no CTC model, or an int8 one.
    """
    if recognizer.model.criterion != "ctc":
        raise ModelError("only CTC models are exported: give one of any kind but frames")
    check_float(recognizer.model)
    onnx = _onnx()
    folder = Path(folder)
    program = _program(recognizer)
    proto = program.model_proto
    for key, value in _metadata(recognizer).items():
        entry = proto.metadata_props.add()
        entry.key, entry.value = key, value
    onnx.checker.check_model(proto)
    files = OnnxFiles(folder / "model.onnx", folder / "tokens.txt", _is_for_sherpa(recognizer))
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_whole(files.tokens, tokens_txt(recognizer))
        write_whole(files.model, proto.SerializeToString())
    except OSError as error:
        raise InputError(
            f"cannot write to {folder}: {error.strerror or error}; give a folder that can be written"
        ) from error
    return files


def tokens_txt(recognizer: Recognizer) -> str:
    """Lines "symbol number". The blank is <blk>; a space is written ▁, which sherpa-onnx shows as a space."""
    symbols = ["▁" if symbol == " " else symbol for symbol in recognizer.tokens.symbols]
    if recognizer.tokens.kind == "phones":
        symbols = [f"▁{symbol}" for symbol in symbols]
    return "".join(f"{symbol} {index}\n" for index, symbol in enumerate(["<blk>", *symbols]))


class _Exported(nn.Module):
    """Features and lengths in, log-probabilities and lengths out."""

    def __init__(self, recognizer: Recognizer) -> None:
        super().__init__()
        self.model = copy.deepcopy(recognizer.model).eval()
        _replace_norms(self.model)
        self.is_normalized = recognizer.features.normalization == "utterance"

    def forward(self, x: Tensor, x_lens: Tensor) -> tuple[Tensor, Tensor]:
        if self.is_normalized:
            x = _normalized(x, x_lens)
        return self.model(x, x_lens).log_softmax(-1), self.model.output_lengths(x_lens)


class _Affine(nn.Module):
    """A `FrameNorm` in evaluation, with the frames of padding set to 0 by a product."""

    scale: Tensor
    shift: Tensor

    def __init__(self, norm: FrameNorm) -> None:
        super().__init__()
        assert norm.running_mean is not None
        assert norm.running_var is not None
        scale = (norm.weight / (norm.running_var + norm.eps).sqrt()).detach()
        self.register_buffer("scale", scale)
        self.register_buffer("shift", (norm.bias - norm.running_mean * scale).detach())

    def forward(self, input: Tensor, is_inside: Tensor) -> Tensor:
        out: Tensor = input * self.scale + self.shift
        return out * is_inside[..., None].to(out.dtype)


def _replace_norms(module: nn.Module) -> None:
    for name, child in module.named_children():
        if isinstance(child, FrameNorm):
            setattr(module, name, _Affine(child))
        else:
            _replace_norms(child)


def _normalized(x: Tensor, lengths: Tensor) -> Tensor:
    """As `Fbank` normalises each channel over the utterance."""
    kept = (torch.arange(x.shape[1], device=x.device) < lengths[:, None])[..., None].to(x.dtype)
    count = lengths.to(x.dtype)[:, None, None]
    mean = (x * kept).sum(1, keepdim=True) / count
    centred = (x - mean) * kept
    deviation = (centred.square().sum(1, keepdim=True) / count).sqrt()
    least = _LEAST_STANDARD_DEVIATION
    return torch.where(deviation > least, centred / deviation.clamp_min(least), 0.0)


def _program(recognizer: Recognizer) -> Any:
    frames = 8 * recognizer.model.subsampling + 3
    example = (torch.randn(2, frames, recognizer.features.num_mels), torch.tensor([frames, frames - 2]))
    shapes = {
        "x": {0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC},
        "x_lens": {0: torch.export.Dim.DYNAMIC},
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the exporter, about itself
        logging.getLogger("torch.onnx").setLevel(logging.ERROR)  # it tells which packages it could also use
        program = torch.onnx.export(
            _Exported(recognizer).eval(),
            example,
            input_names=["x", "x_lens"],
            output_names=["log_probs", "log_probs_len"],
            dynamic_shapes=shapes,
            opset_version=OPSET,
            dynamo=True,
            verbose=False,
        )
    assert program is not None
    return program


def _metadata(recognizer: Recognizer) -> dict[str, str]:
    return {
        "model_type": "zipformer2_ctc",
        "comment": "modicum",
        "model_author": "modicum",
        "version": "1",
        "vocab_size": str(recognizer.tokens.num_classes),
        "subsampling_factor": str(recognizer.model.subsampling),
        "features": json.dumps(asdict(recognizer.features)),
    }


def _is_for_sherpa(recognizer: Recognizer) -> bool:
    features = recognizer.features
    half = features.sample_rate / 2
    return (
        features.frame_length_ms == 25
        and features.frame_shift_ms == 10
        and features.dither == 0
        and features.highest_frequency == half + SHERPA_HIGH_FREQUENCY
    )


def _onnx() -> Any:
    try:
        import onnx
        import onnxscript  # noqa: F401  # of torch's exporter
    except ImportError as error:
        raise InputError(
            f"the export to ONNX needs onnx and onnxscript ({error}): pip install 'modicum[speech-export]'"
        ) from error
    return onnx
