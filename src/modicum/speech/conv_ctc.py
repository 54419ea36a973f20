"""Convolutional CTC model: a stack of depthwise-separable convolutions over time.

Blocks as in QuartzNet (Kriman et al. 2019, arXiv 1910.10261), smaller: a depthwise convolution over time, a
pointwise one, batch normalisation, ReLU, and a skip connection around each block.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn

from modicum.errors import InputError
from modicum.speech.acoustic_model import AcousticModel, ModelSettings, inside, register
from modicum.speech.frame_norm import FrameNorm


@register
@dataclass(frozen=True)
class ConvCtcSettings(ModelSettings):
    """Sizes of a `ConvCtc`.

    Attributes:
        width: channels.
        num_blocks: separable convolutions behind the first, full one.
        kernel: taps of each depthwise convolution, odd.
        dropout: probability, in training.
        subsampling: stride of the first convolution.

    Raises:
        InputError: a number is out of range.
    """

    name: ClassVar[str] = "conv"
    subsampling: int = 2
    width: int = 144
    num_blocks: int = 6
    kernel: int = 11
    dropout: float = 0.0

    def __post_init__(self) -> None:
        self._check_positive("subsampling", "width", "num_blocks", "kernel")
        if self.kernel % 2 == 0:
            raise InputError(f"the kernel has {self.kernel} taps: give an odd number")
        if not 0 <= self.dropout < 1:
            raise InputError(f"dropout is {self.dropout}: give a share from 0 to below 1")

    def build(self, num_features: int, num_classes: int) -> ConvCtc:
        return ConvCtc(self, num_features, num_classes)


class ConvCtc(AcousticModel):
    """Features [N, T, F] -> logits [N, ⌈T/s⌉, C]."""

    def __init__(self, settings: ConvCtcSettings, num_features: int, num_classes: int) -> None:
        super().__init__(settings, num_features, num_classes)
        stride = settings.subsampling
        taps = 2 * stride + 1
        self.first = nn.Conv1d(
            num_features, settings.width, taps, stride=stride, padding=taps // 2, bias=False
        )
        self.norm = FrameNorm(settings.width)
        self.blocks = nn.ModuleList(SeparableBlock(settings) for _ in range(settings.num_blocks))
        self.output = nn.Linear(settings.width, num_classes)

    def forward(self, features: Tensor, lengths: Tensor) -> Tensor:
        features = features * inside(lengths, features.shape[1])[..., None]
        hidden = self.first(features.transpose(1, 2)).transpose(1, 2)  # [N, T', width]
        is_inside = inside(self.output_lengths(lengths), hidden.shape[1])
        hidden = self.norm(hidden, is_inside).relu()
        for block in self.blocks:
            hidden = block(hidden, is_inside)
        logits: Tensor = self.output(hidden)
        return logits


class SeparableBlock(nn.Module):
    """x + dropout(ReLU(norm(pointwise(depthwise(x))))), on [N, T, width]."""

    def __init__(self, settings: ConvCtcSettings) -> None:
        super().__init__()
        width, kernel = settings.width, settings.kernel
        self.depthwise = nn.Conv1d(width, width, kernel, padding=kernel // 2, groups=width, bias=False)
        self.pointwise = nn.Linear(width, width, bias=False)
        self.norm = FrameNorm(width)
        self.dropout = nn.Dropout(settings.dropout)

    def forward(self, hidden: Tensor, is_inside: Tensor) -> Tensor:
        mixed = self.pointwise(self.depthwise(hidden.transpose(1, 2)).transpose(1, 2))
        update: Tensor = self.dropout(self.norm(mixed, is_inside).relu())
        return hidden + update
