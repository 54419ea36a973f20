"""Row: what one sample under one setting gave and cost: a line of JSON, the same for us and for peers."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, fields
from typing import Any


@dataclass(frozen=True)
class Cell:
    """One setting of the grid; rows of a cell are averaged."""

    system: str
    """"modicum", or a peer: "kvpress", "transformers"."""
    model: str
    policy: str
    """Our policy expression, or the peer's press in its own words; "full" for the whole cache."""
    budget: str
    """As asked for: "256" tokens per KV head, "64MiB", "25%" of the context; "full" for the whole cache."""
    task: str
    length: int | None
    question: str
    """"hidden": the context is compressed before the question is known; "seen": both together."""
    chunk: int | None
    """Tokens taken in at a time; None for all at once."""
    seed: int
    dtype: str
    n_sink: int | None = None
    recent: int | None = None
    evict_every: int | None = None
    positions: str = "original"
    store: str = "model"


@dataclass(frozen=True)
class Row:
    """One sample's result."""

    cell: Cell
    index: int
    score: float
    """0 to 1, higher is better; for the metric "loss" the mean loss in nats, lower is better."""
    metric: str
    output: str
    answers: list[str]
    context_tokens: int
    new_tokens: int
    depth: float | None
    """Place of the first needle in the context, 0 to 1."""
    held_bytes: int
    """Live storage of the cache when the answer was done: keys, values, positions, policy state."""
    context_bytes: int
    """The same after the context was read, before the question (question hidden), or before the answer."""
    peak_bytes: int
    """Most ever held by the cache, the chunk in hand included."""
    full_bytes: int
    """What a full cache of the tokens seen holds."""
    held_tokens: tuple[int, int]
    """Fewest and most slots in use in any KV head after the context was read."""
    prefill_seconds: float
    decode_seconds: float
    versions: dict[str, str] = field(default_factory=dict)
    """Of modicum (or the peer), torch and transformers."""
    extra: dict[str, Any] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """As written to a line of JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Row:
        """What `to_dict` wrote; unknown names of later versions are left out."""
        known = {f.name for f in fields(cls)}
        kept = {name: value for name, value in values.items() if name in known}
        kept["cell"] = Cell(**values["cell"])
        kept["held_tokens"] = tuple(values["held_tokens"])
        return cls(**kept)
