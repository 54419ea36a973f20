"""What a scheme of quantised convolution is.

A layer quantises its input and its weights to integers, sums products exactly, and scales the sums. A scheme
says what is quantised (samples or transformed tiles), with which scales, and how integers are summed. It
holds no tensors and works on integers stored in any floating dtype: the training form gives it rounded
numbers with gradients, the inference form integers.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from modicum.errors import InputError
from modicum.quant.convolution import ConvSettings, check_plain
from modicum.quant.saturation import SaturationCounter
from modicum.quant.transform import WinogradTransform, winograd_transform


@dataclass(frozen=True)
class Scheme:
    """Quantised convolution.

    Attributes:
        weight_limit: Q of the weights.

    Raises:
        InputError: the limit is not a whole number of 1 to 127.
    """

    name: ClassVar[str]
    channel_axis: ClassVar[int] = -2
    """Of `prepare_weight`'s result; the axis of filters stands before it."""
    weight_limit: int = 127

    def __post_init__(self) -> None:
        limit = self.weight_limit
        if not isinstance(limit, int) or isinstance(limit, bool) or not 1 <= limit <= 127:
            raise InputError(f"the weights' limit is {limit}: give a whole number of 1 to 127")

    def check(self, conv: ConvSettings, channels: int) -> None:
        """Raise unless it can compute such a convolution.

        Raises:
            InputError: it cannot.
        """

    @property
    def input_limit(self) -> int:
        """Q of the input."""
        return 127

    @property
    def input_scale_shape(self) -> tuple[int, ...]:
        """Of the scale of `prepare_input`'s result."""
        return ()

    def weight_scale_shape(self, filters: int) -> tuple[int, ...]:
        """Of the scale of `prepare_weight`'s result, for K filters."""
        return (filters, 1, 1)

    def prepare_input(self, x: Tensor, conv: ConvSettings) -> Tensor:
        """What is quantised of the input x [N, C, T]."""
        return x

    def prepare_weight(self, weight: Tensor) -> Tensor:
        """What is quantised of the weights [K, C, r]."""
        return weight

    def sums(
        self,
        inputs: Tensor,
        weights: Tensor,
        conv: ConvSettings,
        length: int,
        counter: SaturationCounter | None = None,
    ) -> Tensor:
        """Sums of products, whole numbers.

        Args:
            inputs: `prepare_input`'s result in whole numbers, a floating dtype.
            weights: `prepare_weight`'s result in whole numbers, a floating dtype.
            length: T_out.
            counter: counts what is clipped on the way.
        """
        raise NotImplementedError

    def output_scale(self, input_scale: Tensor, weight_scale: Tensor) -> Tensor:
        """By what the sums are multiplied; broadcasts to them."""
        return input_scale * weight_scale.reshape(-1, 1)  # [K, 1], sums [N, K, T_out]

    def finish(self, scaled: Tensor, length: int) -> Tensor:
        """Scaled sums to outputs [N, K, T_out]."""
        return scaled

    def largest_sum(self, conv: ConvSettings, channels: int) -> int:
        """A bound of everything that is summed up: tells whether float32 holds it exactly."""
        return self.input_limit * self.weight_limit * channels * conv.taps


@dataclass(frozen=True)
class WinogradScheme(Scheme):
    """A scheme with a transform F(outputs, taps)."""

    outputs: int = 2
    taps: int = 3

    def __post_init__(self) -> None:
        super().__post_init__()
        winograd_transform(self.outputs, self.taps)

    @property
    def transform(self) -> WinogradTransform:
        """F(outputs, taps)."""
        return winograd_transform(self.outputs, self.taps)

    def check(self, conv: ConvSettings, channels: int) -> None:
        check_plain(self.transform, conv)

    def __str__(self) -> str:
        return f"{self.name} {self.transform}"
