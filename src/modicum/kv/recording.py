"""Recording: a cache that keeps nothing and notes how a model's layers use it."""

from __future__ import annotations

from typing import Any, NoReturn

import torch
from torch import Tensor
from transformers.cache_utils import CacheLayerMixin

from modicum.errors import ModelError
from modicum.kv.latent import announce
from modicum.kv.shared import Handle

_UNSUPPORTED = ("position_bias", "cache")


class RecordingLength(int):
    """The length that a recording layer reports; our mask function then leaves the padding mask as it is."""


class RecordingHandle(Handle):
    """Stands where a model expects keys and values; notes the attention call that it is handed to.

    Raises:
        ModelError: the model does anything else with it.
    """

    def __init__(self, layer: RecordingLayer) -> None:
        self.layer: Any = layer

    def __getattr__(self, name: str) -> NoReturn:
        _refuse(name)

    @classmethod
    def __torch_function__(cls, function: Any, *_: Any) -> NoReturn:
        _refuse(getattr(function, "__name__", "a torch function"))

    def record(
        self, module: torch.nn.Module, query: Tensor, mask: Tensor | None, kwargs: dict[str, Any]
    ) -> Tensor:
        """Note one attention call; query [B, Hq, q, Dk] -> zeros [B, q, Hq, Dv].

        Raises:
            ModelError: the call asks for something that budgeted attention does not do.
        """
        layer: RecordingLayer = self.layer
        for name in _UNSUPPORTED:
            if kwargs.get(name) is not None:
                raise ModelError(f"its attention is given {name!r}, which is not supported")
        if getattr(module, "is_causal", True) is False:
            raise ModelError(
                "its attention looks at later tokens too (the class of an encoder is causal only with "
                "is_decoder=True in its configuration)"
            )
        if mask is not None and mask.dim() != 2:
            raise ModelError("it builds an attention mask of its own, which eviction would make wrong")
        if layer.is_read:
            layer.num_readers += 1
        layer.is_read = True
        layer.num_query_heads = query.shape[1]
        layer.hides_use_cache = layer.hides_use_cache or kwargs.get("use_cache") is False
        layer.has_sinks = layer.has_sinks or kwargs.get("s_aux") is not None
        return query.new_zeros(query.shape[0], query.shape[2], query.shape[1], layer.output_dim(module))


def _refuse(operation: str) -> NoReturn:
    raise ModelError(
        f"its attention changes what the cache returns ({operation}) before it attends, so keys and values "
        "cannot be evicted per head"
    )


class RecordingLayer(CacheLayerMixin):  # type: ignore[misc]  # transformers is not typed
    """One layer with full attention; notes the shapes of its keys and values.

    Args:
        is_latent: whether the model expands what the layer gives back (latent attention), so that it needs
            tensors.
        order: takes the layer when a call reaches it.
    """

    is_sliding = False

    def __init__(self, is_latent: bool, order: list[RecordingLayer]) -> None:
        super().__init__()
        self.is_latent = is_latent
        self.order = order
        self.num_query_heads = 0
        self.key_shape: torch.Size | None = None
        """[B, H, q, Dk] of the keys that came."""
        self.value_shape: torch.Size | None = None
        self.is_read = False
        """Whether attention got what `update` returned."""
        self.num_readers = 0
        """Further layers whose attention got it too."""
        self.has_sinks = False
        self.hides_use_cache = False

    def output_dim(self, module: torch.nn.Module) -> int:
        """Numbers of one query head's output."""
        if self.is_latent:
            return int(getattr(module, "v_head_dim"))  # noqa: B009  # of a module whose class is not known
        assert self.value_shape is not None
        return self.value_shape[-1]

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
        if self.key_shape is not None:
            raise ModelError("it gives one layer of the cache keys and values twice in a call")
        self.key_shape, self.value_shape = key_states.shape, value_states.shape
        self.order.append(self)
        handle = RecordingHandle(self)
        if self.is_latent:
            announce(handle, None, value_states, is_first=True)
            return key_states, value_states
        return handle, handle

    def __deepcopy__(self, memo: dict[int, Any]) -> RecordingLayer:
        # A model that runs its layers in loops makes its own copies of the cache's layers.
        return type(self)(self.is_latent, self.order)

    def get_seq_length(self, *args: Any) -> int:
        return 0

    def get_mask_sizes(self, query_length: int | Tensor) -> tuple[int, int]:
        return RecordingLength(query_length if isinstance(query_length, int) else query_length.shape[0]), 0

    def get_max_length(self) -> int:
        return -1

    get_max_cache_shape = get_max_length
