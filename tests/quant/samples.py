"""Samples that the tests of quantisation share."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from modicum.quant.native import NativeKernels, native_kernels
from modicum.quant.schemes import (
    DirectInt8,
    ExactWinograd,
    RangeLimitedWinograd,
    RSQWinograd,
    Scheme,
    TapwiseWinograd,
)
from modicum.quant.transform import TILES


def laplace(generator: torch.Generator, *shape: int) -> Tensor:
    u = torch.rand(*shape, generator=generator) - 0.5
    return -u.sign() * torch.log1p(-2 * u.abs())


def integers(generator: torch.Generator, limit: int, *shape: int) -> Tensor:
    """int8, from -limit to limit."""
    return torch.randint(-limit, limit + 1, shape, generator=generator, dtype=torch.int8)


def layer(seed: int = 0, channels: int = 5, filters: int = 4, taps: int = 3, padding: int = 1) -> nn.Conv1d:
    generator = torch.Generator().manual_seed(seed)
    conv = nn.Conv1d(channels, filters, taps, padding=padding)
    with torch.no_grad():
        conv.weight.copy_(laplace(generator, *conv.weight.shape))
        assert conv.bias is not None
        conv.bias.copy_(laplace(generator, filters))
    return conv


def schemes(outputs: int, taps: int) -> list[Scheme]:
    """All schemes with one tile."""
    return [
        DirectInt8(),
        ExactWinograd(31, outputs, taps),
        RangeLimitedWinograd(127, outputs, taps),
        RSQWinograd(127, outputs, taps, alpha=1.7),
        TapwiseWinograd(127, outputs, taps),
        TapwiseWinograd(127, outputs, taps, is_per_tap=False),
    ]


EVERY = [
    pytest.param(scheme, id=f"{scheme}-{i}") for tile in TILES for i, scheme in enumerate(schemes(*tile))
]


def kernels_or_skip() -> NativeKernels:
    found = native_kernels()
    if found is None:
        pytest.skip("needs a C++ compiler and ninja, to build the int8 kernels")
    return found
