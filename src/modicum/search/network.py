"""Networks made of blocks: a stem, blocks in a row, a head."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor, nn


class BlockNetwork(nn.Module):
    """stem, then each block, then head.

    Args:
        stem: from inputs to the first block's input.
        blocks: each from the output of the one before; any module of one tensor.
        head: from the last block's output to logits [B, C].
    """

    def __init__(self, stem: nn.Module, blocks: Sequence[nn.Module], head: nn.Module) -> None:
        super().__init__()
        self.stem, self.blocks, self.head = stem, nn.ModuleList(blocks), head

    def forward(self, inputs: Tensor) -> Tensor:
        """Logits [B, C]."""
        return cast(Tensor, self.head(self.features(inputs, len(self.blocks))))

    def features(self, inputs: Tensor, block: int) -> Tensor:
        """What enters a block; of the number of blocks, what enters the head."""
        state = self.stem(inputs)
        for one in self.blocks[:block]:
            state = one(state)
        return cast(Tensor, state)


def fingerprint(network: nn.Module) -> str:
    """16 digits of a digest of all weights and buffers, with their names and shapes."""
    digest = hashlib.sha256()
    for name, value in sorted(network.state_dict().items()):
        digest.update(f"{name} {tuple(value.shape)} {value.dtype}".encode())
        digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]


def is_finite(network: nn.Module) -> bool:
    """Whether every weight and buffer is a finite number."""
    return all(bool(value.isfinite().all()) for value in network.state_dict().values())
