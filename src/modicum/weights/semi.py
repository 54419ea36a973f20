"""Semi-structured: 2:4 weights in the form whose products a GPU has units for."""

from __future__ import annotations

import warnings

import torch
from torch import Tensor, nn
from torch.sparse import to_sparse_semi_structured
from transformers import PreTrainedModel

from modicum.weights.blocks import blocks_of

CAPABILITY = (8, 0)
"""The first GPUs that have them (Ampere)."""


def convert(model: PreTrainedModel) -> int:
    """Change the blocks' linear layers whose weights are 2:4 into torch's semi-structured tensors, in place;
    how many were. The rest stays dense, all of it where the device or dtype has no such products: a warning
    says so.
    """
    device, dtype = model.device, model.dtype
    if why := _refused(device, dtype):
        warnings.warn(f"weights stay dense: {why}", stacklevel=2)
        return 0
    number = 0
    for block in blocks_of(model):
        for module in nn.Module.modules(block.module):
            if type(module) is not nn.Linear or not is_2_of_4(module.weight):
                continue
            try:
                weight = to_sparse_semi_structured(module.weight.detach())
            except RuntimeError:  # a shape that the products do not take
                continue
            module.weight = nn.Parameter(weight, requires_grad=False)
            number += 1
    if number == 0:
        warnings.warn("weights stay dense: none is 2:4; prune with pattern='2:4'", stacklevel=2)
    return number


def is_2_of_4(weight: Tensor) -> bool:
    """Whether at least 2 of each 4 consecutive inputs are zero."""
    return weight.shape[1] % 4 == 0 and bool(((weight.view(-1, 4) != 0).sum(1) <= 2).all())


def _refused(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why 2:4 products cannot be had, or None."""
    if device.type != "cuda":
        return f"{device.type} has no 2:4 products, a CUDA GPU has"
    if torch.cuda.get_device_capability(device) < CAPABILITY:
        return f"{torch.cuda.get_device_name(device)} is older than 2:4 products (capability 8.0)"
    if dtype not in (torch.float16, torch.bfloat16):
        return f"2:4 products are of 16 bits, the model is {dtype}: load it with dtype='bfloat16'"
    return None
