"""Precision: what `torch.autocast` must not change inside a budget cache.

Autocast gives queries, keys and values of different dtypes (a float32 model under bfloat16 has float32 keys
and bfloat16 values). It also runs matrix products of float32 scores in 16 bits, which keeps other tokens.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor


def in_cache_dtype(key: Tensor, value: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Keys and values in the dtype of the cache, where autocast or a mix of dtypes came between.

    Others are returned as they are: a model whose dtype has changed is refused elsewhere. The budget in bytes
    was planned for `dtype`, so it holds whatever autocast gives.
    """
    if key.dtype == value.dtype and not torch.is_autocast_enabled(key.device.type):
        return key, value
    return key.to(dtype), value.to(dtype)


def without_autocast(device: torch.device) -> AbstractContextManager[Any]:
    """Attention and scores as without autocast; nothing where it is off, as that costs less."""
    if torch.is_autocast_enabled(device.type):
        return torch.autocast(device.type, enabled=False)
    return nullcontext()
