"""Compressed weights: whole numbers with a scale for each output channel, and a mask.

w ≈ q · s with s = R / Q for each output channel and q in [-Q, Q], Q = 127 in 8 bits and 7 in 4. The range R
is max|w| in 8 bits, and the one with the least squared error in 4 (see `modicum.quant.FakeQuant`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from modicum.errors import InputError, ModelError
from modicum.quant.fake_quant import FakeQuant, FakeQuantSettings
from modicum.speech.acoustic_model import check_float
from modicum.speech.compact.pruning import expand_blocks, stored_mask
from modicum.speech.recognizer import Recognizer

BITS = (4, 8)


@dataclass(frozen=True)
class CompressedTensor:
    """A matrix of few bits."""

    integers: Tensor
    """Of the matrix's shape, int8; 0 where pruned."""
    scale: Tensor
    """[outputs] float32."""
    is_kept: Tensor | None
    """[outputs, blocks] bool, which blocks are stored; None for all."""

    @property
    def weight(self) -> Tensor:
        """q · s, float32."""
        shape = (-1, *[1] * (self.integers.dim() - 1))
        return self.integers.float() * self.scale.view(shape)


@dataclass(frozen=True)
class CompactRecognizer:
    """A recognizer whose matrices are stored in few bits.

    Attributes:
        recognizer: computes with the stored weights, in floating point.
        tensors: by the names of the parameters.
        bits: of a stored weight, 4 or 8.
        block: weights that a bit of a mask stands for.
    """

    recognizer: Recognizer
    tensors: Mapping[str, CompressedTensor] = field(repr=False)
    bits: int = 8
    block: int = 1


def quantizer(weight: Tensor, bits: int, name: str) -> FakeQuant:
    """Of a matrix: a scale for each output channel, from the latest weights that it observed."""
    if bits not in BITS:
        raise InputError(f"weights have {bits} bits: give one of {', '.join(map(str, BITS))}")
    settings = FakeQuantSettings(2 ** (bits - 1) - 1, "ema" if bits == 8 else "mse", momentum=1.0)
    return FakeQuant(settings, (weight.shape[0], *[1] * (weight.dim() - 1)), name)


def is_matrix(weight: Tensor) -> bool:
    """Whether a parameter is stored in few bits: all but norms and biases."""
    return weight.dim() >= 2


@torch.no_grad()
def compress_weights(recognizer: Recognizer, bits: int = 8, block: int = 1) -> CompactRecognizer:
    """Round a recognizer's matrices to few bits. Its model is changed in place.

    Blocks of zeros are not stored where a matrix can be pruned and a mask takes fewer bytes than they do.

    Args:
        recognizer: trained.
        bits: 4 or 8.
        block: of the mask, 1 or 4.

    Raises:
        InputError: the bits are others.
        ModelError: the model is an int8 one, or a weight is not a number.
    """
    check_float(recognizer.model)
    tensors = {}
    for name, weight in recognizer.model.named_parameters():
        if not is_matrix(weight):
            continue
        if not bool(weight.isfinite().all()):
            raise ModelError(f"{name} holds weights that are not numbers: train the model again")
        kept = stored_mask(weight, bits, block)
        rounding = quantizer(weight, bits, name)
        rounding.observe(weight)
        integers, scale = rounding.quantize(weight)
        if kept is not None:
            integers = integers * expand_blocks(kept, weight.shape, block)
        tensors[name] = CompressedTensor(integers.to(torch.int8), scale.flatten().clone(), kept)
        weight.copy_(tensors[name].weight)
    return CompactRecognizer(recognizer, tensors, bits, block)


def matrices(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that are stored in few bits."""
    return {name: one for name, one in model.named_parameters() if is_matrix(one)}
