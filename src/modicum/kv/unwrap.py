"""The transformers model inside of what a user may have wrapped around it."""

from __future__ import annotations

from typing import Any, cast

import torch
from transformers import PreTrainedModel

from modicum.errors import ModelError


def unwrap(model: Any) -> PreTrainedModel:
    """The transformers model of a PEFT model, a compiled module or a parallel wrapper; others as they are.

    Adapters such as LoRA are layers inside of the transformers model, so they act there too. A module
    compiled as a whole by `torch.compile(model)` runs uncompiled (`compile=True` compiles decode steps).

    Raises:
        ModelError: a wrapper whose model cannot be used by itself; says what to give instead.
    """
    while not isinstance(model, PreTrainedModel):
        inner = _inside(model)
        if inner is None:
            break
        model = inner
    return cast(PreTrainedModel, model)


def _inside(model: Any) -> Any | None:
    if isinstance(model, torch._dynamo.OptimizedModule):
        return model._orig_mod
    if isinstance(model, torch.nn.DataParallel):
        if len(model.device_ids) > 1:
            raise ModelError(
                f"this DataParallel spreads each batch over {len(model.device_ids)} devices, and a budget "
                "cache lies beside one copy of the model: give model.module"
            )
        return model.module
    if isinstance(model, torch.nn.parallel.DistributedDataParallel):
        return model.module
    if hasattr(model, "active_peft_config") and hasattr(model, "get_base_model"):
        return _without_adapters(model)
    return None


def _without_adapters(model: Any) -> Any:
    config = model.active_peft_config
    kind = getattr(config.peft_type, "value", config.peft_type)
    if config.is_prompt_learning:
        raise ModelError(
            f"this PEFT model is of the kind {kind}: it puts learned keys or embeddings before every prompt, "
            "in a cache of its own, which a budget cache cannot hold. Adapters inside of layers, such as "
            "LoRA, are served"
        )
    if getattr(config, "alora_invocation_tokens", None):
        raise ModelError(
            "this PEFT model has an activated LoRA, which acts only after certain tokens and must see the "
            "whole prompt: an ordinary LoRA is served"
        )
    return model.get_base_model()
