"""Turn: where a conversation is that a cache has read by a chat template."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field

from torch import Tensor

from modicum.kv.cache import BudgetCache

_NOTE = "chat"


@dataclass
class Turn:
    """How far a cache's conversation has come; in the cache's notes, so that copies and files have it."""

    tails: list[str] = field(default_factory=list)
    """Per row, what the template puts between the user's text and the answer; empty once that is read."""
    spaced: list[bool] = field(default_factory=list)
    """Per row, whether the user's text so far ends in white space."""
    last: list[int] = field(default_factory=list)
    """Per row, the newest token."""
    seen: int = 0
    """Tokens in the cache; another number there says that it was fed without a template since."""

    @property
    def is_open(self) -> bool:
        """Whether the user's turn goes on: text, or a question, may follow."""
        return bool(self.tails)

    @classmethod
    def of(cls, cache: BudgetCache) -> Turn | None:
        """The turn of a cache; None where it is empty, or has read text without a template."""
        note = cache.notes.get(_NOTE)
        if note is None or note["seen"] != cache.seen or len(note["last"]) != cache.batch_size:
            return None
        return cls(**note)

    def read(self, ids: Tensor, valid: Tensor | None) -> None:
        """Take note of new tokens of the answer: ids [B, n], valid [B, n] with False for padding."""
        for row, tokens in enumerate(ids.tolist()):
            told = (
                tokens
                if valid is None
                else [t for t, is_told in zip(tokens, valid[row], strict=True) if is_told]
            )
            if told:
                self.last[row] = told[-1]

    def keep(self, cache: BudgetCache) -> None:
        """Note the turn in the cache."""
        self.seen = cache.seen
        cache.notes[_NOTE] = asdict(self)

    @staticmethod
    def drop(cache: BudgetCache) -> None:
        """Note that the cache reads text without a template."""
        cache.notes.pop(_NOTE, None)
