"""Plain model: the transformers model inside wrappers, or why its weights cannot be changed in place."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from modicum.errors import ModelError

_PEFT = "peft"


def plain_model(model: nn.Module) -> PreTrainedModel:
    """Return the transformers model inside `torch.compile`, DataParallel and DistributedDataParallel.

    Raises:
        ModelError: the model has adapters (PEFT), is split over processes, has weights that are not in memory
            (offloaded, or on the meta device), or is no transformers model. The message says what to do.
    """
    model = _unwrapped(model)
    _refuse_adapters(model)
    if not isinstance(model, PreTrainedModel):
        raise ModelError(
            f"the model is a {type(model).__name__}, not a transformers PreTrainedModel: give the "
            "transformers model inside it"
        )
    _refuse_weights_elsewhere(model)
    return model


def _unwrapped(model: nn.Module) -> nn.Module:
    while True:
        inner = model._modules.get("_orig_mod")  # what torch.compile returns keeps the model by this name
        if isinstance(model, nn.DataParallel | nn.parallel.DistributedDataParallel):
            inner = model.module
        if not isinstance(inner, nn.Module):
            return model
        model = inner


def _is_of_peft(module: nn.Module) -> bool:
    """Whether it is a PEFT model or layer, told by its class so that peft need not be imported."""
    return any(cls.__module__.split(".")[0] == _PEFT for cls in type(module).__mro__)


def _refuse_adapters(model: nn.Module) -> None:
    """Pruned with adapters active, the base weights would fit a sum that the written file does not hold."""
    layers = [name for name, module in model.named_modules() if name and _is_of_peft(module)]
    if _is_of_peft(model):
        config: Any = getattr(model, "active_peft_config", None)
        if getattr(config, "is_prompt_learning", False):
            raise ModelError(
                f"the model is a {type(model).__name__} with a learned prompt, which has no weights to "
                "merge: prune the model inside it, model.get_base_model()"
            )
        raise ModelError(
            f"the model is a {type(model).__name__} with adapters: merge them into the weights first, "
            "model = model.merge_and_unload()"
        )
    if layers:
        raise ModelError(
            f"the model has PEFT adapters, such as in {layers[0]}: merge them into the weights first. "
            "With the PeftModel: model = peft_model.merge_and_unload(). Without it, load the base model "
            "again and the saved adapter on it: model = PeftModel.from_pretrained(base, "
            "folder).merge_and_unload()"
        )


def _refuse_weights_elsewhere(model: PreTrainedModel) -> None:
    modules: nn.Module = model
    tensors: dict[str, Tensor] = {**dict(modules.named_parameters()), **dict(modules.named_buffers())}
    split = [name for name, tensor in tensors.items() if _is_sharded(tensor)]
    if split:
        raise ModelError(
            f"{len(split)} of the model's {len(tensors)} tensors, such as {split[0]}, are split over "
            "processes: load the whole model in one process, without tp_plan and FSDP"
        )
    absent = [name for name, tensor in tensors.items() if tensor.is_meta]
    if not absent:
        return
    which = f"{len(absent)} of the model's {len(tensors)} tensors, such as {absent[0]}, "
    if any(hasattr(module, "_hf_hook") for module in modules.modules()):
        raise ModelError(
            which
            + "are offloaded by accelerate, and weights must be loaded whole: load the model again with "
            "from_pretrained(..., device_map=None), in dtype='bfloat16' if memory is short"
        )
    raise ModelError(
        which + "are on the meta device and have no values, and weights must be loaded whole: load the model "
        "with from_pretrained(...), outside torch.device('meta') and init_empty_weights()"
    )


def _is_sharded(tensor: Tensor) -> bool:
    if not torch.distributed.is_available():
        return False
    from torch.distributed.tensor import DTensor

    return isinstance(tensor, DTensor)
