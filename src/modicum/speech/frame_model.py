"""Frame model: a multilayer perceptron over a window of frames, with a class for each frame.

The acoustic model of a hybrid system: trained by cross-entropy on frames whose labels are known, such as
thirds of phones. Every member of an ensemble has the same alignment, so means of probabilities frame by frame
are safe, other than with CTC.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn

from modicum.errors import InputError
from modicum.speech.acoustic_model import AcousticModel, Criterion, ModelSettings, inside, register
from modicum.speech.frame_norm import FrameNorm


@register
@dataclass(frozen=True)
class FrameModelSettings(ModelSettings):
    """Sizes of a `FrameModel`.

    Attributes:
        width: units of each layer.
        num_layers: ReLU layers.
        context: frames that a decision sees on each side.
        dropout: probability, in training.
        subsampling: 1 for a decision at each feature frame.

    Raises:
        InputError: a number is out of range.
    """

    name: ClassVar[str] = "frames"
    criterion: ClassVar[Criterion] = "frames"
    width: int = 256
    num_layers: int = 3
    context: int = 7
    dropout: float = 0.0

    def __post_init__(self) -> None:
        self._check_positive("subsampling", "width", "num_layers")
        if self.context < 0:
            raise InputError(f"the context is {self.context} frames: give 0 or more")
        if not 0 <= self.dropout < 1:
            raise InputError(f"dropout is {self.dropout}: give a share from 0 to below 1")

    def build(self, num_features: int, num_classes: int) -> FrameModel:
        return FrameModel(self, num_features, num_classes)


class FrameModel(AcousticModel):
    """Features [N, T, F] -> logits [N, ⌈T/s⌉, C]. The first layer is a convolution over the window."""

    def __init__(self, settings: FrameModelSettings, num_features: int, num_classes: int) -> None:
        super().__init__(settings, num_features, num_classes)
        width, context = settings.width, settings.context
        self.first = nn.Conv1d(
            num_features,
            width,
            2 * context + 1,
            stride=settings.subsampling,
            padding=context,
            bias=False,
        )
        self.norms = nn.ModuleList(FrameNorm(width) for _ in range(settings.num_layers))
        self.layers = nn.ModuleList(
            nn.Linear(width, width, bias=False) for _ in range(settings.num_layers - 1)
        )
        self.dropout = nn.Dropout(settings.dropout)
        self.output = nn.Linear(width, num_classes)

    def forward(self, features: Tensor, lengths: Tensor) -> Tensor:
        features = features * inside(lengths, features.shape[1])[..., None]
        hidden = self.first(features.transpose(1, 2)).transpose(1, 2)  # [N, T', width]
        is_inside = inside(self.output_lengths(lengths), hidden.shape[1])
        hidden = self.dropout(self.norms[0](hidden, is_inside).relu())
        for layer, norm in zip(self.layers, list(self.norms)[1:], strict=True):
            hidden = self.dropout(norm(layer(hidden), is_inside).relu())
        logits: Tensor = self.output(hidden)
        return logits
