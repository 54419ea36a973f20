"""SSD: a single-shot detector (Liu et al. 2016, arXiv 1512.02325), with heads of one inner layer.

The published SSD predicts by one 3 × 3 convolution of each map. Ours has a 3 × 3 `ConvNorm` and two 1 × 1
convolutions, of classes and of boxes, so that a head has inner channels that can be deleted.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn

from modicum.vision.detect.anchors import make_anchors
from modicum.vision.detect.backbone import STRIDES
from modicum.vision.detect.box_coding import decode_boxes
from modicum.vision.detect.conv_norm import Channels, ConvNorm, ConvShape
from modicum.vision.detect.ssd_settings import SSDSettings

_MEAN, _SCALE = 127.5, 64.0
_RARE = 0.01
"""The probability of all classes together that an untrained network gives, so that training begins calmly."""


@dataclass(frozen=True)
class Outputs:
    """What the network gives for a batch.

    Attributes:
        logits: [B, A, K + 1], background first.
        offsets: [B, A, 4], coded boxes.
        features: the maps, finest first, each [B, C, H, W].
    """

    logits: Tensor
    offsets: Tensor
    features: list[Tensor]


class Extra(nn.Module):
    """A feature layer of half the resolution: 1 × 1, then 3 × 3 with stride 2."""

    def __init__(self, channels: Channels, inputs: str, name: str) -> None:
        super().__init__()
        self.reduce = ConvNorm(channels, inputs, f"{name}.inner", ConvShape(1))
        self.spatial = ConvNorm(channels, f"{name}.inner", name, ConvShape(3, 2))

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, H, W] -> [B, K, ⌈H / 2⌉, ⌈W / 2⌉]."""
        out: Tensor = self.spatial(self.reduce(x))
        return out


class Head(nn.Module):
    """Classes and offsets at each cell of a map."""

    def __init__(
        self, channels: Channels, inputs: str, name: str, num_anchors: int, num_classes: int
    ) -> None:
        super().__init__()
        self.inner = ConvNorm(channels, inputs, name, ConvShape(3))
        self.classes = nn.Conv2d(channels[name], num_anchors * (num_classes + 1), 1)
        self.boxes = nn.Conv2d(channels[name], num_anchors * 4, 1)
        for conv in (self.classes, self.boxes):
            nn.init.normal_(conv.weight, std=0.01)
            nn.init.zeros_(cast(Tensor, conv.bias))
        with torch.no_grad():
            bias = cast(Tensor, self.classes.bias).view(num_anchors, num_classes + 1)
            bias[:, 0] = math.log((1 - _RARE) / _RARE * num_classes)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """[B, C, H, W] -> [B, A · (K + 1), H, W] and [B, A · 4, H, W]."""
        x = self.inner(x)
        return self.classes(x), self.boxes(x)


class SSD(nn.Module):
    """The network of a record, with random weights.

    Args:
        settings: the record.
    """

    anchors: Tensor

    def __init__(self, settings: SSDSettings) -> None:
        super().__init__()
        self.settings = settings
        channels = settings.channels
        self.backbone = settings.backbone.build(channels)
        taps = list(self.backbone.taps)
        self.extras = nn.ModuleList()
        for number in range(settings.num_extras):
            self.extras.append(Extra(channels, taps[-1], f"extra{number}"))
            taps.append(f"extra{number}")
        self.taps = tuple(taps)
        per_cell, num_classes = settings.anchors.num_per_cell, len(settings.classes)
        self.heads = nn.ModuleList(
            Head(channels, tap, f"head{level}", per_cell, num_classes) for level, tap in enumerate(taps)
        )
        strides = [*STRIDES, *(STRIDES[-1] * 2 ** (n + 1) for n in range(settings.num_extras))]
        # ⌈side / stride⌉ is also what repeated halving with rounding up gives.
        self.map_sizes = [(-(-settings.height // s), -(-settings.width // s)) for s in strides]
        with torch.device("cpu"):
            anchors = make_anchors(settings.anchors, self.map_sizes, strides)
        self.register_buffer("anchors", anchors, persistent=False)

    def features(self, images: Tensor) -> list[Tensor]:
        """Maps, finest first, of images [B, 3, H, W] in RGB, 0 to 255, of any dtype."""
        x = (images.to(self.anchors.dtype) - _MEAN) / _SCALE
        # Convolutions of few channels are faster on a CPU in this order, which all maps then have.
        maps = self.backbone(x.contiguous(memory_format=torch.channels_last))
        for extra in self.extras:
            maps.append(extra(maps[-1]))
        return cast(list[Tensor], maps)

    def raw_outputs(self, images: Tensor) -> list[Tensor]:
        """Each head's two outputs, as convolutions give them."""
        return [out for head, x in zip(self.heads, self.features(images), strict=True) for out in head(x)]

    def forward(self, images: Tensor) -> Outputs:
        """Of images [B, 3, H, W] in RGB, 0 to 255, of any dtype."""
        features = self.features(images)
        logits, offsets = [], []
        for head, x in zip(self.heads, features, strict=True):
            classes, boxes = head(x)
            logits.append(_by_anchor(classes, len(self.settings.classes) + 1))
            offsets.append(_by_anchor(boxes, 4))
        return Outputs(torch.cat(logits, 1), torch.cat(offsets, 1), features)

    def boxes_and_scores(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Boxes [B, A, 4] as corners in pixels of the input, and scores [B, A, K] of the classes."""
        outputs = self(images)
        return decode_boxes(outputs.offsets, self.anchors), outputs.logits.softmax(-1)[..., 1:]

    @property
    def num_parameters(self) -> int:
        """Weights and biases."""
        return sum(parameter.numel() for parameter in self.parameters())


def _by_anchor(x: Tensor, size: int) -> Tensor:
    """[B, A · size, H, W] -> [B, H · W · A, size]: cells by row, then anchors of a cell."""
    return x.permute(0, 2, 3, 1).reshape(x.shape[0], -1, size)
