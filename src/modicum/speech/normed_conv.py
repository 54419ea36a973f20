"""Normed convolution: Conv1d and batch normalisation, which fold into one Conv1d for inference."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn

from modicum.speech.acoustic_model import inside
from modicum.speech.frame_norm import FrameNorm


class NormedConv1d(nn.Module):
    """A convolution without bias, followed by a `FrameNorm` until it is folded.

    Args:
        channels: C.
        filters: K.
        taps: r, odd.
        stride: of the convolution. Padding gives ⌈T / stride⌉ outputs.
    """

    norm: FrameNorm | None

    def __init__(self, channels: int, filters: int, taps: int, stride: int = 1) -> None:
        super().__init__()
        self.conv = nn.Conv1d(channels, filters, taps, stride=stride, padding=taps // 2, bias=False)
        self.norm = FrameNorm(filters)

    def forward(self, x: Tensor, is_inside: Tensor | None) -> Tensor:
        """[N, C, T] -> [N, K, T'], 0 where is_inside [N, T'] bool is False; None: all frames are valid."""
        outputs: Tensor = self.conv(x)
        if self.norm is not None:
            return cast(Tensor, self.norm(outputs.mT, is_inside)).mT
        return outputs if is_inside is None else outputs * is_inside[:, None]

    @torch.no_grad()
    def fold(self) -> None:
        """Absorb the norm into weights and a bias: the outputs of evaluation mode, but for rounding."""
        if self.norm is None:
            return
        norm = self.norm
        mean, variance = cast(Tensor, norm.running_mean), cast(Tensor, norm.running_var)
        factor = norm.weight / (variance + norm.eps).sqrt()
        self.conv.weight.mul_(factor[:, None, None])
        self.conv.bias = nn.Parameter(norm.bias - mean * factor)
        self.norm = None


def fold_norms(model: nn.Module) -> None:
    """Fold every `NormedConv1d` of a model, in place."""
    for module in model.modules():
        if isinstance(module, NormedConv1d):
            module.fold()


def valid_frames(lengths: Tensor, size: int) -> Tensor | None:
    """`inside(lengths, size)`, or None where no frame is padding: then there is nothing to mask.

    Never None while the model is exported or compiled, as the lengths of other calls may be others.
    """
    if torch.compiler.is_compiling():
        return inside(lengths, size)
    return None if bool((lengths >= size).all()) else inside(lengths, size)
