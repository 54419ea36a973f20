"""Store: in what form keys and values lie in the slots: as the model gives them, or in 8 bits.

In 8 bits a vector is D codes and one scale, side by side in D + 2 bytes, so that a slot is moved as one:
x ≈ scale · code, with scale = max|x| / the largest code, in bfloat16, rounded up. Codes are whole numbers
from -127 to 127 ("int8"), or the 8-bit floats e4m3 of at most 448 ("fp8"; Micikevicius et al. 2022, "FP8
formats for deep learning", arXiv 2209.05433).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from modicum.errors import InputError, ModelError

_SCALE = 2  # bytes of a bfloat16


@dataclass(frozen=True)
class Store:
    """A form of keys and values in their slots.

    Attributes:
        name: "model", "int8" or "fp8".
    """

    name: str = "model"

    def __post_init__(self) -> None:
        if self.name not in STORES:
            raise InputError(f"store is {self.name!r}: choose one of {', '.join(STORES)}")

    @property
    def coded(self) -> bool:
        """Whether vectors lie in another form than the model's."""
        return self.name != "model"

    def check(self, device: torch.device) -> None:
        """Try it.

        Raises:
            ModelError: the device cannot make such slots.
        """
        try:
            self.decode(self.encode(torch.zeros(1, 2, device=device)), torch.float32)
        except (RuntimeError, TypeError, NotImplementedError) as error:
            raise ModelError(
                f"{device} cannot hold slots in {self.name} ({error}): choose another store"
            ) from error

    def columns(self, dim: int) -> int:
        """Entries of a slot for a vector of so many numbers; none for none."""
        return dim + _SCALE if self.coded and dim else dim

    def dtype(self, model: torch.dtype) -> torch.dtype:
        """Of a slot's entries."""
        return torch.uint8 if self.coded else model

    def nbytes(self, dim: int, itemsize: int) -> int:
        """Bytes of a slot for a vector of `dim` numbers, each of `itemsize` bytes in the model."""
        return self.columns(dim) * (1 if self.coded else itemsize)

    def encode(self, x: Tensor) -> Tensor:
        """Vectors [..., D] as they lie in their slots: [..., columns(D)]."""
        if not self.coded:
            return x
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        most = _LARGEST[self.name]
        # Rounded up, so that no code is cut off; a vector of zeros needs no scale.
        scale = (wide.abs().amax(-1, keepdim=True) * (1 + 2**-8) / most).to(torch.bfloat16)
        ratio = wide / scale.to(wide.dtype).clamp_min(torch.finfo(torch.bfloat16).tiny)
        if self.name == "int8":
            codes = ratio.round().clamp(-most, most).to(torch.int8)
        else:
            codes = ratio.clamp(-most, most).to(torch.float8_e4m3fn)
        bits = scale.view(torch.int16)  # its two bytes, the lower first
        both = torch.cat((bits & 255, (bits >> 8) & 255), -1).to(torch.uint8)
        return torch.cat((codes.view(torch.uint8), both), -1)

    def decode(self, stored: Tensor, dtype: torch.dtype) -> Tensor:
        """Vectors [..., D] of slots [..., columns(D)], in `dtype`."""
        if not self.coded:
            return stored
        dim = stored.shape[-1] - _SCALE
        kind = torch.int8 if self.name == "int8" else torch.float8_e4m3fn
        wide = torch.promote_types(dtype, torch.float32)
        low, high = stored[..., dim:].to(torch.int16).chunk(2, -1)
        scale = (low | (high << 8)).view(torch.bfloat16).to(wide)
        return stored[..., :dim].view(kind).to(wide).mul_(scale).to(dtype)


_LARGEST = {"int8": 127.0, "fp8": 448.0}
STORES = ("model", *_LARGEST)
"""The names there are."""
PLAIN = Store()
