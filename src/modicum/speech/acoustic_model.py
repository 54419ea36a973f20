"""Acoustic model: the interface of all models, and the table of their names.

A model gives the logits of its classes for each output frame of a padded batch. What it gives for an
utterance does not depend on the others in the batch, but for rounding.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from modicum.errors import InputError, ModelError
from modicum.quant.integer_model import integer_layers

Criterion = Literal["ctc", "frames"]
"""What a model is trained by: CTC on token sequences, or the cross-entropy of a label for each frame."""


@dataclass(frozen=True)
class ModelSettings:
    """Sizes of a model. Each subclass has a name, under which `register` puts it into the table."""

    name: ClassVar[str] = ""
    criterion: ClassVar[Criterion] = "ctc"
    subsampling: int = 1
    """Feature frames for each output frame."""

    def build(self, num_features: int, num_classes: int) -> AcousticModel:
        """A new model with random weights from torch's global generator."""
        raise NotImplementedError

    def to_dict(self) -> dict[str, Any]:
        """As JSON takes it; `settings_from_dict` reads it."""
        return {"name": self.name, **asdict(self)}

    def _check_positive(self, *names: str) -> None:
        for name in names:
            if getattr(self, name) < 1:
                raise InputError(f"{name} of a {self.name} model is {getattr(self, name)}: give 1 or more")


class AcousticModel(nn.Module):
    """Features in, logits out.

    Attributes:
        settings: of what it was built.
        num_features: F, numbers of a feature frame.
        num_classes: C, of an output frame.
    """

    def __init__(self, settings: ModelSettings, num_features: int, num_classes: int) -> None:
        super().__init__()
        if num_features < 1 or num_classes < 2:
            raise InputError(
                f"a model of {num_features} features and {num_classes} classes cannot be trained: give at "
                "least 1 and 2"
            )
        self.settings, self.num_features, self.num_classes = settings, num_features, num_classes

    def forward(self, features: Tensor, lengths: Tensor) -> Tensor:
        """Logits [N, T', C] of padded features [N, T, F] float32 with lengths [N] int64, T' = ⌈T / s⌉.

        Output frames past `output_lengths(lengths)` hold numbers of no meaning.
        """
        raise NotImplementedError

    @property
    def criterion(self) -> Criterion:
        """What it is trained by."""
        return self.settings.criterion

    @property
    def subsampling(self) -> int:
        """s, feature frames for each output frame."""
        return self.settings.subsampling

    @property
    def num_parameters(self) -> int:
        """Trained numbers; those of integer convolutions as in float."""
        integer = sum(layer.num_parameters for layer in integer_layers(self).values())
        return integer + sum(parameter.numel() for parameter in self.parameters())

    def output_lengths(self, lengths: Tensor) -> Tensor:
        """⌈lengths / s⌉, [N] int64."""
        return (lengths + self.subsampling - 1) // self.subsampling


def check_float(model: AcousticModel) -> None:
    """Raise unless the weights are floating-point numbers, which can be trained, rounded and exported.

    Raises:
        ModelError: it is an int8 model (see `modicum.speech.quantize`).
    """
    if integer_layers(model):
        raise ModelError("the recognizer is quantised already: give the float one that it was made from")


def inside(lengths: Tensor, size: int) -> Tensor:
    """[N, size] bool: True for frames before each length."""
    return torch.arange(size, device=lengths.device) < lengths[:, None]


MODELS: dict[str, type[ModelSettings]] = {}
"""Model settings by name; importing `modicum.speech` fills it."""


def register(settings: type[ModelSettings]) -> type[ModelSettings]:
    """Put settings into the table under their name; a decorator."""
    MODELS[settings.name] = settings
    return settings


def settings_from_dict(saved: dict[str, Any]) -> ModelSettings:
    """The settings that `to_dict` wrote.

    Raises:
        ModelError: the name or a field is not known.
    """
    fields = dict(saved)
    name = fields.pop("name", None)
    if name not in MODELS:
        raise ModelError(f"there is no acoustic model {name!r}; known are {', '.join(sorted(MODELS))}")
    try:
        return MODELS[name](**fields)
    except TypeError as error:
        raise ModelError(f"the settings of the {name} model cannot be used ({error})") from error
