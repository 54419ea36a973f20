"""The argument under which a model takes a cache: transformers 5.24 renamed `past_key_values` to `cache`."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from typing import Any

from torch import nn
from transformers import GenerationMixin

# Where torch.compile, DataParallel, PEFT and most other wrappers keep the model.
_INSIDE = ("_orig_mod", "module", "base_model", "model")


def _parameters(function: Any) -> Mapping[str, Any]:
    # This follows `__wrapped__`, which decorators, accelerate's hooks and a compiled function have.
    return inspect.signature(function).parameters


_NAMES: tuple[str, ...] = ("cache", "past_key_values")
if "cache" not in _parameters(GenerationMixin.prepare_inputs_for_generation):  # before 5.24
    _NAMES = _NAMES[::-1]


def cache_argument(target: Any) -> str:
    """The keyword under which a model, or a function such as `model.generate`, takes a cache.

    It is "cache" for the models of transformers 5.24 and later. It is "past_key_values" before, and for a
    model with code of its own that still uses this name. If a signature has both, this release's name is
    meant. If it has neither but `**kwargs`, the model inside decides (PEFT, `torch.compile`, DataParallel),
    and at last the release, as for `model.generate`.
    """
    for each in _chain(target):
        parameters = _parameters(each.forward if isinstance(each, nn.Module) else each)
        for name in _NAMES:
            if name in parameters:
                return name
    return _NAMES[0]


def cache_kwargs(target: Any, cache: Any) -> dict[str, Any]:
    """The cache as a keyword argument of `target`: `model(ids, **cache_kwargs(model, cache))`."""
    return {cache_argument(target): cache}


def _chain(target: Any) -> Iterator[Any]:
    """The target, then the model inside it, and so on."""
    yield target
    while isinstance(target, nn.Module):
        inner = (getattr(target, name, None) for name in _INSIDE)
        # `base_model` of a transformers model without a head is the model itself.
        target = next((each for each in inner if isinstance(each, nn.Module) and each is not target), None)
        if target is not None:
            yield target
