"""Scheme b: quantised after the transform, with a scale for each tap.

V = Bᵀ d is computed in floating point and quantised with one scale for each of the n taps; U = G w with one
for each tap and output channel. MNN (ConvInt8Winograd.cpp) and LoWino do so in two dimensions. Integer
products of different taps have different scales, so they are scaled before Aᵀ joins them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from modicum.quant.convolution import ConvSettings, apply_filter, apply_output, multiply, transform_input
from modicum.quant.saturation import SaturationCounter
from modicum.quant.schemes.base import WinogradScheme
from modicum.quant.transform import as_tensor


@dataclass(frozen=True)
class TapwiseWinograd(WinogradScheme):
    """Int8 in the Winograd domain.

    Attributes:
        is_per_tap: one scale for each tap (and output channel); False: one for all taps of V, one for U.
    """

    name: ClassVar[str] = "tapwise"
    has_transformed_weights: ClassVar[bool] = True
    is_per_tap: bool = True

    @property
    def input_scale_shape(self) -> tuple[int, ...]:
        return (self.transform.products, 1, 1, 1) if self.is_per_tap else ()

    def weight_scale_shape(self, filters: int) -> tuple[int, ...]:
        return (self.transform.products, filters, 1) if self.is_per_tap else ()

    def prepare_input(self, x: Tensor, conv: ConvSettings) -> Tensor:
        return transform_input(x, self.transform, conv)

    def prepare_weight(self, weight: Tensor) -> Tensor:
        return apply_filter(weight, as_tensor(self.transform.filter, weight))

    def sums(
        self,
        inputs: Tensor,
        weights: Tensor,
        conv: ConvSettings,
        length: int,
        counter: SaturationCounter | None = None,
    ) -> Tensor:
        return multiply(weights, inputs)  # [n, N, K, P]

    def output_scale(self, input_scale: Tensor, weight_scale: Tensor) -> Tensor:
        if not self.is_per_tap:
            return input_scale * weight_scale
        return input_scale * weight_scale[:, None]  # [n, 1, K, 1]

    def finish(self, scaled: Tensor, length: int) -> Tensor:
        return apply_output(scaled, as_tensor(self.transform.output, scaled), length)

    def largest_sum(self, conv: ConvSettings, channels: int) -> int:
        return self.input_limit * self.weight_limit * channels
