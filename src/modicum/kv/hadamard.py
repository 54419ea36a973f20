"""Hadamard: a rotation that spreads a vector's largest numbers over all of its entries.

Few channels of keys and values are far larger than the others, and a scale for the whole vector then leaves
the others few codes. Rotated by a Hadamard matrix every entry is a sum of all, of like size, and 4 bits are
enough. Attention need not be rotated back token by token: with H Hᵀ = I,

    q · k = (q H) · (k H)        and        Σ_j a_j v_j = (Σ_j a_j (v_j H)) Hᵀ,

so keys and values stay rotated, and queries and outputs are rotated once. Sources: QuaRot (Ashkboos et al.
2024, arXiv 2404.00456, section 4) for rotated quantised caches; llama.cpp (ggml-org/llama.cpp pull request
21038) for rotated queries and outputs. Ours: sizes that are no power of two, in equal blocks; policies that
score in the rotated space.
"""

from __future__ import annotations

import torch
from torch import Tensor

_signs: dict[tuple[int, torch.dtype, torch.device], Tensor] = {}


def block_size(dim: int) -> int:
    """The largest power of two that divides `dim`."""
    return dim & -dim


def rotated(x: Tensor) -> Tensor:
    """x [..., D] times H: block-diagonal, of normalised Hadamard matrices [block_size(D), block_size(D)].

    H is symmetric and its own inverse, so the same call rotates back. Sums are in fp32 at least; the result
    is in x's dtype.
    """
    dim = x.shape[-1]
    size = block_size(dim)
    if size < 2:
        return x
    wide = torch.promote_types(x.dtype, torch.float32)
    blocks = x.to(wide).reshape(*x.shape[:-1], dim // size, size)
    # Signs are exact in every dtype; the norm is one product behind them.
    whole: Tensor = (blocks @ _sign_matrix(size, wide, x.device)).mul_(size**-0.5)
    return whole.flatten(-2).to(x.dtype)


def _sign_matrix(size: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """The Hadamard matrix [size, size] of signs (Sylvester's construction), made once."""
    kind = (size, dtype, device)
    known = _signs.get(kind)
    if known is None:
        with torch.inference_mode(False):
            known = torch.ones(1, 1, dtype=dtype, device=device)
            while len(known) < size:
                known = torch.cat([torch.cat([known, known], 1), torch.cat([known, -known], 1)])
        _signs[kind] = known
    return known
