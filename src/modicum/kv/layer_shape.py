"""LayerShape: what the cache must know of one layer of a model."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, fields
from typing import Any


@dataclass(frozen=True)
class LayerShape:
    """One attention layer."""

    kv_heads: int
    """0 for a layer without attention: a recurrent one, or one that keeps nothing."""
    group: int
    """Query heads per KV head."""
    key_dim: int
    value_dim: int
    window: int | None
    """Tokens a sliding-window or chunked layer looks back on; None for full attention."""
    order: int = field(default=0, compare=False)
    """Place among the layers with full attention, in the order in which a call reaches them."""
    is_latent: bool = False
    """Latent attention: one KV head, whose values are the first `value_dim` numbers of its keys."""
    has_sinks: bool = False
    """A learned logit per query head joins the softmax (gpt-oss)."""
    num_readers: int = 0
    """Later layers that read this layer's keys and values (Gemma 3n, Gemma 4)."""
    hides_use_cache: bool = False
    """The model tells its attention `use_cache=False` whatever the call says (LongCat-Flash)."""
    num_states: int = 0
    """Convolution and recurrent states that the layer keeps, beside attention or instead of it."""
    state_nbytes: int = 0
    """Bytes of those states for one sequence; they do not grow."""

    def to_json(self) -> dict[str, Any]:
        """Plain values, for a snapshot's header: the sizes, and what else is not as in a plain layer."""
        plain = {f.name: f.default for f in fields(self)}
        return {
            key: value for key, value in asdict(self).items() if value != plain[key] and key != "order"
        } | {"window": self.window}

    @property
    def is_full(self) -> bool:
        """Whether this is a layer with full attention: under the budget."""
        return self.kv_heads > 0 and self.window is None

    @property
    def stored_value_dim(self) -> int:
        """Numbers that a slot holds for values: none where they are part of the key."""
        return 0 if self.is_latent else self.value_dim
