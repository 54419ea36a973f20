"""Wav2letter CTC model: a plain stack of wide convolutions.

After Collobert et al. 2016 (arXiv 1609.03193): convolutions over time, then convolutions of one tap in the
place of fully connected layers. Batch normalisation, 3 taps and the sizes are ours. 3 taps are those of the
tile F(2, 3), for which there are compiled int8 Winograd kernels.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn

from modicum.errors import InputError
from modicum.speech.acoustic_model import AcousticModel, ModelSettings, inside, register
from modicum.speech.normed_conv import NormedConv1d, valid_frames


@register
@dataclass(frozen=True)
class Wav2letterCtcSettings(ModelSettings):
    """Sizes of a `Wav2letterCtc`.

    Attributes:
        width: channels of the convolutions.
        num_layers: convolutions behind the first.
        kernel: taps of each, odd. The compiled Winograd kernels take 3.
        head: channels of the layer of one tap in front of the output.
        subsampling: stride of the first convolution.

    Raises:
        InputError: a number is out of range.
    """

    name: ClassVar[str] = "wav2letter"
    subsampling: int = 2
    width: int = 160
    num_layers: int = 6
    kernel: int = 3
    head: int = 256

    def __post_init__(self) -> None:
        self._check_positive("subsampling", "width", "num_layers", "kernel", "head")
        if self.kernel % 2 == 0:
            raise InputError(f"the kernel has {self.kernel} taps: give an odd number")

    def build(self, num_features: int, num_classes: int) -> Wav2letterCtc:
        return Wav2letterCtc(self, num_features, num_classes)


class Wav2letterCtc(AcousticModel):
    """Features [N, T, F] -> logits [N, ⌈T/s⌉, C]; ReLU(norm(conv(x))) in each layer."""

    def __init__(self, settings: Wav2letterCtcSettings, num_features: int, num_classes: int) -> None:
        super().__init__(settings, num_features, num_classes)
        stride, width = settings.subsampling, settings.width
        self.first = NormedConv1d(num_features, width, 2 * stride + 1, stride)
        self.layers = nn.ModuleList(
            NormedConv1d(width, width, settings.kernel) for _ in range(settings.num_layers)
        )
        self.head = NormedConv1d(width, settings.head, 1)
        self.output = nn.Conv1d(settings.head, num_classes, 1)

    def forward(self, features: Tensor, lengths: Tensor) -> Tensor:
        features = features * inside(lengths, features.shape[1])[..., None]
        # Not -(-T // s): ONNX divides towards 0.
        size = (features.shape[1] + self.subsampling - 1) // self.subsampling
        is_inside = valid_frames(self.output_lengths(lengths), size)
        hidden = features.mT
        for layer in (self.first, *self.layers, self.head):
            hidden = layer(hidden, is_inside).relu()  # [N, width, T']
        logits: Tensor = self.output(hidden)
        return logits.mT
