"""Scheme c: int8 samples of a range so small that the transform cannot leave int8.

The input is quantised to ±Q₀, Q₀ = floor(127 / ‖Bᵀ‖_∞), so that V = Bᵀ q is int8 as it is. Transformed
weights are quantised with one scale for each output channel. Transforms with halves and quarters (F(4, 5),
F(6, 3)) round V to whole numbers.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from modicum.errors import InputError
from modicum.quant.convolution import ConvSettings, apply_filter, apply_output, multiply, transform_input
from modicum.quant.fake_quant import straight_round
from modicum.quant.saturation import SaturationCounter
from modicum.quant.schemes.base import WinogradScheme
from modicum.quant.transform import as_tensor

INT8_LOW, INT8_HIGH = -128, 127


@dataclass(frozen=True)
class RangeLimitedWinograd(WinogradScheme):
    """Samples in ±Q₀; transformed inputs never need clipping."""

    name: ClassVar[str] = "limited"
    has_transformed_weights: ClassVar[bool] = True

    @property
    def input_limit(self) -> int:
        return self.transform.safe_limit

    def weight_scale_shape(self, filters: int) -> tuple[int, ...]:
        return (1, filters, 1)  # of U [n, K, C]

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
        transformed = self.transformed(inputs, conv, counter)
        # Aᵀ with halves is multiplied by their denominator, and output_scale divided by it.
        output = as_tensor(self.transform.output, inputs) * self.denominator
        return apply_output(multiply(weights, transformed), output, length)

    def transformed(self, inputs: Tensor, conv: ConvSettings, counter: SaturationCounter | None) -> Tensor:
        """V [n, N, C, P], whole numbers in int8."""
        return straight_round(transform_input(inputs, self.transform, conv))

    @property
    def denominator(self) -> int:
        """The least common one of Aᵀ: a power of 2."""
        return math.lcm(*(x.denominator for row in self.transform.output for x in row))

    def output_scale(self, input_scale: Tensor, weight_scale: Tensor) -> Tensor:
        return super().output_scale(input_scale, weight_scale) / self.denominator

    def largest_sum(self, conv: ConvSettings, channels: int) -> int:
        row = math.ceil(self.transform.output_growth * self.denominator)
        return 128 * self.weight_limit * channels * row


@dataclass(frozen=True)
class RSQWinograd(RangeLimitedWinograd):
    """Scheme d: range-scaled quantisation, as we read it.

    After "INT8 Winograd Acceleration for Conv1D Equipped ASR Models Deployed on Mobile Devices" (Yao et al.
    2020, arXiv 2010.14841): RSQ training "expands the quantized numerical range and distils from
    high-precision values". The abstract gives no formula; this one is ours. The integer range of scheme c is
    enlarged by α ≥ 1, Q = min(127, floor(α · Q₀)), and transformed inputs are clipped to int8. α = 1 is
    scheme c.

    Raises:
        InputError: α is below 1 or not a number.
    """

    name: ClassVar[str] = "rsq"
    alpha: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 1 <= self.alpha < math.inf:
            raise InputError(f"alpha is {self.alpha}: give a number of at least 1")

    @property
    def input_limit(self) -> int:
        # Rounded first, so that α = Q / Q₀ gives Q in spite of the division's rounding.
        return min(127, math.floor(round(self.alpha * self.transform.safe_limit, 9)))

    def transformed(self, inputs: Tensor, conv: ConvSettings, counter: SaturationCounter | None) -> Tensor:
        whole = straight_round(transform_input(inputs, self.transform, conv))
        if counter is not None:
            counter.add((whole.detach() < INT8_LOW) | (whole.detach() > INT8_HIGH))
        return whole.clamp(INT8_LOW, INT8_HIGH)
