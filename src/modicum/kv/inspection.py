"""Inspection: what a model's layers keep, learnt from one call of the model with one token.

A configuration does not tell all of it: sizes may differ by layer, some layers read other layers' keys, and
not every model hands what the cache returns to its attention function. So the model is called once with a
cache that notes how it is used; see `modicum.kv.recording`. The call costs as much as a decode step.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

from modicum.compat import cache_kwargs
from modicum.errors import ModelError, ModicumError
from modicum.kv import latent, recurrent
from modicum.kv.attention_override import model_lock, once, uncompiled
from modicum.kv.layer_shape import LayerShape
from modicum.kv.offload import execution_device
from modicum.kv.recording import RecordingLayer
from modicum.kv.registration import borrowed

_TOKENS = (1, 2, 3, 5, 4, 2, 1, 6)  # not token 0: many models give the padding a meaning of its own
_NOISE = 8
"""How much more than rounding two ways may differ that are both right."""


@dataclass(frozen=True)
class Inspection:
    """What was learnt of a model."""

    layers: tuple[LayerShape, ...]
    """The layers of its cache, in order."""
    continues: bool = True
    """Whether a call of several tokens goes on from recurrent states; some models begin them anew."""


_known: WeakKeyDictionary[PreTrainedModel, Inspection] = WeakKeyDictionary()


def inspect_model(model: PreTrainedModel) -> Inspection:
    """Learn what a model's layers keep; worked out once for a model.

    Raises:
        ModelError: the model cannot be served; says why.
    """
    return once(_known, model, lambda: _inspect(model))


def _inspect(model: PreTrainedModel) -> Inspection:
    config = model.config.get_text_config(decoder=True)
    try:
        reason = _refused_config(model, config)
        if reason is not None:
            raise ModelError(reason)
        with model_lock(model), borrowed(model, "served"), uncompiled(model):
            layers = _trial(model, config)
            has_states = any(layer.num_states for layer in layers)
            return Inspection(layers, not has_states or _continues(model, config))
    except Exception as error:
        said = str(error)
        if not isinstance(error, ModicumError):
            said = f"a call with one token and a cache fails ({type(error).__name__}: {error})"
        raise ModelError(f"{type(model).__name__} ({config.model_type}) cannot be served: {said}") from error


def _refused_config(model: PreTrainedModel, config: Any) -> str | None:
    """Why a model cannot be served, as far as its configuration and class tell; or None."""
    if getattr(model.config, "is_encoder_decoder", False) or getattr(config, "is_encoder_decoder", False):
        return "it is an encoder-decoder; only decoder-only models have the one cache that is budgeted here"
    return None


def _trial(model: PreTrainedModel, config: Any) -> tuple[LayerShape, ...]:
    """Call the model once and read what its layers did."""
    modules = {
        int(getattr(m, "layer_idx")): m  # noqa: B009  # a Module's attributes are not known
        for m in model.modules()
        if latent.expands_latents(m) and getattr(m, "layer_idx", None) is not None
    }
    order: list[RecordingLayer] = []
    layers = [
        _recording(index, layer, index in modules, order)
        for index, layer in enumerate(DynamicCache(config=config).layers)
    ]
    if not any(isinstance(layer, RecordingLayer | DynamicSlidingWindowLayer) for layer in layers):
        raise ModelError("none of its layers has a cache of keys and values")
    _call(model, _TOKENS[:1], Cache(layers=layers))
    for index, module in modules.items():
        if isinstance(layers[index], RecordingLayer):
            latent.check_expansion(module)
    each = getattr(config, "per_layer_config", None) or [config] * len(layers)
    heads = [int(getattr(each[i % len(each)], "num_attention_heads", 0)) for i in range(len(layers))]
    return tuple(_shape_of(index, layer, heads[index]) for index, layer in enumerate(layers))


def _recording(index: int, layer: Any, is_latent: bool, order: list[RecordingLayer]) -> Any:
    """The layer to call the model with, for one that transformers would use."""
    if type(layer) is DynamicLayer:
        return RecordingLayer(is_latent, order)
    if recurrent.is_hybrid(layer):
        return recurrent.RecordingHybrid(is_latent, order, layer.number_of_states)
    if type(layer) is DynamicSlidingWindowLayer or recurrent.is_known(layer):
        return layer
    raise ModelError(
        f"layer {index} keeps a {type(layer).__name__}, which picks among all tokens that were seen by keys "
        "of its own"
    )


def _call(model: PreTrainedModel, tokens: Sequence[int], cache: Cache, seen: int = 0) -> Tensor:
    """Logits [V] of the last token; `seen`: tokens before these."""
    call: Any = model
    ids = torch.tensor([tokens], device=execution_device(model))
    inputs: dict[str, Any] = {"input_ids": ids, "use_cache": True, **cache_kwargs(model, cache)}
    if "position_ids" in inspect.signature(model.forward).parameters:  # some models begin at 0 without them
        inputs["position_ids"] = torch.arange(seen, seen + len(tokens), device=ids.device)[None]
    with torch.no_grad():
        logits: Tensor = call(**inputs).logits[0, -1]
    return logits.float()


def _continues(model: PreTrainedModel, config: Any) -> bool:
    """Whether calls of several tokens go on from the states of those before.

    One call of all tokens and single tokens are both right and differ by rounding; two halves may not differ
    by much more.
    """
    half = len(_TOKENS) // 2
    whole = _call(model, _TOKENS, DynamicCache(config=config))
    one_by_one, halves = DynamicCache(config=config), DynamicCache(config=config)
    _call(model, _TOKENS[:half], one_by_one)
    single = [_call(model, [t], one_by_one, half + i) for i, t in enumerate(_TOKENS[half:])][-1]
    _call(model, _TOKENS[:half], halves)
    second = _call(model, _TOKENS[half:], halves, half)
    rounding = torch.finfo(model.dtype).eps * whole.abs().max()
    noise = torch.maximum((whole - single).abs().max(), rounding)
    return bool((whole - second).abs().max() <= _NOISE * noise)


def _shape_of(index: int, layer: Any, query_heads: int) -> LayerShape:
    number = int(getattr(layer, "number_of_states", 0))
    nbytes = sum(state.nbytes for state in recurrent.states_held(layer))  # of one row
    if isinstance(layer, RecordingLayer):
        return replace(_full_shape(index, layer), num_states=number, state_nbytes=nbytes)
    if not isinstance(layer, DynamicSlidingWindowLayer):
        return LayerShape(0, 0, 0, 0, None, num_states=number, state_nbytes=nbytes)
    if not layer.is_initialized or layer.keys is None:
        raise ModelError(f"layer {index} has a sliding window and gave no keys to the cache")
    heads, key_dim = layer.keys.shape[1], layer.keys.shape[3]
    value_dim, window = layer.values.shape[3], layer.sliding_window
    group = query_heads // heads
    return LayerShape(heads, group, key_dim, value_dim, window, num_states=number, state_nbytes=nbytes)


def _full_shape(index: int, layer: RecordingLayer) -> LayerShape:
    if layer.key_shape is None or layer.value_shape is None:
        raise ModelError(
            f"layer {index} gave no keys to the cache in a call with text alone (it may attend to images; or "
            "gradient checkpointing is on, which keeps none in training mode: call model.eval())"
        )
    if not layer.is_read:
        raise ModelError(
            f"the attention of layer {index} does not go through transformers' attention interface"
        )
    heads, key_dim, value_dim = layer.key_shape[1], layer.key_shape[3], layer.value_shape[3]
    if layer.is_latent:  # what came as values is the part of the keys that all heads share
        key_dim, value_dim = key_dim + value_dim, key_dim
    return LayerShape(
        heads,
        layer.num_query_heads // heads,
        key_dim,
        value_dim,
        None,
        order=layer.order.index(layer),
        is_latent=layer.is_latent,
        has_sinks=layer.has_sinks,
        num_readers=layer.num_readers,
        hides_use_cache=layer.hides_use_cache,
    )
