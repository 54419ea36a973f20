"""Tiny networks of blocks for tests."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from modicum.search.batchnorm import reset_statistics
from modicum.search.network import BlockNetwork
from modicum.search.space import BlockSite, Variant

CHANNELS = 4


@dataclass(frozen=True)
class Conv(Variant):
    """A convolution with batch normalisation."""

    kernel: int = 3
    channels: int = CHANNELS
    scale: float = 1.0

    @property
    def name(self) -> str:
        return f"k{self.kernel}-c{self.channels}-s{self.scale:g}"

    def build(self, site: BlockSite) -> nn.Module:
        conv = nn.Conv2d(site.input_shape[0], self.channels, self.kernel, padding=self.kernel // 2)
        with torch.no_grad():
            conv.weight.mul_(self.scale)
        return nn.Sequential(conv, nn.BatchNorm2d(self.channels))


def network(blocks: int = 2, seed: int = 0) -> BlockNetwork:
    """Images [B, 3, 6, 6] to 3 logits."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        stem = nn.Conv2d(3, CHANNELS, 1)
        own = [
            nn.Sequential(nn.Conv2d(CHANNELS, CHANNELS, 3, padding=1), nn.ReLU(), nn.BatchNorm2d(CHANNELS))
            for _ in range(blocks)
        ]
        head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(CHANNELS, 3))
        found = BlockNetwork(stem, own, head).eval()
        # Features of variance 1, as a trained network has them.
        reset_statistics(found, [inputs()])
        return found


def inputs(count: int = 48, seed: int = 1) -> Tensor:
    return torch.randn(count, 3, 6, 6, generator=torch.Generator().manual_seed(seed))
