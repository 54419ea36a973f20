"""Direct int8 convolution: one scale for the input, one for each output channel of the weights."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from modicum.quant.convolution import ConvSettings, direct_conv1d
from modicum.quant.saturation import SaturationCounter
from modicum.quant.schemes.base import Scheme


@dataclass(frozen=True)
class DirectInt8(Scheme):
    """Any stride, dilation and groups."""

    name: ClassVar[str] = "direct"

    def sums(
        self,
        inputs: Tensor,
        weights: Tensor,
        conv: ConvSettings,
        length: int,
        counter: SaturationCounter | None = None,
    ) -> Tensor:
        return direct_conv1d(inputs, weights, conv)

    def __str__(self) -> str:
        return self.name
