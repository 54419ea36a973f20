"""Recognizer: a trained model with its features and tokens, in a folder."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

import modicum.speech.sizes  # noqa: F401  # registers the models
from modicum.errors import InputError, ModelError
from modicum.quant.integer_model import describe_layers, restore_layers
from modicum.speech.acoustic_model import AcousticModel, settings_from_dict
from modicum.speech.audio import is_silent, load_audio
from modicum.speech.decoding import Decoder, GreedyDecoder
from modicum.speech.features import Fbank, FeatureSettings
from modicum.speech.normed_conv import fold_norms
from modicum.speech.tokens import TokenSet
from modicum.speech.viterbi import PhoneViterbi
from modicum.weights.new_folder import new_files

WEIGHTS = "model.safetensors"
CONFIG = "recognizer.json"
_FORMAT = 1
_REFUSALS = (OSError, ValueError, LookupError, TypeError, AttributeError, RuntimeError, SafetensorError)
"""What reading a damaged folder may raise."""


@dataclass(frozen=True)
class Transcript:
    """What was recognised in one recording."""

    text: str
    """Words, or phones with spaces between."""
    classes: tuple[int, ...]
    """The tokens; for a frames model the class of each frame."""
    seconds: float
    """Of audio."""


@dataclass(frozen=True)
class Recognizer:
    """A model that recognises speech.

    Attributes:
        model: in evaluation mode; its convolutions may be integer ones (see `modicum.speech.quantize`).
        tokens: its classes.
        features: its input.
        about: how it was trained, as JSON takes it.
    """

    model: AcousticModel
    tokens: TokenSet
    features: FeatureSettings
    about: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def load(cls, folder: str | Path) -> Recognizer:
        """From a folder that `save` wrote, or a file that `modicum speech pack` wrote.

        Raises:
            ModelError: there is none, or it is damaged or of a newer format.
        """
        folder = Path(folder)
        if folder.is_file():
            from modicum.speech.compact.packed_file import load_packed

            return load_packed(folder).recognizer
        try:
            saved: Any = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
            if saved["format"] != _FORMAT:
                raise ModelError(
                    f"{folder / CONFIG} has format {saved['format']}, this modicum reads {_FORMAT}: get a "
                    "newer modicum, or train the model again"
                )
            tokens, features = TokenSet.from_json(saved["tokens"]), FeatureSettings(**saved["features"])
            settings = settings_from_dict(saved["model"])
            model = settings.build(features.num_mels, tokens.num_classes)
            if layers := saved.get("integer_layers"):
                fold_norms(model)
                restore_layers(model, layers)
            model.load_state_dict(load_file(folder / WEIGHTS))
            about = dict(saved["about"])
        except FileNotFoundError as error:
            missing = WEIGHTS if (folder / CONFIG).exists() else CONFIG
            raise ModelError(
                f"{folder} holds no recognizer, as it has no {missing}: give a folder that "
                "modicum speech train wrote"
            ) from error
        except _REFUSALS as error:
            if isinstance(error, ModelError):
                raise
            raise ModelError(
                f"the recognizer in {folder} cannot be read ({error}): train it again"
            ) from error
        return cls(model.eval(), tokens, features, about)

    def save(self, folder: str | Path) -> None:
        """Write it to a new or empty folder; its files appear all together.

        Raises:
            InputError: the folder is not empty.
            ModelError: it cannot be written.
        """
        told: dict[str, Any] = {
            "format": _FORMAT,
            "model": self.model.settings.to_dict(),
            "features": asdict(self.features),
            "tokens": self.tokens.to_json(),
            "about": dict(self.about),
        }
        if layers := describe_layers(self.model):
            told["integer_layers"] = layers
        with new_files(Path(folder)) as staged:
            state = {name: tensor.contiguous() for name, tensor in self.model.state_dict().items()}
            save_file(state, staged / WEIGHTS)
            (staged / CONFIG).write_text(json.dumps(told, indent=1, ensure_ascii=False), encoding="utf-8")

    @property
    def frame_rate(self) -> float:
        """Output frames per second."""
        return self.features.frames_per_second / self.model.subsampling

    @property
    def digest(self) -> str:
        """16 hex digits that stand for settings, tokens, features and all weights."""
        about: list[Any] = [self.model.settings.to_dict(), self.tokens.to_json(), asdict(self.features)]
        if layers := describe_layers(self.model):
            about.append(layers)
        sha = hashlib.sha256(json.dumps(about, sort_keys=True).encode())
        for name, tensor in sorted(self.model.state_dict().items()):
            sha.update(name.encode())
            sha.update(tensor.detach().cpu().contiguous().numpy().tobytes())
        return sha.hexdigest()[:16]

    @torch.no_grad()
    def logits(self, features: Tensor) -> Tensor:
        """Logits [T', C] of the features [T, F] of one utterance."""
        logits: Tensor = self.model(features[None], torch.tensor([len(features)]))
        return logits[0]

    def transcribe(self, audio: str | Path | Tensor, decoder: Decoder | None = None) -> Transcript:
        """Recognise one recording.

        Args:
            audio: a file, or mono samples [n] float32 at the model's sample rate.
            decoder: of a CTC model; greedy by default.

        Raises:
            InputError: the file cannot be read, is empty or silent, or is too short for a frame.
        """
        sample_rate = self.features.sample_rate
        samples = audio if isinstance(audio, Tensor) else load_audio(audio, sample_rate)
        if is_silent(samples):
            name = "the samples are" if isinstance(audio, Tensor) else f"{audio} is"
            raise InputError(f"{name} silent: give a recording with speech")
        try:
            features = Fbank(self.features)(samples)
        except InputError as error:
            raise error if isinstance(audio, Tensor) else InputError(f"{audio}: {error}") from error
        log_probs = self.logits(features).log_softmax(-1)
        classes, text = recognize(log_probs, self.tokens, decoder)
        return Transcript(text, tuple(classes), len(samples) / sample_rate)


def recognize(log_probs: Tensor, tokens: TokenSet, decoder: Decoder | None = None) -> tuple[list[int], str]:
    """Classes for log-probabilities [T', C], and their text.

    Of CTC both are decoded. Of frames the classes are the most probable of each, which flicker, and the text
    is that of the best path (see `PhoneViterbi`).
    """
    if tokens.kind == "thirds":
        return [int(one) for one in log_probs.argmax(-1)], " ".join(PhoneViterbi(tokens)(log_probs))
    classes = (decoder or GreedyDecoder())(log_probs)
    return classes, tokens.decode(classes)
