"""Reference networks for images: residual, MobileNetV2-like, and a vision transformer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from modicum.errors import InputError
from modicum.search.network import BlockNetwork
from modicum.search.space import BlockSite
from modicum.vision.conv import ConvVariant, rounded
from modicum.vision.transformer import PatchStem, TokenHead, TransformerVariant

Kind = Literal["residual", "mobilenetv2", "vit"]
_KINDS = ("residual", "mobilenetv2", "vit")


@dataclass(frozen=True)
class ReferenceSettings:
    """A reference network.

    Attributes:
        kind: "residual" (two 3×3 convolutions and a skip, as in ResNet), "mobilenetv2" (inverted residuals),
            or "vit" (attention over patches).
        channels: of each block's output; of a vit all are the first one.
        strides: of each block.
        depth: residual units or layers of a block.
        expansion: of hidden channels, in mobilenetv2 and vit.
        stem_channels: of the convolution before the first block.
        stem_stride: its stride; of a vit the side of a patch.
        heads: of attention, in vit.
        size: side of the images.

    Raises:
        InputError: a value is out of range.
    """

    kind: Kind = "residual"
    channels: Sequence[int] = (24, 32, 48, 64)
    strides: Sequence[int] = (1, 2, 1, 2)
    depth: int = 2
    expansion: int = 4
    stem_channels: int = 16
    stem_stride: int = 2
    heads: int = 4
    size: int = 32

    def __post_init__(self) -> None:
        if self.kind not in _KINDS:
            raise InputError(f"the reference is {self.kind!r}: give one of {', '.join(_KINDS)}")
        if not self.channels or len(self.channels) != len(self.strides):
            raise InputError(
                f"there are {len(self.channels)} channels and {len(self.strides)} strides: give one of each "
                "for every block"
            )
        for name in ("channels", "strides"):
            if min(getattr(self, name)) < 1:
                raise InputError(f"{name} are {list(getattr(self, name))}: give whole numbers from 1")
        for name in ("depth", "expansion", "stem_channels", "stem_stride", "heads", "size"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} is {getattr(self, name)}: give a whole number from 1")
        if self.kind == "vit" and (self.size % self.stem_stride or self.channels[0] % self.heads):
            raise InputError(
                f"patches of {self.stem_stride} do not tile an image of {self.size}, or {self.heads} heads "
                f"do not divide tokens of {self.channels[0]}"
            )

    @classmethod
    def from_dict(cls, told: dict[str, Any]) -> ReferenceSettings:
        """Of `to_dict`.

        Raises:
            InputError: a name is not known.
        """
        try:
            values: dict[str, Any] = {key: tuple(v) if isinstance(v, list) else v for key, v in told.items()}
            return cls(**values)
        except TypeError as error:
            raise InputError(f"a reference has no such settings ({error})") from error

    def to_dict(self) -> dict[str, Any]:
        """As JSON takes it."""
        return asdict(self)

    @property
    def example(self) -> Tensor:
        """An image [1, 3, S, S] of zeros."""
        return torch.zeros(1, 3, self.size, self.size)

    def build(self, num_classes: int) -> BlockNetwork:
        """A network with fresh weights (from torch's global generator)."""
        if self.kind == "vit":
            width = self.channels[0]
            tokens = (self.size // self.stem_stride) ** 2
            layer = TransformerVariant(self.depth, self.heads, float(self.expansion))
            sites = [BlockSite(n, (tokens, width), (tokens, width)) for n in range(len(self.channels))]
            blocks = [layer.build(site) for site in sites]
            return BlockNetwork(
                PatchStem(self.size, self.stem_stride, width), blocks, TokenHead(width, num_classes)
            )
        side = -(-self.size // self.stem_stride)
        blocks, before = [], self.stem_channels
        for number, (channels, stride) in enumerate(zip(self.channels, self.strides, strict=True)):
            after = -(-side // stride)
            site = BlockSite(number, (before, side, side), (channels, after, after))
            blocks.append(self._block(site, stride))
            before, side = channels, after
        return BlockNetwork(
            _stem(self.stem_channels, self.stem_stride), blocks, self._head(before, num_classes)
        )

    def _block(self, site: BlockSite, stride: int) -> nn.Module:
        if self.kind == "mobilenetv2":
            return ConvVariant(3, self.expansion, self.depth).build(site)
        channels = site.output_shape[0]
        units = [ResidualUnit(site.input_shape[0], channels, stride)]
        units += [ResidualUnit(channels, channels, 1) for _ in range(self.depth - 1)]
        return nn.Sequential(*units)

    def _head(self, channels: int, num_classes: int) -> nn.Module:
        hidden = channels
        layers: list[nn.Module] = []
        if self.kind == "mobilenetv2":
            hidden = rounded(4 * channels)
            layers = [nn.Conv2d(channels, hidden, 1, bias=False), nn.BatchNorm2d(hidden), nn.ReLU()]
        return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(hidden, num_classes))


class ResidualUnit(nn.Module):
    """Two 3×3 convolutions with a skip (He et al. 2015, arXiv 1512.03385)."""

    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(in_channels, out_channels, 3, stride, 1, bias=False),
            nn.BatchNorm2d(out_channels),
            nn.ReLU(),
            nn.Conv2d(out_channels, out_channels, 3, 1, 1, bias=False),
            nn.BatchNorm2d(out_channels),
        )
        self.skip = (
            nn.Identity()
            if stride == 1 and in_channels == out_channels
            else nn.Sequential(
                nn.Conv2d(in_channels, out_channels, 1, stride, bias=False), nn.BatchNorm2d(out_channels)
            )
        )

    def forward(self, features: Tensor) -> Tensor:
        """[B, C, H, W] to [B, C', H', W']."""
        return F.relu(cast(Tensor, self.layers(features)) + self.skip(features))


def _stem(channels: int, stride: int) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, channels, 3, stride, 1, bias=False), nn.BatchNorm2d(channels), nn.ReLU()
    )
