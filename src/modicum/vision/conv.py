"""Convolution blocks: inverted residuals, as in MobileNetV2, with the choices of DONNA's space.

Choices after DONNA (arXiv 2012.08859), as recalled of the paper: kernel 3, 5, 7; expansion 2, 3, 4, 6; depth
1 to 4; ReLU without attention, or Swish with squeeze-and-excitation; depthwise or grouped; width 1 or ½. That
the width is of all channels inside the block, whose inputs and outputs are fixed, is our reading.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, cast

from torch import Tensor, nn
from torch.nn import functional as F

from modicum.errors import InputError
from modicum.search.space import BlockSite, Variant

Activation = Literal["relu", "swish_se"]
Convolution = Literal["depthwise", "grouped"]
GROUP_CHANNELS = 8
"""Channels of a group of a grouped convolution."""
_SQUEEZE = 4


def rounded(channels: float) -> int:
    """The nearest multiple of 8 that is at least 8."""
    return max(8, int(channels + 4) // 8 * 8)


class SqueezeExcite(nn.Module):
    """Scales channels by a gate computed from their means (Hu et al. 2017, arXiv 1709.01507)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        hidden = max(4, channels // _SQUEEZE)
        self.reduce, self.expand = nn.Conv2d(channels, hidden, 1), nn.Conv2d(hidden, channels, 1)

    def forward(self, features: Tensor) -> Tensor:
        """[B, C, H, W] to the same."""
        gate = self.expand(F.silu(self.reduce(features.mean((2, 3), keepdim=True))))
        scaled: Tensor = features * gate.sigmoid()
        return scaled


class InvertedResidual(nn.Module):
    """1×1 to more channels, k×k of few channels each, 1×1 back; a residual where shapes allow it.

    Args:
        in_channels: of the input.
        out_channels: of the output.
        hidden: channels between.
        stride: of the k×k convolution.
        variant: kernel, activation and kind of convolution.
    """

    def __init__(
        self, in_channels: int, out_channels: int, hidden: int, stride: int, variant: ConvVariant
    ) -> None:
        super().__init__()
        is_swish = variant.activation == "swish_se"
        act = nn.SiLU if is_swish else nn.ReLU
        groups = hidden if variant.convolution == "depthwise" else hidden // GROUP_CHANNELS
        layers: list[nn.Module] = [
            nn.Conv2d(in_channels, hidden, 1, bias=False),
            nn.BatchNorm2d(hidden),
            act(),
            nn.Conv2d(hidden, hidden, variant.kernel, stride, variant.kernel // 2, groups=groups, bias=False),
            nn.BatchNorm2d(hidden),
            act(),
        ]
        if is_swish:
            layers.append(SqueezeExcite(hidden))
        layers += [nn.Conv2d(hidden, out_channels, 1, bias=False), nn.BatchNorm2d(out_channels)]
        self.layers = nn.Sequential(*layers)
        self.is_residual = stride == 1 and in_channels == out_channels

    def forward(self, features: Tensor) -> Tensor:
        """[B, C, H, W] to [B, C', H', W']."""
        found = cast(Tensor, self.layers(features))
        return features + found if self.is_residual else found


@dataclass(frozen=True)
class ConvVariant(Variant):
    """A row of inverted residuals; the first one has the block's stride.

    Attributes:
        kernel: of the k×k convolutions, odd.
        expansion: hidden channels as a multiple of the channels inside the block.
        depth: inverted residuals in a row.
        activation: "relu", or "swish_se": Swish with squeeze-and-excitation.
        convolution: "depthwise", or "grouped": groups of `GROUP_CHANNELS` channels.
        width: of the channels inside the block, as a share of its output's.

    Raises:
        InputError: a value is out of range.
    """

    kernel: int = 3
    expansion: int = 4
    depth: int = 2
    activation: Activation = "relu"
    convolution: Convolution = "depthwise"
    width: float = 1.0

    def __post_init__(self) -> None:
        if self.kernel < 1 or self.kernel % 2 == 0 or self.expansion < 1 or self.depth < 1:
            raise InputError(f"{self}: give an odd kernel, and expansion and depth of 1 or more")
        if not 0 < self.width <= 4:
            raise InputError(f"the width is {self.width}: give a share above 0, at most 4")
        if self.activation not in ("relu", "swish_se") or self.convolution not in ("depthwise", "grouped"):
            raise InputError(f"{self}: give relu or swish_se, and depthwise or grouped")

    @property
    def name(self) -> str:
        """Such as "k3e4d2-relu-depthwise-w100"."""
        kind = f"k{self.kernel}e{self.expansion}d{self.depth}"
        return f"{kind}-{self.activation}-{self.convolution}-w{round(self.width * 100)}"

    def build(self, site: BlockSite) -> nn.Module:
        """See `Variant`."""
        in_channels, out_channels, stride = conv_site(site)
        inner = rounded(self.width * out_channels)
        hidden = rounded(self.expansion * inner)
        widths = [in_channels, *[inner] * (self.depth - 1), out_channels]
        units = [
            InvertedResidual(a, b, hidden, stride if number == 0 else 1, self)
            for number, (a, b) in enumerate(itertools.pairwise(widths))
        ]
        return nn.Sequential(*units)


def conv_site(site: BlockSite) -> tuple[int, int, int]:
    """Input and output channels, and the stride.

    Raises:
        InputError: the shapes are not those of images, or no stride makes the one of the other.
    """
    before, after = site.input_shape, site.output_shape
    if len(before) == len(after) == 3:
        stride = round(before[1] / after[1])
        if stride >= 1 and all(-(-before[axis] // stride) == after[axis] for axis in (1, 2)):
            return before[0], after[0], stride
    raise InputError(
        f"block {site.number} turns {list(before)} into {list(after)}, which no convolution does with one "
        "stride: give a reference whose blocks keep or divide height and width alike"
    )


@dataclass(frozen=True)
class ConvSpaceSettings:
    """Which values the variants of each block have; all combinations of them. The default is the paper's.

    Raises:
        InputError: a list is empty.
    """

    kernels: Sequence[int] = (3, 5, 7)
    expansions: Sequence[int] = (2, 3, 4, 6)
    depths: Sequence[int] = (1, 2, 3, 4)
    activations: Sequence[Activation] = ("relu", "swish_se")
    convolutions: Sequence[Convolution] = ("depthwise", "grouped")
    widths: Sequence[float] = (1.0, 0.5)

    def __post_init__(self) -> None:
        if not all(
            (self.kernels, self.expansions, self.depths, self.activations, self.convolutions, self.widths)
        ):
            raise InputError(f"{self}: give each setting at least one value")

    def variants(self) -> list[ConvVariant]:
        """All combinations."""
        return [
            ConvVariant(*values)
            for values in itertools.product(
                self.kernels,
                self.expansions,
                self.depths,
                self.activations,
                self.convolutions,
                self.widths,
            )
        ]


CONV_SPACES = {
    "tiny": ConvSpaceSettings((3,), (2, 4), (1, 2), ("relu",), ("depthwise",), (1.0,)),
    "small": ConvSpaceSettings((3, 5), (2, 4), (1, 2), ("relu", "swish_se"), ("depthwise",), (1.0,)),
    "medium": ConvSpaceSettings((3, 5), (2, 4), (1, 2), ("relu", "swish_se"), ("depthwise", "grouped")),
    "full": ConvSpaceSettings(),
}
"""Spaces by name: 4, 16, 64 and 384 variants of a block."""
