"""Output weight: the output projection of an attention layer, in slices of its query heads."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.pytorch_utils import Conv1D

from modicum.errors import ModelError
from modicum.kv.layer_shape import LayerShape
from modicum.kv.offload import offloaded_value

PROJECTIONS = ("o_proj", "out_proj", "dense", "c_proj", "wo")


def output_weight(module: torch.nn.Module, shape: LayerShape, device: torch.device, who: str) -> Tensor:
    """[H, G, Dv, hidden] of an attention layer, a view of its weight; `who` needs it, in messages.

    Raises:
        ModelError: the layer keeps latents, or has no projection that is a plain matrix.
    """
    if shape.is_latent:
        raise ModelError(
            f"{who} needs the output projection of values, and {type(module).__name__} keeps latents in "
            "their place: use another policy"
        )
    for name in PROJECTIONS:
        projection: Any = getattr(module, name, None)
        weight = getattr(projection, "weight", None)
        if isinstance(weight, Tensor) and weight.is_meta:
            kept = offloaded_value(projection, "weight", from_disk=True)
            weight = kept if kept is None else kept.to(device)
        if isinstance(weight, Tensor) and weight.is_floating_point() and weight.dim() == 2:
            inputs_first = weight.detach() if isinstance(projection, Conv1D) else weight.detach().t()
            return inputs_first.reshape(shape.kv_heads, shape.group, shape.value_dim, -1)
    raise ModelError(
        f"{who} needs the output projection, and {type(module).__name__} has none by the names "
        f"{', '.join(PROJECTIONS)} that is a plain matrix: use another policy"
    )
