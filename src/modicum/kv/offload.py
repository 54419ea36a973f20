"""Models whose weights accelerate keeps elsewhere (in memory or on disk) and loads for each call.

Such parameters lie on the meta device between calls. The hook of their module, or of one around it, knows
where the values are and on which device the module runs.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from modicum.errors import ModelError


def execution_device(model: PreTrainedModel) -> torch.device:
    """The device on which a model takes its input; that of its first parameter, unless that is offloaded."""
    device: torch.device = model.device
    if device.type != "meta":
        return device
    for module in model.modules():
        for hook in _hooks(module):
            target = getattr(hook, "execution_device", None)
            if target is not None:
                return torch.device(target)
    raise ModelError(_EMPTY)


def is_offloaded(model: PreTrainedModel) -> bool:
    """Whether any parameter is loaded only for the call that needs it."""
    return any(p.is_meta for p in model.parameters())


def check_loaded(model: PreTrainedModel) -> None:
    """Check that every parameter has values, here or where its module's hook finds them.

    Raises:
        ModelError: parameters on the meta device without values.
    """
    if is_offloaded(model) and (name := _without_values(model, "")) is not None:
        raise ModelError(f"{_EMPTY} (the first is {name})")


def offloaded_value(module: nn.Module, name: str, *, from_disk: bool) -> Tensor | None:
    """The value of a module's offloaded tensor.

    None where its hook does not know it, or where it is on disk and `from_disk` is False.
    """
    for hook in _hooks(module):
        weights = getattr(hook, "weights_map", None)
        if weights is None:
            continue
        if not from_disk:
            full = getattr(weights, "prefix", "") + name
            kept = getattr(weights, "dataset", weights)  # of a view by prefix
            kept = getattr(kept, "state_dict", kept)  # without what lies on disk
            value = kept.get(full) if isinstance(kept, dict) else None
        else:
            value = weights[name]
        if isinstance(value, Tensor):
            return value
    return None


_EMPTY = (
    "the model's weights are on the meta device, without values: load them with from_pretrained (weights "
    "that accelerate offloads by device_map, cpu_offload or disk_offload are served)"
)


def _hooks(module: nn.Module) -> Iterator[Any]:
    hook = getattr(module, "_hf_hook", None)
    if hook is not None:
        yield hook
        yield from getattr(hook, "hooks", ())


def _without_values(module: nn.Module, prefix: str) -> str | None:
    """Name of the first parameter without values in a module, whose name is `prefix`."""
    known = [hook for hook in _hooks(module) if getattr(hook, "weights_map", None) is not None]
    if any(getattr(hook, "place_submodules", False) for hook in known):
        return None
    for name, parameter in module.named_parameters(recurse=False):
        if parameter.is_meta and not known:
            return prefix + name
    for name, child in module.named_children():
        found = _without_values(child, f"{prefix}{name}.")
        if found is not None:
            return found
    return None
