"""Our attention and mask functions, registered with transformers by its public interfaces.

For each implementation that a model may use ("sdpa", "eager", …) there is one of ours, "modicum_sdpa" and so
on. It serves budgeted layers itself and hands everything else (other caches, none, training, sliding windows)
to the original.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, causal_mask_function
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from modicum.errors import CacheError, InputError, ModelError
from modicum.kv.arguments import check_settings
from modicum.kv.gradients import without_backward
from modicum.kv.latent import announced
from modicum.kv.precision import without_autocast
from modicum.kv.recording import RecordingHandle, RecordingLength
from modicum.kv.shared import OURS, BudgetLength, Handle, lasting

if TYPE_CHECKING:
    from modicum.kv.layer import BudgetLayer

_REFUSED = ("position_bias", "cache")
_OTHER_PATTERN = torch.empty(0, 0, 0)
"""Stands for a mask that is not causal."""
_FOREIGN = "this cache was built for another model: build one with BudgetCache(model, …)"

_NAMELESS = ("sdpa", "eager", "flex_attention", "paged|eager", "paged|sdpa")
"""Implementations whose functions never read their own name."""

_override: ContextVar[Callable[..., Any] | None] = ContextVar("modicum_attention", default=None)
"""Attention of the calls made in this context, in place of the model's own."""


@contextmanager
def overriding(function: Callable[..., Any]) -> Iterator[None]:
    """Send attention to `function`, without a mask, in this context's calls of attached models."""
    token = _override.set(function)
    try:
        yield
    finally:
        _override.reset(token)


def _overridden() -> Callable[..., Any] | None:
    # No context is looked up in a compiled call: its graph would keep what it found.
    return None if torch.compiler.is_compiling() else _override.get()


class _Named:
    """An attention module whose configuration names the original implementation.

    Flash attention and the kernels of the hub read there which library to call.
    """

    def __init__(self, module: torch.nn.Module, name: str) -> None:
        self._module = module
        self.config = _NamedConfig(module.config, name)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, name)


class _NamedConfig:
    def __init__(self, config: Any, name: str) -> None:
        self._config = config
        self._attn_implementation = name

    def __getattr__(self, name: str) -> Any:
        return getattr(self._config, name)


def attention_for(original: str) -> Callable[..., tuple[Tensor, Tensor | None]]:
    """Our attention function in place of the implementation `original`."""

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
        key = announced(module, key)
        if isinstance(key, RecordingHandle):
            return key.record(module, query, attention_mask, kwargs), None
        if not isinstance(key, Handle):
            run, seen = _overridden(), cast(Any, module)
            if run is None:
                run = _original(original, module)
                seen = module if original in _NAMELESS else _Named(module, original)
            if original == "sdpa" and attention_mask is None and 1 < query.shape[2] < key.shape[2]:
                attention_mask = _lower_right(query.shape[2], key)
            out: tuple[Tensor, Tensor | None] = run(
                seen, query, key, value, attention_mask, scaling=scaling, dropout=dropout, **kwargs
            )
            return out
        run = serve
        if torch.compiler.is_compiling() and not key.layer.shared.in_graph(query.shape[2]):
            run = serve_outside_graphs
        return run(module, query, key.layer, attention_mask, scaling, kwargs), None

    return attention


def serve(
    module: torch.nn.Module,
    query: Tensor,
    layer: BudgetLayer,
    attention_mask: Tensor | None,
    scaling: float | None,
    kwargs: dict[str, Any],
) -> Tensor:
    """Attention of a budgeted layer: query [B, Hq, q, Dk] -> [B, q, Hq, Dv]; kwargs are the model's."""
    if module.training and torch.is_grad_enabled():
        raise CacheError("a budget cache is for inference: call model.eval(), or train without a cache")
    if getattr(module, "config", layer.shared.config) is not layer.shared.config:
        raise CacheError(_FOREIGN)
    for name in _REFUSED:
        if kwargs.get(name) is not None:
            raise ModelError(
                f"{type(module).__name__} asks its attention for {name!r}, which is not supported here"
            )
    softcap, sinks = kwargs.get("softcap"), kwargs.get("s_aux")
    factor = query.shape[-1] ** -0.5 if scaling is None else scaling
    if layer.reads is not None:
        attention_mask = layer.shared.padding_mask(attention_mask)
        if getattr(module, "layer_idx", None) != layer.setting.layer:
            with torch.no_grad(), without_autocast(query.device):
                again = layer.attend_again(query.to(layer.dtype), factor, softcap, sinks)
            return without_backward(again, query)
    if attention_mask is _OTHER_PATTERN:
        raise ModelError(
            "this call lays another pattern over the causal mask (image tokens, packed sequences), "
            "which a budget cache does not serve: use it for plain causal text"
        )
    if attention_mask is not None and attention_mask.dim() != 2:
        raise InputError(
            f"the attention mask has {attention_mask.dim()} dimensions: with a budget cache give the "
            "two-dimensional padding mask [batch, columns], or none"
        )
    check_settings(kwargs, layer.shared.config, layer.shape.hides_use_cache)
    at = kwargs.get("position_ids")
    inputs = (query, *layer.incoming)
    query = query.to(layer.dtype)
    if torch.compiler.is_compiling():  # nothing is allocated in a compiled step
        with torch.no_grad(), without_autocast(query.device):
            attended = layer.attend(module, query, attention_mask, factor, softcap, at, sinks)
    else:
        with lasting(), torch.no_grad(), without_autocast(query.device):
            attended = layer.attend(module, query, attention_mask, factor, softcap, at, sinks)
    return without_backward(attended, *inputs)


serve_outside_graphs = torch.compiler.disable(serve)  # type: ignore[no-untyped-call]
"""The same where the caller has compiled the model: a graph breaks here and goes on behind it."""


def _original(name: str, module: torch.nn.Module) -> Callable[..., Any]:
    if name != "eager":
        function: Callable[..., Any] | None = ALL_ATTENTION_FUNCTIONS.get(name)
        if function is None:
            raise ModelError(
                f"the attention implementation {name!r} is not registered in this process: call "
                "modicum.detach(model), then model.set_attn_implementation with one that is"
            )
        return function
    # Eager attention is no entry of the registry: each model's file has its own.
    for cls in type(module).__mro__:
        eager = getattr(sys.modules.get(cls.__module__), "eager_attention_forward", None)
        if eager is not None:
            return eager  # type: ignore[no-any-return]
    raise ModelError(
        f"{type(module).__name__} has no eager attention function in its file: load it with sdpa instead"
    )


def _lower_right(queries: int, keys: Tensor) -> Tensor:
    """The causal mask [queries, N] of the last queries over keys [B, H, N, D].

    A model drops queries before layers that read other layers' keys only where it is sure of a mask, and asks
    for the name "sdpa" to be sure (Gemma 4); under our name it is not.
    """
    n = keys.shape[2]
    return torch.ones(queries, n, dtype=torch.bool, device=keys.device).tril(n - queries)


def _is_causal(call: dict[str, Any], new: int) -> bool:
    """Whether the pattern of a call of `new` tokens is the causal one.

    transformers gives it as a function of the places of a query and a key. It is asked for all pairs of new
    tokens and for the oldest token.
    """
    function = call.get("mask_function", causal_mask_function)
    if function is causal_mask_function:
        return True
    device = call.get("device", "cpu")
    row = torch.arange(int(call.get("batch_size", 1)), device=device)[:, None, None]
    query = int(call.get("q_offset", 0)) + torch.arange(new, device=device)[None, :, None]
    key = torch.cat([torch.zeros(1, dtype=torch.int64, device=device), query.flatten()])[None, None]
    try:
        seen = function(row, torch.zeros_like(row), query, key)
    except (IndexError, RuntimeError, TypeError):  # it does not take tensors of places, or not these
        return False
    return bool((seen == (key <= query)).all())


def mask_for(original: str) -> Callable[..., Any]:
    """Our mask function in place of that of the implementation `original`."""

    def mask(*args: Any, **kwargs: Any) -> Any:
        length, given = kwargs.get("kv_length"), kwargs.get("attention_mask")
        if type(length) is int and length == OURS:
            one = kwargs.get("q_length") == 1 or len(kwargs.get("cache_position", ())) == 1
            return given[:, -1:] if given is not None and one else given
        if isinstance(length, RecordingLength):
            return given
        if not isinstance(length, BudgetLength):
            return None if _overridden() is not None else _original_mask(original, args, kwargs)
        if kwargs.get("config", length.layer.shared.config) is not length.layer.shared.config:
            raise CacheError(_FOREIGN)
        if not _is_causal(kwargs, length.new):
            return _OTHER_PATTERN  # an error only where a layer under the budget gets it
        shared = length.layer.shared
        if shared.static and length.new == 1:
            shared.enter(True)
            # The same shape at each step; of the columns before nothing is asked.
            return None if given is None else given[:, -1:].contiguous()
        length.layer.check_room(given, length.new)
        return given if given is None else shared.as_mask(given)

    return mask


def _original_mask(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    make = ALL_MASK_ATTENTION_FUNCTIONS.get(name)
    if make is None:
        return None  # as transformers does for an implementation without a mask function
    if "flash" in name and kwargs.get("attention_mask") is None:
        # A static cache has slots past the last token. Where flash attention is named, `generate` keeps a
        # mask of ones as long as what is written; under our name it drops it.
        written = int(kwargs.get("q_offset", 0)) + kwargs.get("q_length", kwargs["kv_length"])
        if kwargs["kv_length"] + kwargs.get("kv_offset", 0) > written:
            ones = torch.ones(kwargs["batch_size"], written, dtype=torch.bool, device=kwargs.get("device"))
            kwargs = {**kwargs, "attention_mask": ones}
    return make(*args, **kwargs)
