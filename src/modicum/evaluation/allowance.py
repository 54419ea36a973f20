"""Allowance: a budget as it is asked for in an evaluation, and what it comes to for one sample."""

from __future__ import annotations

import re
from dataclasses import dataclass

from modicum.errors import BudgetError
from modicum.kv.budget import Budget, parse_size
from modicum.kv.plan import fewest
from modicum.kv.policy import Policy

FULL = "full"

_SHARE = re.compile(r"([0-9]*\.?[0-9]+)%")


@dataclass(frozen=True)
class Allowance:
    """ "256": tokens per KV head. "64MiB": bytes. "25%": that share of the context. "full": all of it."""

    text: str

    @classmethod
    def parse(cls, value: str | int) -> Allowance:
        """Read one as a user writes it; equal ones come out equal ("025 %" is "25%").

        Raises:
            BudgetError: it is none of the four.
        """
        text = re.sub(r"\s", "", str(value))
        if text.lower() == FULL:
            return cls(FULL)
        if re.fullmatch(r"[-+]?\d+", text):
            return cls(str(Budget(tokens=int(text), n_sink=0, recent=0).tokens))
        if text.endswith("%"):
            match = _SHARE.fullmatch(text)
            share = float(match[1]) if match else 0.0
            if not 0 < share <= 100:
                raise BudgetError(f"the budget {value!r} is no share: write it from '1%' to '100%'")
            return cls(f"{share:g}%")
        try:
            parse_size(text)
        except BudgetError as error:
            raise BudgetError(
                f"cannot read the budget {value!r}: write tokens per KV head ('256'), a size ('64MiB'), a "
                "share of the context ('25%') or 'full'"
            ) from error
        return cls(text)

    @property
    def share(self) -> float | None:
        """0 to 1 where it is a share."""
        return float(self.text[:-1]) / 100 if self.text.endswith("%") else None

    def budget(
        self,
        policy: Policy,
        context: int,
        total: int,
        *,
        chunk: int,
        n_sink: int,
        recent: int,
        evict_every: int,
    ) -> Budget:
        """What it comes to under a policy for a sample of `context` tokens, `total` with question and answer.

        A share never comes to less than the policy can work with; the full cache has room for `total`.

        Raises:
            BudgetError: sinks, recent window and slack do not fit.
        """
        if self.text == FULL:
            return Budget(tokens=max(1, total), chunk=chunk, n_sink=0, recent=0)
        settings = {"chunk": chunk, "n_sink": n_sink, "recent": recent, "evict_every": evict_every}
        asked = Budget.of(self.text, **settings)
        return asked.of_text(context, fewest(policy, asked))
