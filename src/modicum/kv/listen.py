"""A model whose attention goes through another function for a while, so that it can be read."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from transformers import AttentionInterface, PreTrainedModel
from transformers.masking_utils import AttentionMaskInterface

from modicum.errors import ModelError


@contextmanager
def attention_through(
    model: PreTrainedModel, name: str, function: Callable[..., Any], done: str
) -> Iterator[None]:
    """The model in evaluation mode with its attention registered as `name`; afterwards as it was before.

    Args:
        model: any whose attention goes through transformers' attention interface.
        name: under which transformers will know the function; it gets no mask.
        function: as transformers calls attention functions.
        done: what is done to the model, for the error: "probed".

    Raises:
        ModelError: the model's attention cannot be changed so.
    """
    parts = {key: getattr(model.config, key, None) for key in model.config.sub_configs}
    original = {key: part._attn_implementation for key, part in parts.items() if part is not None}
    original[""] = model.config._attn_implementation
    AttentionInterface.register(name, function)
    AttentionMaskInterface.register(name, lambda **_: None)
    training = [m for m in model.modules() if m.training]
    try:
        model.train(False)
        model.set_attn_implementation(name)
        if model.config._attn_implementation != name:
            raise ModelError(
                f"{type(model).__name__} cannot be {done}: its attention does not go through transformers' "
                "attention interface"
            )
        yield
    finally:
        model.set_attn_implementation(original)
        for module in training:
            module.training = True
