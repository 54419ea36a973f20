"""Vision transformer blocks: the second space, with attention or without it.

After the extension to vision transformers that DONNA (arXiv 2012.08859) mentions, as recalled of the paper;
the choices are ours.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from modicum.errors import InputError
from modicum.search.space import BlockSite, Variant


class SelfAttention(nn.Module):
    """Multi-head attention of all tokens to all.

    Args:
        width: of a token.
        heads: of which `width` is a multiple.
    """

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def extra_repr(self) -> str:
        """Tells blocks apart in tables of block times, as their layers have the same shapes."""
        return f"heads={self.heads}"

    def forward(self, tokens: Tensor) -> Tensor:
        """[B, N, D] to the same."""
        batch, count, width = tokens.shape
        qkv = self.qkv(tokens).view(batch, count, 3, self.heads, width // self.heads)
        query, key, value = qkv.permute(2, 0, 3, 1, 4)  # each [B, H, N, d]
        found = F.scaled_dot_product_attention(query, key, value)
        out: Tensor = self.out(found.transpose(1, 2).reshape(batch, count, width))
        return out

    def attention_macs(self, output: Tensor) -> int:
        """Multiply-accumulates of the products with keys and values, for an output [B, N, D]."""
        batch, count, width = output.shape
        return 2 * batch * count * count * width


class TransformerLayer(nn.Module):
    """Attention (if there are heads) and a feed-forward network, each after a norm and with a residual.

    Args:
        width: of a token.
        heads: 0 for none.
        hidden: width of the feed-forward network.
    """

    def __init__(self, width: int, heads: int, hidden: int) -> None:
        super().__init__()
        self.attention = SelfAttention(width, heads) if heads else None
        self.attention_norm = nn.LayerNorm(width) if heads else None
        self.norm = nn.LayerNorm(width)
        self.first, self.second = nn.Linear(width, hidden), nn.Linear(hidden, width)

    def forward(self, tokens: Tensor) -> Tensor:
        """[B, N, D] to the same."""
        if self.attention is not None and self.attention_norm is not None:
            tokens = tokens + self.attention(self.attention_norm(tokens))
        hidden: Tensor = self.second(F.gelu(self.first(self.norm(tokens))))
        return tokens + hidden


@dataclass(frozen=True)
class TransformerVariant(Variant):
    """Transformer layers in a row.

    Attributes:
        depth: layers.
        heads: of attention; 0 for feed-forward networks only.
        expansion: hidden width as a multiple of a token's.

    Raises:
        InputError: a value is out of range.
    """

    depth: int = 2
    heads: int = 4
    expansion: float = 4.0

    def __post_init__(self) -> None:
        if self.depth < 1 or self.heads < 0 or not 0 < self.expansion <= 16:
            raise InputError(f"{self}: give a depth of 1 or more, 0 or more heads, an expansion from 0 to 16")

    @property
    def name(self) -> str:
        """Such as "d2h4-e400"."""
        return f"d{self.depth}h{self.heads}-e{round(self.expansion * 100)}"

    def check(self, site: BlockSite) -> None:
        """See `Variant`; by arithmetic."""
        width = site.input_shape[-1]
        if len(site.input_shape) != 2 or site.input_shape != site.output_shape:
            raise InputError(
                f"block {site.number} turns {list(site.input_shape)} into {list(site.output_shape)}, and "
                "transformer layers turn tokens [N, D] into as many of the same width"
            )
        if self.heads and width % self.heads:
            raise InputError(
                f"block {site.number} has tokens of width {width}, no multiple of {self.heads} heads"
            )

    def build(self, site: BlockSite) -> nn.Module:
        """See `Variant`."""
        self.check(site)
        width = site.input_shape[-1]
        hidden = max(1, round(self.expansion * width))
        return nn.Sequential(*(TransformerLayer(width, self.heads, hidden) for _ in range(self.depth)))


@dataclass(frozen=True)
class TransformerSpaceSettings:
    """Which values the variants of each block have; all combinations of them.

    Raises:
        InputError: a list is empty.
    """

    depths: Sequence[int] = (1, 2)
    heads: Sequence[int] = (0, 2, 4)
    expansions: Sequence[float] = (1.0, 2.0, 4.0)

    def __post_init__(self) -> None:
        if not (self.depths and self.heads and self.expansions):
            raise InputError(f"{self}: give each setting at least one value")

    def variants(self) -> list[TransformerVariant]:
        """All combinations."""
        return [
            TransformerVariant(*values)
            for values in itertools.product(self.depths, self.heads, self.expansions)
        ]


TRANSFORMER_SPACES = {
    "tiny": TransformerSpaceSettings((1,), (0, 2), (1.0, 2.0)),
    "small": TransformerSpaceSettings((1, 2), (0, 4), (1.0, 2.0, 4.0)),
    "full": TransformerSpaceSettings(),
}
"""Spaces by name: 4, 12 and 18 variants of a block."""


class PatchStem(nn.Module):
    """Patches of an image as tokens, with a learnt position each.

    Args:
        size: of the image.
        patch: side of a patch.
        width: of a token.
    """

    def __init__(self, size: int, patch: int, width: int) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, width, patch, patch)
        self.positions = nn.Parameter(0.02 * torch.randn(1, (size // patch) ** 2, width))

    def forward(self, images: Tensor) -> Tensor:
        """[B, 3, S, S] to [B, N, D]."""
        tokens: Tensor = self.patches(images)
        return tokens.flatten(2).transpose(1, 2) + self.positions


class TokenHead(nn.Module):
    """The mean token, a norm, and a linear layer."""

    def __init__(self, width: int, classes: int) -> None:
        super().__init__()
        self.norm, self.linear = nn.LayerNorm(width), nn.Linear(width, classes)

    def forward(self, tokens: Tensor) -> Tensor:
        """[B, N, D] to logits [B, C]."""
        logits: Tensor = self.linear(self.norm(tokens.mean(1)))
        return logits
