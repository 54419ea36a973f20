"""Generation: what came of one prompt."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from modicum.kv.cache import BudgetCache

FinishReason = Literal["stop", "length", "interrupted"]


@dataclass(frozen=True)
class Timings:
    """Seconds and tokens per second, scoring and eviction included; in a batch, of all its rows together."""

    prefill_seconds: float
    """Taking in the prompt and the question, up to the logits of the first token."""
    decode_seconds: float
    """From the first token on, each token taken into the cache."""
    prefill_tokens_per_second: float | None
    """None when nothing was taken in."""
    decode_tokens_per_second: float | None
    """None when no token was made."""
    time_to_first_token: float | None
    """Seconds from the start of the prefill; None when no token was made."""


@dataclass(frozen=True)
class Memory:
    """Bytes of the whole cache, all rows of a batch together."""

    nbytes: int
    """Live storage at the end."""
    peak_nbytes: int
    """Most ever held by this cache, the chunk in hand included."""
    budget_nbytes: int
    """What the budget allows between calls."""
    full_nbytes: int
    """What a full cache of the tokens seen would hold."""


@dataclass(frozen=True)
class Generation:
    """The answer to one prompt, and what it cost."""

    text: str
    """The new tokens as text, special tokens left out."""
    tokens: list[int]
    """The new tokens, the one that ended the answer included."""
    prompt_tokens: int
    """Tokens of this call's prompt and question."""
    finish_reason: FinishReason
    """"stop": an end-of-sequence token or stop string; "length": a limit on tokens or time; "interrupted"."""
    timings: Timings
    memory: Memory
    seen: int
    """Tokens that the cache has seen of this row since its start, this answer included."""
    held: tuple[int, int]
    """Fewest and most slots in use in any KV head of any layer, of this row."""
    cache: BudgetCache = field(repr=False, compare=False)
    """Has seen everything above: pass it on as `cache=` for the next turn."""

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON; the cache is left out."""
        return {
            "text": self.text,
            "tokens": list(self.tokens),
            "prompt_tokens": self.prompt_tokens,
            "finish_reason": self.finish_reason,
            "timings": asdict(self.timings),
            "memory": asdict(self.memory),
            "seen": self.seen,
            "held": {"min": self.held[0], "max": self.held[1]},
        }

    def __str__(self) -> str:
        return self.text


def held_range(cache: BudgetCache, row: int) -> tuple[int, int]:
    """Fewest and most slots in use in any head of a row; (0, 0) before the first call."""
    counts = [layer[row] for layer in cache.held if layer.shape[0] > row and layer.shape[1]]
    if not counts:
        return 0, 0
    return min(int(c.min()) for c in counts), max(int(c.max()) for c in counts)


def memory_of(cache: BudgetCache, peak: int = 0) -> Memory:
    """The cache's bytes now; `peak`: the most that a copy of it which did the work has held."""
    return Memory(cache.nbytes, max(peak, cache.peak_nbytes), cache.budget_nbytes, cache.full_nbytes)
