"""ConvDFSMN CTC model: a DFSMN whose memory is a full convolution, so that int8 Winograd has work to do.

The elementwise taps of a DFSMN's memory (see `dfsmn`) leave Winograd's transform nothing to save, as each
channel is alone. Here a full convolution takes their place, with matrices A_k [P, P], stride 1 and both skip
connections:

    p^l_t   = V^l h^l_t
    p~^l_t  = p~^{l-1}_t + p^l_t + Σ_{k=-(r-1)/2..(r-1)/2} A^l_k p^l_{t+k}
    h^{l+1} = ReLU(U^l p~^l_t + b^{l+1})

ConvDFSMN is a model of "INT8 Winograd Acceleration for Conv1D Equipped ASR Models Deployed on Mobile Devices"
(Yao et al. 2020, arXiv 2010.14841), of which we could read the abstract: the formula is our reading.
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
class ConvDfsmnCtcSettings(ModelSettings):
    """Sizes of a `ConvDfsmnCtc`.

    Attributes:
        hidden: units of each ReLU layer.
        projection: P, units of each memory.
        num_layers: memories.
        kernel: r, taps of each memory, odd. The compiled Winograd kernels take 3.
        subsampling: stride of the first convolution.

    Raises:
        InputError: a number is out of range.
    """

    name: ClassVar[str] = "convdfsmn"
    subsampling: int = 2
    hidden: int = 160
    projection: int = 160
    num_layers: int = 6
    kernel: int = 3

    def __post_init__(self) -> None:
        self._check_positive("subsampling", "hidden", "projection", "num_layers", "kernel")
        if self.kernel % 2 == 0:
            raise InputError(f"the kernel has {self.kernel} taps: give an odd number")

    def build(self, num_features: int, num_classes: int) -> ConvDfsmnCtc:
        return ConvDfsmnCtc(self, num_features, num_classes)


class ConvDfsmnLayer(nn.Module):
    """Hidden units [N, H, T] and the memory below [N, P, T] -> hidden units above and this memory."""

    def __init__(self, settings: ConvDfsmnCtcSettings) -> None:
        super().__init__()
        hidden, size, taps = settings.hidden, settings.projection, settings.kernel
        self.projection = nn.Conv1d(hidden, size, 1, bias=False)
        self.memory = nn.Conv1d(size, size, taps, padding=taps // 2, bias=False)
        self.hidden = nn.Conv1d(size, hidden, 1)
        nn.init.kaiming_uniform_(self.hidden.weight, nonlinearity="relu")

    def forward(
        self, hidden: Tensor, below: Tensor | None, is_inside: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """is_inside [N, T] bool; None: all frames are valid."""
        projected = self.projection(hidden)
        if is_inside is not None:  # the bias of `hidden` has filled the padding
            projected = projected * is_inside[:, None]
        memory = projected + self.memory(projected)
        if below is not None:
            memory = memory + below
        return self.hidden(memory).relu(), memory


class ConvDfsmnCtc(AcousticModel):
    """Features [N, T, F] -> logits [N, ⌈T/s⌉, C]."""

    def __init__(self, settings: ConvDfsmnCtcSettings, num_features: int, num_classes: int) -> None:
        super().__init__(settings, num_features, num_classes)
        stride = settings.subsampling
        self.first = NormedConv1d(num_features, settings.hidden, 2 * stride + 1, stride)
        self.layers = nn.ModuleList(ConvDfsmnLayer(settings) for _ in range(settings.num_layers))
        self.output = nn.Conv1d(settings.hidden, num_classes, 1)

    def forward(self, features: Tensor, lengths: Tensor) -> Tensor:
        features = features * inside(lengths, features.shape[1])[..., None]
        # Not -(-T // s): ONNX divides towards 0.
        size = (features.shape[1] + self.subsampling - 1) // self.subsampling
        is_inside = valid_frames(self.output_lengths(lengths), size)
        hidden = self.first(features.mT, is_inside).relu()  # [N, H, T']
        memory = None
        for layer in self.layers:
            hidden, memory = layer(hidden, memory, is_inside)
        logits: Tensor = self.output(hidden)
        return logits.mT
