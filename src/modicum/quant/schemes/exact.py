"""Scheme a: int8 samples, exact integer transforms in 16 bits.

Samples and weights are quantised as in direct int8, and transformed in whole numbers. The sums are exactly
those of direct convolution. ncnn does so in two dimensions (convolution_3x3_winograd_int8.h), with weights of
6 bits for F(4, 3). Products are of 16-bit numbers, so it needs twice the multiplications of int8 products.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from modicum.errors import InputError
from modicum.quant.convolution import (
    ConvSettings,
    apply_filter,
    apply_input,
    apply_output,
    input_tiles,
    multiply,
)
from modicum.quant.saturation import SaturationCounter
from modicum.quant.schemes.base import WinogradScheme
from modicum.quant.transform import as_tensor

INT16, INT32 = 2**15 - 1, 2**31 - 1


@dataclass(frozen=True)
class ExactWinograd(WinogradScheme):
    """Exact transform in the int16 domain; sums equal those of direct int8."""

    name: ClassVar[str] = "exact"

    def check(self, conv: ConvSettings, channels: int) -> None:
        super().check(conv, channels)
        inputs, weights = self.largest_input, self.largest_weight
        if inputs > INT16 or weights > INT16 or inputs * weights * channels > INT32:
            raise InputError(
                f"{self} with weights of ±{self.weight_limit} and {channels} channels has transformed inputs "
                f"up to {inputs:,}, weights up to {weights:,} and sums up to "
                f"{inputs * weights * channels:,}, past 16 or 32 bits: lower the weights' limit, the "
                "channels or the tile"
            )

    @property
    def largest_input(self) -> int:
        """The largest |Bᵀ q|."""
        return self.input_limit * max(sum(map(abs, row)) for row in self.transform.integral.input)

    @property
    def largest_weight(self) -> int:
        """The largest |G p|."""
        return self.weight_limit * max(sum(map(abs, row)) for row in self.transform.integral.filter)

    def sums(
        self,
        inputs: Tensor,
        weights: Tensor,
        conv: ConvSettings,
        length: int,
        counter: SaturationCounter | None = None,
    ) -> Tensor:
        integral = self.transform.integral
        tiles = apply_input(input_tiles(inputs, self.transform, conv), as_tensor(integral.input, inputs))
        filters = apply_filter(weights, as_tensor(integral.filter, weights))
        whole = apply_output(multiply(filters, tiles), as_tensor(integral.output, inputs), length)
        return whole / integral.divisor  # exact: the divisor divides each sum

    def largest_sum(self, conv: ConvSettings, channels: int) -> int:
        row = max(sum(map(abs, row)) for row in self.transform.integral.output)
        return self.largest_input * self.largest_weight * channels * row
