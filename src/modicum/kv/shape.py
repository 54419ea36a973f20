"""Shape: what of a model the cache must know."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from modicum.errors import ModelError
from modicum.kv.fingerprint import embedding_checksum
from modicum.kv.inspection import inspect_model
from modicum.kv.layer_shape import LayerShape
from modicum.kv.offload import check_loaded
from modicum.kv.unwrap import unwrap


@dataclass(frozen=True)
class Shape:
    """A model's attention layers, and a fingerprint by which a saved cache knows its model."""

    model_type: str
    layers: tuple[LayerShape, ...]
    dtype: torch.dtype
    fingerprint: int
    """Checksum of a few input embeddings."""
    continues: bool = True
    """Whether calls of several tokens go on from recurrent states; else only the first may have several."""

    @property
    def full(self) -> list[int]:
        """Indices of the layers with full attention: those under the budget."""
        return [i for i, layer in enumerate(self.layers) if layer.is_full]

    def to_json(self) -> dict[str, Any]:
        """Plain values, for a snapshot's header."""
        return {
            "model_type": self.model_type,
            "layers": [layer.to_json() for layer in self.layers],
            "dtype": str(self.dtype).removeprefix("torch."),
            "fingerprint": self.fingerprint,
        }

    @classmethod
    def of(cls, model: PreTrainedModel) -> Shape:
        """Read a model's shape.

        Raises:
            ModelError: the model's attention cannot be taken over, or its weights are not loaded; says why.
        """
        model = unwrap(model)
        if not isinstance(model, PreTrainedModel):
            raise ModelError(
                f"a budget cache needs a transformers model, not {type(model).__name__}: {_remedy(model)}"
            )
        check_loaded(model)
        config = model.config.get_text_config(decoder=True)
        found = inspect_model(model)
        checksum = embedding_checksum(model)
        return cls(config.model_type, found.layers, model.dtype, checksum, found.continues)


def _remedy(given: Any) -> str:
    parts = given.named_modules() if isinstance(given, nn.Module) else ()
    inside = next((name for name, part in parts if isinstance(part, PreTrainedModel)), None)
    return "use modicum.load" if inside is None else f"give the model inside of it, at .{inside}"


def layer_shapes(config: Any) -> tuple[LayerShape, ...]:
    """The attention layers of a decoder, from its configuration alone: for a model that is not loaded."""
    heads = config.num_attention_heads
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    if getattr(config, "multi_query", False) and not hasattr(config, "num_key_value_heads"):
        kv_heads = 1
    dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    return tuple(
        LayerShape(kv_heads, heads // kv_heads, dim, getattr(config, "v_head_dim", None) or dim, window)
        for window in _windows(config)
    )


def _windows(config: Any) -> list[int | None]:
    """Per layer the sliding window, or None; as transformers' DynamicCache reads a config."""
    types = getattr(config, "layer_types", None)
    window = getattr(config, "sliding_window", None)
    if types is None:
        return [window] * config.num_hidden_layers
    return [window if kind == "sliding_attention" else None for kind in types]


def refusal(config: Any) -> str | None:
    """Why `layer_shapes` does not hold for a model with this configuration, or None."""
    if getattr(config, "is_encoder_decoder", False):
        return "it is an encoder-decoder; only decoder-only models have the one cache that is budgeted here"
    if not getattr(config, "num_attention_heads", None):
        return "its configuration names no attention heads"
    if getattr(config, "kv_lora_rank", None):
        return "multi-head latent attention (MLA) stores compressed latents, not keys and values per head"
    if getattr(config, "num_kv_shared_layers", 0):
        return "some of its layers read other layers' keys and values, which eviction would break"
    odd = set(getattr(config, "layer_types", None) or []) - {"full_attention", "sliding_attention"}
    if odd:
        return (
            f"it has layers of type {', '.join(sorted(odd))}; full and sliding-window attention are supported"
        )
    if getattr(config, "attention_chunk_size", None):
        return "chunked attention is not supported; full and sliding-window attention are"
    return None
