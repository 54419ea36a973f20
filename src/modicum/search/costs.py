"""Costs of a block that follow from its form: parameters and multiply-accumulates."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn


def num_parameters(module: nn.Module) -> int:
    """Weights that are learnt; running statistics are not among them."""
    return sum(parameter.numel() for parameter in module.parameters())


@torch.no_grad()
def num_macs(module: nn.Module, example: Tensor) -> int:
    """Multiply-accumulates of convolutions, linear layers and attention products for one example [1, …].

    Norms, activations, pooling and sums are not counted, as usual.
    """
    total = 0

    def count(layer: nn.Module, _: Any, output: Tensor) -> None:
        nonlocal total
        if isinstance(layer, nn.Linear | nn.Conv2d):
            total += output.numel() * math.prod(layer.weight.shape[1:])
        else:
            macs: int = layer.attention_macs(output)  # type: ignore[operator]
            total += macs

    counted = [
        m for m in module.modules() if isinstance(m, nn.Linear | nn.Conv2d) or hasattr(m, "attention_macs")
    ]
    hooks = [layer.register_forward_hook(count) for layer in counted]
    was_training = module.training
    module.eval()
    try:
        module(example)
    finally:
        module.train(was_training)
        for hook in hooks:
            hook.remove()
    return total
