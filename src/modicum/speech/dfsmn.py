"""DFSMN CTC model: a deep feed-forward sequential memory network (Zhang et al. 2018, arXiv 1803.05030).

The memory of layer l, section 2.2 there, with projection p, taps a and c, strides s1 and s2, and a skip
connection H = identity between the memories of consecutive layers:

    p^l_t   = V^l h^l_t
    p~^l_t  = p~^{l-1}_t + p^l_t + Σ_{i=0..N1} a^l_i ⊙ p^l_{t - s1·i} + Σ_{j=1..N2} c^l_j ⊙ p^l_{t + s2·j}
    h^{l+1} = ReLU(U^l p~^l + b^{l+1})

Frames before the first and past the last one are 0. We read these formulas in a summary of that paper. The
strided convolution in front and the CTC output are ours.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from modicum.errors import InputError
from modicum.speech.acoustic_model import AcousticModel, ModelSettings, inside, register
from modicum.speech.frame_norm import FrameNorm


@register
@dataclass(frozen=True)
class DfsmnCtcSettings(ModelSettings):
    """Sizes of a `DfsmnCtc`.

    Attributes:
        hidden: units of each ReLU layer.
        projection: units of each memory.
        num_layers: memories.
        left: N1, past frames of a memory beside the present one.
        right: N2, future frames; 0 for none.
        left_stride, right_stride: s1 and s2, in output frames.
        subsampling: stride of the first convolution.

    Raises:
        InputError: a number is out of range.
    """

    name: ClassVar[str] = "dfsmn"
    subsampling: int = 2
    hidden: int = 192
    projection: int = 96
    num_layers: int = 5
    left: int = 7
    right: int = 7
    left_stride: int = 1
    right_stride: int = 1

    def __post_init__(self) -> None:
        self._check_positive(
            "subsampling", "hidden", "projection", "num_layers", "left_stride", "right_stride"
        )
        if self.left < 0 or self.right < 0:
            raise InputError(f"the memory has {self.left} past and {self.right} future taps: give 0 or more")

    def build(self, num_features: int, num_classes: int) -> DfsmnCtc:
        return DfsmnCtc(self, num_features, num_classes)


class DfsmnMemory(nn.Module):
    """The memory of one layer, but for its skip connection: p + Σ a ⊙ p_past + Σ c ⊙ p_future.

    Attributes:
        past: [P, N1 + 1], oldest frame first: a_i is past[:, N1 - i].
        future: [P, N2], nearest frame first: c_j is future[:, j - 1].
    """

    def __init__(self, settings: DfsmnCtcSettings) -> None:
        super().__init__()
        self.settings = settings
        bound = (settings.left + settings.right + 1) ** -0.5
        self.past = nn.Parameter(torch.empty(settings.projection, settings.left + 1).uniform_(-bound, bound))
        self.future = nn.Parameter(torch.empty(settings.projection, settings.right).uniform_(-bound, bound))

    def forward(self, projected: Tensor) -> Tensor:
        """[N, T, P] -> [N, T, P]; frames that are padding must be 0."""
        settings, p = self.settings, projected.transpose(1, 2)
        channels = p.shape[1]
        reach = settings.left * settings.left_stride
        past = F.pad(p, (reach, 0))
        memory = p + F.conv1d(past, self.past[:, None], dilation=settings.left_stride, groups=channels)
        if settings.right:
            reach = settings.right * settings.right_stride
            future = F.pad(p, (0, reach))[:, :, settings.right_stride :]
            memory = memory + F.conv1d(
                future, self.future[:, None], dilation=settings.right_stride, groups=channels
            )
        return memory.transpose(1, 2)


class DfsmnLayer(nn.Module):
    """Hidden units [N, T, H] and the memory below -> hidden units of the next layer and this memory."""

    def __init__(self, settings: DfsmnCtcSettings) -> None:
        super().__init__()
        self.projection = nn.Linear(settings.hidden, settings.projection, bias=False)
        self.memory = DfsmnMemory(settings)
        self.hidden = nn.Linear(settings.projection, settings.hidden)
        nn.init.kaiming_uniform_(self.hidden.weight, nonlinearity="relu")

    def forward(self, hidden: Tensor, below: Tensor | None, is_inside: Tensor) -> tuple[Tensor, Tensor]:
        memory = self.memory(self.projection(hidden) * is_inside[..., None])
        if below is not None:
            memory = memory + below
        return self.hidden(memory).relu(), memory


class DfsmnCtc(AcousticModel):
    """Features [N, T, F] -> logits [N, ⌈T/s⌉, C]."""

    def __init__(self, settings: DfsmnCtcSettings, num_features: int, num_classes: int) -> None:
        super().__init__(settings, num_features, num_classes)
        stride = settings.subsampling
        taps = 2 * stride + 1
        self.first = nn.Conv1d(
            num_features, settings.hidden, taps, stride=stride, padding=taps // 2, bias=False
        )
        self.norm = FrameNorm(settings.hidden)
        self.layers = nn.ModuleList(DfsmnLayer(settings) for _ in range(settings.num_layers))
        self.output = nn.Linear(settings.hidden, num_classes)

    def forward(self, features: Tensor, lengths: Tensor) -> Tensor:
        features = features * inside(lengths, features.shape[1])[..., None]
        hidden = self.first(features.transpose(1, 2)).transpose(1, 2)  # [N, T', hidden]
        is_inside = inside(self.output_lengths(lengths), hidden.shape[1])
        hidden = self.norm(hidden, is_inside).relu()
        memory = None
        for layer in self.layers:
            hidden, memory = layer(hidden, memory, is_inside)
        logits: Tensor = self.output(hidden)
        return logits
