"""Budget: how much a cache may hold, in tokens per KV head or in bytes, and how it is spent."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import Any

from modicum.errors import BudgetError

_UNITS = {"": 1, "k": 1000, "m": 1000**2, "g": 1000**3, "t": 1000**4}
_MOST = 2**31 - 2  # positions are int32, and a newcomer needs a slot
_SHARE = re.compile(r"\s*([0-9]*\.?[0-9]+)\s*%\s*")
_SIZE = re.compile(r"\s*([0-9]*\.?[0-9]+)\s*([kmgt]?)(i?)(b?)\s*", re.IGNORECASE)


@dataclass(frozen=True)
class Budget:
    """A hard limit on what a cache holds between calls. Exactly one of `tokens`, `nbytes` and `share` is
    given.

    Raises:
        BudgetError: a value that cannot be kept, with the limit and the remedy.
    """

    tokens: int | None = None
    """Slots per KV head, on average over heads and layers; every kind of slot counts."""
    nbytes: int | None = None
    """Bytes for one sequence: all layers, keys, values, positions and whatever a policy keeps."""
    chunk: int = 512
    """Tokens taken in at a time; one layer holds that many beyond its budget while it works."""
    n_sink: int = 4
    """First tokens of a sequence that always stay."""
    recent: int = 32
    """Newest tokens that always stay."""
    evict_every: int = 1
    """Tokens evicted at a time in decode; the slack comes out of the budget."""
    share: float | None = None
    """Part of the text's tokens, above 0 and up to 1, for a cache that is told the text's length."""

    def __post_init__(self) -> None:
        if [self.tokens, self.nbytes, self.share].count(None) != 2:
            raise BudgetError(
                "a budget is given in tokens, in bytes or as a share of the text: set exactly one of them"
            )
        for key, least in (("chunk", 1), ("n_sink", 0), ("recent", 0), ("evict_every", 1)):
            _whole(key, getattr(self, key), least)
        if self.nbytes is not None:
            _whole("budget in bytes", self.nbytes, 1)
        if self.share is not None and not 0 < self.share <= 1:
            raise BudgetError(f"the budget is {self.share:.0%} of the text: write it from '1%' to '100%'")
        if self.tokens is not None:
            _whole("budget", self.tokens, 1)
            if self.tokens > _MOST:
                raise BudgetError(f"the budget is {self.tokens} tokens: positions are kept up to {_MOST}")
            self.check_tokens(self.tokens, self.recent, "")

    @classmethod
    def of(cls, value: Any, **settings: int) -> Budget:
        """A budget from a number of tokens, a size as text ("64MiB", "1.5 GB"), a share of the text
        ("12.5%"), or a Budget, which stays as it is.
        """
        if isinstance(value, Budget):
            return value
        if isinstance(value, bool) or not isinstance(value, int | str):
            raise BudgetError(
                f"the budget is {value!r}: give tokens per KV head (2048), a size ('64MiB') or a share of "
                "the text ('12.5%')"
            )
        if isinstance(value, int):
            return cls(tokens=value, **settings)
        if re.fullmatch(r"\s*[-+]?\d+\s*", value):
            return cls(tokens=int(value), **settings)
        if match := _SHARE.fullmatch(value):
            return cls(share=float(match[1]) / 100, **settings)
        return cls(nbytes=parse_size(value), **settings)

    def of_text(self, length: int | None, least: int) -> Budget:
        """A share in tokens, for a text of so many; other budgets as they are. Never below `least`.

        Raises:
            BudgetError: a share, and no length is known.
        """
        if self.share is None:
            return self
        if length is None:
            raise BudgetError(
                f"a budget of {self.share:.4g} of the text needs the text's length: give "
                "BudgetCache(..., length=tokens), or a budget in tokens or bytes"
            )
        return replace(self, share=None, tokens=max(least, int(self.share * length)))

    def check_tokens(self, tokens: int, window: int, whose: str, virtual: bool = False) -> None:
        """Raise unless `tokens` slots hold the sinks, the recent window (or the policy's) and the slack.

        virtual: whether one slot more is for RazorAttention's virtual token.
        """
        least = self.least(window) + virtual
        if tokens < least:
            recent = max(self.recent, window)
            slack = f" + {self.evict_every - 1} of slack (evict_every {self.evict_every})" * (
                self.evict_every > 1
            )
            slack += " + 1 virtual token" * virtual
            raise BudgetError(
                f"a budget of {tokens} tokens per KV head{whose} is too small for {self.n_sink} sinks + "
                f"{recent} recent tokens{slack}: give at least {least}, or lower n_sink, recent or the "
                "policy's window"
            )

    def least(self, window: int) -> int:
        """The fewest slots a head can work with under a policy that needs `window` newest tokens."""
        return max(1, self.n_sink + max(self.recent, window)) + self.evict_every - 1


def parse_size(text: str) -> int:
    """Bytes in a size such as "64MiB", "1.5GB" or "300 kB" (KiB = 1024 bytes, kB = 1000)."""
    match = _SIZE.fullmatch(text)
    if match is None or not (match[2] or match[4]):
        raise BudgetError(
            f"cannot read the budget {text!r}: write tokens (2048) or a size ('64MiB', '1.5GB')"
        )
    unit = _UNITS[match[2].lower()]
    if match[3]:
        unit = 1024 ** (["", "k", "m", "g", "t"].index(match[2].lower()))
    size = int(float(match[1]) * unit)
    if size < 1:
        raise BudgetError(f"the budget {text!r} is no memory at all: give a size such as '64MiB'")
    return size


def format_size(nbytes: int) -> str:
    """A size for people: 1536 -> "1.5 KiB"."""
    size = float(nbytes)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size < 1024:
            return f"{size:.0f} B" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.1f} TiB"


def _whole(key: str, value: Any, least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise BudgetError(f"{key} is {value!r}: it must be a whole number of at least {least}")
