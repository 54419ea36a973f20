"""Admission: what a layer refuses before it takes a call."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from modicum.errors import BudgetError, CacheError, InputError
from modicum.kv.layer_shape import LayerShape


def check_shape(layer: int, key: Tensor, value: Tensor, shape: LayerShape) -> None:
    """Keys [B, H, m, Dk] and values [B, H, m, Dv] must be of the model that the cache was built for.

    Raises:
        CacheError: they are of another.
    """
    dims = shape.key_dim, shape.value_dim
    if shape.is_latent:  # what comes as values is the part of the keys that all heads share
        dims = shape.value_dim, shape.key_dim - shape.value_dim
    if key.shape[1] != shape.kv_heads or (key.shape[3], value.shape[3]) != dims:
        raise CacheError(
            f"layer {layer} got {key.shape[1]} heads of {key.shape[3]} and {value.shape[3]}, the cache was "
            f"built for {shape.kv_heads} of {shape.key_dim} and {shape.value_dim}: build one for this "
            "model"
        )


def check_like(layer: int, key: Tensor, rows: int, dtype: torch.dtype, device: torch.device) -> None:
    """Keys [B, H, m, Dk] must be like those that are held.

    Raises:
        CacheError: another batch size, dtype or device.
    """
    if key.shape[0] != rows:
        raise CacheError(
            f"layer {layer} got a batch of {key.shape[0]}, the cache holds {rows}: use a new cache, or "
            "cache.reset()"
        )
    if key.dtype != dtype or key.device != device:
        raise CacheError(
            f"layer {layer} got {key.dtype} on {key.device}, the cache holds {dtype} on {device}: use "
            "a new cache for the new dtype or device"
        )


def check_finite(layer: int, key: Tensor) -> None:
    """Keys must be numbers; on a GPU a single token's are not looked at, as each look costs a wait.

    Raises:
        InputError: some are not.
    """
    # A finite sum means finite terms.
    if (key.shape[2] > 1 or not key.is_cuda) and not math.isfinite(key.sum().item()):
        bad = int((~torch.isfinite(key)).sum())
        if bad:
            raise InputError(
                f"layer {layer}: {bad} of {key.numel()} key values are not finite (nan or inf), so nothing "
                "can be scored: check the weights and the dtype (fp16 overflows at 65504; bfloat16 does not)"
            )


def check_room(most: int, room: int) -> None:
    """A policy that never evicts must have room for the longest row.

    Raises:
        BudgetError: it has not.
    """
    if most > room:
        raise BudgetError(
            f"the policy 'full' never evicts, and {most} tokens do not fit a budget of {room}: "
            f"give a budget of at least {most} tokens, or a policy that lets go (keydiff, snapkv, …)"
        )
