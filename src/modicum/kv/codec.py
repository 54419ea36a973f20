"""Codec: in what form a vector lies in its slot: as the model gives it, or as codes and a scale.

A coded vector is its codes and one scale, side by side in bytes, so that a slot is moved as one:
x ≈ scale · code, with scale = max|x| / the largest code, in bfloat16, rounded up.

- "int8": whole numbers from -127 to 127, D + 2 bytes for D numbers.
- "fp8": the 8-bit floats e4m3 of at most 448 (Micikevicius et al. 2022, "FP8 formats for deep learning",
  arXiv 2209.05433), D + 2 bytes.
- "int4": whole numbers from -7 to 7, of x rotated by a Hadamard matrix (`kv/hadamard.py`), two to a byte:
  D / 2 + 2 bytes. Byte i holds entry i in its lower and entry i + D / 2 in its upper half, in two's
  complement.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from modicum.kv.hadamard import rotated

_SCALE = 2  # bytes of a bfloat16
_LARGEST = {"int8": 127.0, "fp8": 448.0, "int4": 7.0}


@dataclass(frozen=True)
class Codec:
    """A form of one vector.

    Attributes:
        name: "model", "int8", "fp8" or "int4".
        split: in 4 bits, if not 0, the first so many numbers and the others are two vectors, each with a
            rotation and a scale of its own (a latent and its rotary part).
        rotates_back: in 4 bits, whether `decode` gives vectors as they came, or in the rotated space.
    """

    name: str = "model"
    split: int = 0
    rotates_back: bool = False

    @property
    def is_coded(self) -> bool:
        """Whether a vector lies in another form than the model's."""
        return self.name != "model"

    @property
    def is_packed(self) -> bool:
        """Whether two codes share a byte, and codes are of rotated vectors."""
        return self.name == "int4"

    @property
    def is_rotated(self) -> bool:
        """Whether `decode` gives vectors in the rotated space."""
        return self.is_packed and not self.rotates_back

    def columns(self, dim: int) -> int:
        """Entries of a slot for a vector of so many numbers; none for none."""
        if not self.is_coded:
            return dim
        if self.is_packed:
            return sum(part // 2 + _SCALE for part in self.parts(dim))
        return dim + _SCALE if dim else 0

    def parts(self, dim: int) -> list[int]:
        """Sizes of the vectors that have a scale of their own."""
        sizes = [self.split, dim - self.split] if self.is_packed else [dim]
        return [size for size in sizes if size > 0]

    def dtype(self, model: torch.dtype) -> torch.dtype:
        """Of a slot's entries."""
        return torch.uint8 if self.is_coded else model

    def nbytes(self, dim: int, itemsize: int) -> int:
        """Bytes of a slot for a vector of `dim` numbers, each of `itemsize` bytes in the model."""
        return self.columns(dim) * (1 if self.is_coded else itemsize)

    def rotated(self, x: Tensor) -> Tensor:
        """x [..., D] in the rotated space, or back from it: the rotation is its own inverse."""
        parts = self.parts(x.shape[-1])
        if len(parts) == 1:
            return rotated(x)
        return torch.cat([rotated(part) for part in torch.split(x, parts, -1)], -1)

    def encode(self, x: Tensor) -> Tensor:
        """Vectors [..., D] as they lie in their slots: [..., columns(D)]."""
        if not self.is_coded:
            return x
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        if self.is_packed:
            parts = torch.split(wide, self.parts(x.shape[-1]), -1)
            return torch.cat([_packed(rotated(part)) for part in parts], -1)
        scale, ratio = _scaled(wide, _LARGEST[self.name])
        codes = ratio.round().to(torch.int8) if self.name == "int8" else ratio.to(torch.float8_e4m3fn)
        return torch.cat((codes.view(torch.uint8), scale), -1)

    def decode(self, stored: Tensor, dtype: torch.dtype) -> Tensor:
        """Vectors [..., D] of slots [..., columns(D)], in `dtype`; rotated where `is_rotated`."""
        if not self.is_coded:
            return stored
        if self.is_packed:
            first = self.split // 2 + _SCALE if self.split else 0
            slots = [stored[..., :first], stored[..., first:]] if first else [stored]
            vectors = [_unpacked(slot, dtype) for slot in slots if slot.shape[-1]]
            if self.rotates_back:
                vectors = [rotated(vector) for vector in vectors]
            return vectors[0] if len(vectors) == 1 else torch.cat(vectors, -1)
        kind = torch.int8 if self.name == "int8" else torch.float8_e4m3fn
        return _rescaled(stored[..., :-_SCALE].view(kind), stored[..., -_SCALE:], dtype)


def _scaled(x: Tensor, most: float) -> tuple[Tensor, Tensor]:
    """The two bytes of the scale of x [..., D], and x / scale, from -most to most."""
    # Rounded up, so that no code is cut off; a vector of zeros needs no scale.
    scale = (x.abs().amax(-1, keepdim=True) * (1 + 2**-8) / most).to(torch.bfloat16)
    ratio = x / scale.to(x.dtype).clamp_min(torch.finfo(torch.bfloat16).tiny)
    return scale.view(torch.uint8), ratio.clamp_(-most, most)


def _rescaled(codes: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """codes [..., D] times the scale of two bytes [..., 2], in `dtype`."""
    wide = torch.promote_types(dtype, torch.float32)
    # Copied, as two bytes that are read as one number must lie at an even place.
    factor = scale.clone(memory_format=torch.contiguous_format).view(torch.bfloat16)
    return codes.to(wide).mul_(factor).to(dtype)


def _packed(x: Tensor) -> Tensor:
    """x [..., D] as [..., D / 2 + 2] bytes, two codes in each but the last two."""
    scale, ratio = _scaled(x, _LARGEST["int4"])
    low, high = ratio.round().to(torch.int8).view(torch.uint8).chunk(2, -1)
    return torch.cat(((low & 15) | (high << 4), scale), -1)


def _unpacked(stored: Tensor, dtype: torch.dtype) -> Tensor:
    """[..., D / 2 + 2] bytes as codes times their scale, [..., D]."""
    both = stored[..., :-_SCALE].view(torch.int8)
    # Shifted left and right again, the lower half of a byte brings its sign along.
    return _rescaled(torch.cat(((both << 4) >> 4, both >> 4), -1), stored[..., -_SCALE:], dtype)
