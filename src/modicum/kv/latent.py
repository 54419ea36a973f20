"""Latent attention (MLA): keys and values of all heads are expanded from one latent vector per token.

DeepSeek-V2 (arXiv 2405.04434), section 2.1. transformers keeps, per token, the latent c [rank] and the
rotated key part k_r [rope] that all heads share, and expands them after `Cache.update`. Here the expansion is
moved to the other side of the product, as in section 2.1.2 of the paper ("absorbed"):

    q_h · k_h   = q_h,nope · (W_K,h c) + q_h,rope · k_r = [W_K,hᵀ q_h,nope; q_h,rope] · [c; k_r]
    Σ_j a_j v_j = W_V,h Σ_j a_j c_j

So attention runs over one KV head with keys [c; k_r] and values c, and every query head is in its group. A
slot holds rank + rope numbers, and whatever a policy reads of keys and values it reads of these.
"""

from __future__ import annotations

from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from modicum.errors import ModelError
from modicum.kv.shared import Handle


@dataclass(frozen=True)
class _Announcement:
    """What the next attention call of this context gets."""

    handle: Handle
    layer: int | None
    """Its layer's place in the cache, if known."""
    rope: Tensor
    """[B, 1, q, rope]: the part of the keys that all heads share."""
    is_first: bool
    """Whether it may be of the first layer of a call."""

    def is_for(self, module: torch.nn.Module, key: Tensor | Handle) -> bool:
        """Whether these keys were expanded from what was announced.

        An interrupted call may have left an announcement behind. The next call begins with its first layer,
        so only there are numbers compared; elsewhere the layer tells.
        """
        if not isinstance(key, Tensor) or not expands_latents(module):
            return False
        if self.layer is not None and getattr(module, "layer_idx", self.layer) != self.layer:
            return False
        if not self.is_first:
            return True
        own = key[:, :1, :, -self.rope.shape[-1] :]
        return own.shape == self.rope.shape and torch.equal(own, self.rope)


_announced: ContextVar[_Announcement | None] = ContextVar("modicum_latent_handle", default=None)


def announce(handle: Handle, layer: int | None, rope: Tensor, *, is_first: bool) -> None:
    """Tell the next attention call of this context whose keys it gets, as expanded keys cannot say so."""
    _announced.set(_Announcement(handle, layer, rope, is_first))


def announced(module: torch.nn.Module, key: Tensor | Handle) -> Tensor | Handle:
    """The handle of the layer that was announced, or the key as it came; each announcement is read once.

    One that an interrupted call has left behind is forgotten by the next attention.
    """
    if torch.compiler.is_compiling():
        return key
    announcement = _announced.get()
    if announcement is None:
        return key
    _announced.set(None)
    return announcement.handle if announcement.is_for(module, key) else key


def expands_latents(module: torch.nn.Module) -> bool:
    """Whether an attention module expands latents that the cache holds."""
    return hasattr(module, "expand_kv") and hasattr(module, "kv_b_proj")


def check_expansion(module: torch.nn.Module) -> None:
    """Check that a module's expansion can be moved.

    Raises:
        ModelError: its matrix is not a plain one.
    """
    _expansion(module)


def absorbed_query(module: torch.nn.Module, query: Tensor) -> Tensor:
    """Queries against latents: [B, Hq, q, nope + rope] -> [B, Hq, q, rank + rope]."""
    keys, _ = _expansion(module)
    nope = keys.shape[1]
    wide = torch.einsum("bhqd,hdr->bhqr", query[..., :nope], keys)
    return torch.cat([wide, query[..., nope:]], dim=-1)


def expanded_output(module: torch.nn.Module, out: Tensor) -> Tensor:
    """Outputs of the heads from weighted sums of latents: [B, q, Hq, rank] -> [B, q, Hq, Dv]."""
    _, values = _expansion(module)
    return torch.einsum("bqhr,hvr->bqhv", out, values)


def _expansion(module: Any) -> tuple[Tensor, Tensor]:
    """Views of the expansion's matrix: for keys [Hq, nope, rank], for values [Hq, Dv, rank]."""
    projection = module.kv_b_proj
    weight = getattr(projection, "weight", None)
    plain = isinstance(weight, Tensor) and weight.dim() == 2 and weight.is_floating_point()
    if not plain or type(projection) is not torch.nn.Linear or projection.bias is not None:
        raise ModelError(
            f"{type(module).__name__}.kv_b_proj is a {type(projection).__name__}, not a plain matrix: load "
            "the model without quantisation of this layer, or merge its adapter first"
        )
    nope, dim = int(module.qk_nope_head_dim), int(module.v_head_dim)
    matrix = weight.detach().view(-1, nope + dim, weight.shape[-1])
    return matrix[:, :nope], matrix[:, nope:]
