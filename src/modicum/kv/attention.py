"""Our attention and mask functions, registered with transformers by its public interfaces.

For each implementation that a model may use ("sdpa", "eager", …) there is one of ours, "modicum_sdpa" and so
on. It serves budgeted layers itself and hands everything else (other caches, none, training, sliding windows)
to the original.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, PreTrainedModel
from transformers.masking_utils import (
    ALL_MASK_ATTENTION_FUNCTIONS,
    AttentionMaskInterface,
    causal_mask_function,
)
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from modicum.errors import CacheError, InputError, ModelError
from modicum.kv.arguments import check_settings
from modicum.kv.shared import OURS, BudgetLength, Handle, lasting

PREFIX = "modicum_"
_REFUSED = ("s_aux", "position_bias", "cache")
_FOREIGN = "this cache was built for another model: build one with BudgetCache(model, …)"
_registered: set[str] = set()


def attach(model: PreTrainedModel) -> None:
    """Switch a model to our attention function. Without a budget cache it computes what it did before."""
    original = model.config._attn_implementation
    if original.startswith(PREFIX):
        return
    name = PREFIX + original
    if name not in _registered:
        AttentionInterface.register(name, _attention(original))
        AttentionMaskInterface.register(name, _mask(original))
        _registered.add(name)
    model.set_attn_implementation(name)
    if model.config._attn_implementation != name:
        raise ModelError(
            f"{type(model).__name__} did not accept our attention function: its attention does not go "
            "through transformers' attention interface"
        )


def detach(model: PreTrainedModel) -> None:
    """Put a model back as it was before the first `BudgetCache`; its budget caches then refuse to be used."""
    name = model.config._attn_implementation
    if name.startswith(PREFIX):
        model.set_attn_implementation(name.removeprefix(PREFIX))


def _attention(original: str) -> Callable[..., tuple[Tensor, Tensor | None]]:
    def attention(
        module: torch.nn.Module,
        query: Tensor,
        key: Tensor | Handle,
        value: Tensor | Handle,
        attention_mask: Tensor | None,
        scaling: float | None = None,
        dropout: float = 0.0,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        if not isinstance(key, Handle):
            run = _original(original, module)
            out: tuple[Tensor, Tensor | None] = run(
                module, query, key, value, attention_mask, scaling=scaling, dropout=dropout, **kwargs
            )
            return out
        if module.training and torch.is_grad_enabled():
            raise CacheError("a budget cache is for inference: call model.eval(), or train without a cache")
        layer = key.layer
        if getattr(module, "config", layer.shared.config) is not layer.shared.config:
            raise CacheError(_FOREIGN)
        for name in _REFUSED:
            if kwargs.get(name) is not None:
                raise ModelError(
                    f"{type(module).__name__} asks its attention for {name!r}, which is not supported here"
                )
        if attention_mask is not None and attention_mask.dim() != 2:
            raise InputError(
                f"the attention mask has {attention_mask.dim()} dimensions: with a budget cache give the "
                "two-dimensional padding mask [batch, columns], or none"
            )
        check_settings(kwargs, layer.shared.config)
        factor = query.shape[-1] ** -0.5 if scaling is None else scaling
        at, softcap = kwargs.get("position_ids"), kwargs.get("softcap")
        if torch.compiler.is_compiling():  # nothing is allocated in a compiled step
            return layer.attend(module, query, attention_mask, factor, softcap, at), None
        with lasting(), torch.no_grad():
            return layer.attend(module, query, attention_mask, factor, softcap, at), None

    return attention


def _original(name: str, module: torch.nn.Module) -> Callable[..., Any]:
    if name != "eager":
        function: Callable[..., Any] = ALL_ATTENTION_FUNCTIONS[name]
        return function
    # Eager attention is no entry of the registry: each model's file has its own.
    for cls in type(module).__mro__:
        eager = getattr(sys.modules.get(cls.__module__), "eager_attention_forward", None)
        if eager is not None:
            return eager  # type: ignore[no-any-return]
    raise ModelError(
        f"{type(module).__name__} has no eager attention function in its file: load it with sdpa instead"
    )


def _mask(original: str) -> Callable[..., Any]:
    def mask(*args: Any, **kwargs: Any) -> Any:
        length, given = kwargs.get("kv_length"), kwargs.get("attention_mask")
        if type(length) is int and length == OURS:
            return None if given is None else given[:, -1:]
        if not isinstance(length, BudgetLength):
            return ALL_MASK_ATTENTION_FUNCTIONS[original](*args, **kwargs)
        if kwargs.get("config", length.layer.shared.config) is not length.layer.shared.config:
            raise CacheError(_FOREIGN)
        if kwargs.get("mask_function", causal_mask_function) is not causal_mask_function:
            raise ModelError(
                "this call lays another pattern over the causal mask (image tokens, packed sequences), "
                "which a budget cache does not serve: use it for plain causal text"
            )
        shared = length.layer.shared
        if shared.static and length.new == 1:
            shared.enter(True)
            # The same shape at each step; of the columns before nothing is asked.
            return None if given is None else given[:, -1:].contiguous()
        length.layer.check_room(given, length.new)
        return given

    return mask
