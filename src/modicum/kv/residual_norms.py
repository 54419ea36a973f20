"""Residual norms: how long the vectors are to which each attention layer's output is added."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel

from modicum.kv.output_weight import PROJECTIONS


@contextmanager
def residual_norms(model: PreTrainedModel) -> Iterator[dict[int, Tensor]]:
    """Layer -> L2 norms [B, n] fp32 of the inputs of the decoder layer that holds its attention, from this
    thread's calls of the model; the newest call's. Layers that are built otherwise are left out.
    """
    found: dict[int, Tensor] = {}
    thread = threading.get_ident()

    def note(layer: int) -> Any:
        def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            states = args[0] if args else kwargs.get("hidden_states")
            if threading.get_ident() == thread and isinstance(states, Tensor) and states.dim() == 3:
                found[layer] = states.detach().float().norm(dim=-1)

        return hook

    hooks = [
        parent.register_forward_pre_hook(note(child.layer_idx), with_kwargs=True)
        for parent in model.modules()
        for child in parent.children()
        if isinstance(getattr(child, "layer_idx", None), int)
        and any(hasattr(child, name) for name in PROJECTIONS)
    ]
    try:
        yield found
    finally:
        for handle in hooks:
            handle.remove()
