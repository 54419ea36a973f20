"""MobileNet: depthwise-separable convolutions (Howard et al. 2017, arXiv 1704.04861, table 1)."""

from __future__ import annotations

from torch import Tensor, nn

from modicum.vision.detect.backbone import Backbone, scaled
from modicum.vision.detect.conv_norm import IMAGE, Channels, ConvNorm, ConvShape

_WIDTHS = (32, 64, 128, 128, 256, 256)
_MIDDLE = 512
_LAST = (1024, 1024)


class MobileNet(Backbone):
    """MobileNet v1 whose maps at strides 8, 16 and 32 are given out.

    Args:
        channels: of all groups.
        blocks: one number, the blocks of 512 channels at stride 16; 6 in the paper.
    """

    num_stages = 1

    def __init__(self, channels: Channels, blocks: tuple[int, ...]) -> None:
        super().__init__(channels, blocks)
        widths = _widths(blocks)
        last = len(widths) - 1
        strides = [2, 1, 2, 1, 2, 1, 2, *[1] * (blocks[0] - 1), 2, 1]
        layers: list[nn.Module] = [ConvNorm(channels, IMAGE, "block.0", ConvShape(3, 2))]
        for number in range(1, len(widths)):
            before, after = f"block.{number - 1}", f"block.{number}"
            layers.append(
                nn.Sequential(
                    ConvNorm(channels, before, before, ConvShape(3, strides[number], is_depthwise=True)),
                    ConvNorm(channels, before, after, ConvShape(1)),
                )
            )
        self.layers = nn.ModuleList(layers)
        self._tapped = (5, 5 + blocks[0], last)
        self.taps = tuple(f"block.{number}" for number in self._tapped)

    def forward(self, x: Tensor) -> list[Tensor]:
        """Maps at strides 8, 16 and 32, of images [B, 3, H, W]."""
        maps = []
        for number, layer in enumerate(self.layers):
            x = layer(x)
            if number in self._tapped:
                maps.append(x)
        return maps

    @staticmethod
    def channels(width: float, blocks: tuple[int, ...]) -> dict[str, int]:
        """Of all groups at a share of the paper's width."""
        return {f"block.{number}": scaled(usual, width) for number, usual in enumerate(_widths(blocks))}


def _widths(blocks: tuple[int, ...]) -> list[int]:
    return [*_WIDTHS, *[_MIDDLE] * blocks[0], *_LAST]
