"""CodedCache: transformers' full cache of what is left of keys and values in slots of few bits."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from modicum.kv.codec import Codec
from modicum.kv.shape import Shape
from modicum.kv.store import Store


class CodedCache(DynamicCache):
    """Each vector of a layer with full attention coded and decoded in the model's own space, none evicted.

    What a budget cache with room for everything attends to, by transformers' own attention.
    """

    def __init__(self, model: PreTrainedModel, store: str) -> None:
        super().__init__(config=model.config)
        self.shape, self.store = Shape.of(model), Store(store)

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Latents and their rotary part, which take the places of keys and values, are two of a kind."""
        layer = self.shape.layers[layer_idx]
        if layer.is_full:
            of_values = self.store.keys if layer.is_latent else self.store.values
            key_states = _left(self.store.keys, key_states)
            value_states = _left(of_values, value_states)
        return super().update(key_states, value_states, layer_idx, *args, **kwargs)  # type: ignore[no-any-return]


def _left(codec: Codec, x: Tensor) -> Tensor:
    own = Codec(codec.name, rotates_back=True)
    return own.decode(own.encode(x), x.dtype)
