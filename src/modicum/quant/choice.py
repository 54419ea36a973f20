"""Choice of the scheme of each layer by the latency oracle."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from modicum.errors import InputError
from modicum.measure import LatencyOracle, Operation
from modicum.quant.convolution import ConvSettings
from modicum.quant.integer_conv import IntegerConv1d
from modicum.quant.native import digest, native_kernels
from modicum.quant.schemes import DirectInt8, RangeLimitedWinograd, Scheme, WinogradScheme
from modicum.quant.transform import KERNEL_TILE

LENGTH = 400
"""Steps that layers are timed with where nobody says how many there are: 4 seconds of frames of 10 ms."""


@dataclass(frozen=True)
class Conv1dShape:
    """A convolution of one sequence, padded to its own length.

    Attributes:
        channels: C.
        filters: K.
        length: T.
        taps: r.

    Raises:
        InputError: a number is below 1.
    """

    channels: int
    filters: int
    length: int = LENGTH
    taps: int = 3

    def __post_init__(self) -> None:
        if min(self.channels, self.filters, self.length, self.taps) < 1:
            raise InputError(f"{self}: give numbers of at least 1")


def conv1d_oracle() -> LatencyOracle[Conv1dShape]:
    """Times direct int8 (the default) and Winograd F(2, 3), from float32 input to float32 output."""
    kernels = native_kernels()
    name = "torch" if kernels is None else kernels.name
    candidates = {"direct": _direct, "winograd": _winograd}
    return LatencyOracle(Operation("conv1d_int8", candidates, f"{digest()}-{name}"))


def fastest(
    length: int = LENGTH, oracle: LatencyOracle[Conv1dShape] | None = None
) -> Callable[[str, nn.Conv1d, Scheme], Scheme]:
    """For `quantize_model`: the scheme as it is where F(2, 3) is faster on this machine, else direct int8.

    Schemes other than `limited` and `rsq` with F(2, 3) have no kernel here, and become direct.

    Args:
        length: T that the layers are used with.
    """
    measured = oracle or conv1d_oracle()

    def choose(name: str, conv: nn.Conv1d, scheme: Scheme) -> Scheme:
        if not isinstance(scheme, WinogradScheme):
            return scheme
        is_served = isinstance(scheme, RangeLimitedWinograd) and (scheme.outputs, scheme.taps) == KERNEL_TILE
        shape = Conv1dShape(conv.in_channels, conv.out_channels, length)
        if is_served and measured.choose(shape) == "winograd":
            return scheme
        return DirectInt8()

    return choose


def _direct(shape: Conv1dShape) -> Callable[[], Tensor]:
    return _runner(shape, DirectInt8(), (shape.filters, shape.channels, shape.taps), (shape.filters, 1, 1))


def _winograd(shape: Conv1dShape) -> Callable[[], Tensor]:
    scheme = RangeLimitedWinograd()
    return _runner(shape, scheme, (4, shape.filters, shape.channels), (1, shape.filters, 1))


def _runner(
    shape: Conv1dShape, scheme: Scheme, weights: tuple[int, ...], scales: tuple[int, ...]
) -> Callable[[], Tensor]:
    left = (shape.taps - 1) // 2
    conv = ConvSettings(shape.taps, (left, shape.taps - 1 - left))
    generator = torch.Generator().manual_seed(0)
    whole = torch.randint(-127, 128, weights, generator=generator, dtype=torch.int8)
    layer = IntegerConv1d(scheme, conv, whole, (torch.tensor(0.01), torch.full(scales, 0.01)), None)
    x = torch.randn(1, shape.channels, shape.length, generator=generator)
    return lambda: layer(x)
