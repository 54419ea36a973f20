"""Gradients: attention through a budget cache has none, and a backward pass that needs one is refused."""

from __future__ import annotations

from typing import Any, NoReturn

import torch
from torch import Tensor

from modicum.errors import CacheError


class _NoBackward(torch.autograd.Function):
    """Identity whose backward raises: it holds no tensor, so a graph keeps nothing of the cache alive."""

    @staticmethod
    def forward(ctx: Any, output: Tensor, *inputs: Tensor) -> Tensor:
        return output.view_as(output)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> NoReturn:
        raise CacheError(
            "a budget cache is for inference and passes no gradients on, so they would be wrong: train "
            "without a cache (use_cache=False), or run the model under torch.no_grad() or inference_mode()"
        )


def without_backward(output: Tensor, *inputs: Tensor) -> Tensor:
    """`output`, which torch takes as computed from `inputs`; a backward pass through it raises.

    A model's parameters require gradients by default, so a plain call outside `torch.no_grad()` asks for them
    without meaning it. It is served; only `backward()` is refused.

    Raises:
        CacheError: in the backward pass.
    """
    if not torch.is_grad_enabled() or not any(x.requires_grad for x in inputs):
        return output
    guarded: Tensor = _NoBackward.apply(output, *inputs)  # type: ignore[no-untyped-call]  # torch's
    return guarded
