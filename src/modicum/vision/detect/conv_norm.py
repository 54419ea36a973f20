"""ConvNorm: a convolution, batch normalisation and ReLU, between two named channel groups.

A channel group is a set of feature maps that must have the same channels: those that are added to each other,
the input and output of a depthwise convolution. Networks here are built from the number of channels of each
group, which is all that pruning changes of them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

IMAGE = "image"
"""The group of the network's input: 3 channels."""

Channels = Mapping[str, int]
"""Channels of each group, by name."""


@dataclass(frozen=True)
class ConvShape:
    """What a convolution has besides channels.

    Attributes:
        kernel: taps on each axis, odd; padded by half of them.
        stride: of both axes.
        is_depthwise: each output channel sees its own input channel only.
        has_relu: whether ReLU follows the norm.
    """

    kernel: int = 1
    stride: int = 1
    is_depthwise: bool = False
    has_relu: bool = True


class ConvNorm(nn.Module):
    """A convolution without bias, batch normalisation, and ReLU where the shape says so.

    Args:
        channels: of all groups.
        inputs, outputs: names of the groups.
        shape: of the convolution.
    """

    norm: nn.Module

    def __init__(self, channels: Channels, inputs: str, outputs: str, shape: ConvShape) -> None:
        super().__init__()
        self.inputs, self.outputs, self.shape = inputs, outputs, shape
        width = channels_of(channels, inputs)
        self.conv = nn.Conv2d(
            width,
            channels_of(channels, outputs),
            shape.kernel,
            shape.stride,
            shape.kernel // 2,
            groups=width if shape.is_depthwise else 1,
            bias=False,
        )
        self.norm = nn.BatchNorm2d(self.conv.out_channels)
        self.act = nn.ReLU() if shape.has_relu else nn.Identity()
        # torch counts a depthwise convolution's outputs as if each channel had them all.
        mode: Literal["fan_in", "fan_out"] = "fan_in" if shape.is_depthwise else "fan_out"
        nn.init.kaiming_normal_(self.conv.weight, mode=mode, nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, H, W] -> [B, K, ⌈H / stride⌉, ⌈W / stride⌉]."""
        out: Tensor = self.act(self.norm(self.conv(x)))
        return out

    @torch.no_grad()
    def fold(self) -> None:
        """Absorb the norm into weights and a bias: the outputs of evaluation mode, but for rounding."""
        norm = self.norm
        if not isinstance(norm, nn.BatchNorm2d):
            return
        assert norm.running_mean is not None
        assert norm.running_var is not None
        factor = norm.weight / (norm.running_var + norm.eps).sqrt()
        self.conv.weight.mul_(factor[:, None, None, None])
        self.conv.bias = nn.Parameter(norm.bias - norm.running_mean * factor)
        self.norm = nn.Identity()


def channels_of(channels: Channels, group: str) -> int:
    """Channels of a group; 3 of the image."""
    return 3 if group == IMAGE else channels[group]


def fold_norms(network: nn.Module) -> None:
    """Fold the norm of every `ConvNorm` of a network, in place."""
    for module in network.modules():
        if isinstance(module, ConvNorm):
            module.fold()
