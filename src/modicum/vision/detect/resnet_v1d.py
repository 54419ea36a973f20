"""ResNet-v1d: bottleneck residual networks with GluonCV's changes "D" (He et al. 2018, arXiv 1812.01187).

Three 3 × 3 convolutions in the stem, the stride in a bottleneck's 3 × 3 convolution, and shortcuts that
average 2 × 2 cells before their 1 × 1 convolution.
"""

from __future__ import annotations

from torch import Tensor, nn

from modicum.vision.detect.backbone import Backbone, scaled
from modicum.vision.detect.conv_norm import IMAGE, Channels, ConvNorm, ConvShape

_STEM = (32, 32, 64)
_STAGES = (64, 128, 256, 512)
_EXPANSION = 4


class Bottleneck(nn.Module):
    """1 × 1, 3 × 3 with the stride, 1 × 1, added to a shortcut.

    Args:
        channels: of all groups.
        inputs, outputs: names of the groups before and after.
        name: of the block: its inner groups are `name`.0 and `name`.1.
        stride: 1 or 2.
    """

    def __init__(self, channels: Channels, inputs: str, outputs: str, name: str, stride: int) -> None:
        super().__init__()
        self.reduce = ConvNorm(channels, inputs, f"{name}.0", ConvShape(1))
        self.spatial = ConvNorm(channels, f"{name}.0", f"{name}.1", ConvShape(3, stride))
        self.expand = ConvNorm(channels, f"{name}.1", outputs, ConvShape(1, has_relu=False))
        self.pool = nn.AvgPool2d(2) if stride == 2 else nn.Identity()
        self.shortcut: nn.Module = nn.Identity()
        if inputs != outputs:
            self.shortcut = ConvNorm(channels, inputs, outputs, ConvShape(1, has_relu=False))
        self.act = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, H, W] -> [B, K, H / stride, W / stride]."""
        out: Tensor = self.act(self.expand(self.spatial(self.reduce(x))) + self.shortcut(self.pool(x)))
        return out


class ResNetV1d(Backbone):
    """A ResNet-v1d whose maps at strides 8, 16 and 32 are given out.

    Args:
        channels: of all groups.
        blocks: bottlenecks of each of the 4 stages.
    """

    num_stages = 4

    def __init__(self, channels: Channels, blocks: tuple[int, ...]) -> None:
        super().__init__(channels, blocks)
        self.stem = nn.Sequential(
            ConvNorm(channels, IMAGE, "stem.0", ConvShape(3, 2)),
            ConvNorm(channels, "stem.0", "stem.1", ConvShape(3)),
            ConvNorm(channels, "stem.1", "stem.2", ConvShape(3)),
            nn.MaxPool2d(3, 2, 1),
        )
        self.stages = nn.ModuleList()
        inputs = "stem.2"
        for stage, count in enumerate(blocks):
            outputs, made = f"stage{stage}", []
            for block in range(count):
                stride = 2 if stage and not block else 1
                made.append(Bottleneck(channels, inputs, outputs, f"{outputs}.{block}", stride))
                inputs = outputs
            self.stages.append(nn.Sequential(*made))
        self.taps = ("stage1", "stage2", "stage3")

    def forward(self, x: Tensor) -> list[Tensor]:
        """Maps at strides 8, 16 and 32, of images [B, 3, H, W]."""
        x = self.stem(x)
        maps = []
        for stage in self.stages:
            x = stage(x)
            maps.append(x)
        return maps[1:]

    @staticmethod
    def channels(width: float, blocks: tuple[int, ...]) -> dict[str, int]:
        """Of all groups at a share of the usual width."""
        found = {f"stem.{number}": scaled(usual, width) for number, usual in enumerate(_STEM)}
        for stage, count in enumerate(blocks):
            inner = scaled(_STAGES[stage], width)
            found[f"stage{stage}"] = scaled(_EXPANSION * _STAGES[stage], width)
            for block in range(count):
                found |= {f"stage{stage}.{block}.0": inner, f"stage{stage}.{block}.1": inner}
        return found
