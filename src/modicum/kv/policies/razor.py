"""RazorAttention (Tang et al., 2024): the heads that retrieve hold the context, the others only stream."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar

from torch import Tensor

from modicum.errors import BudgetError, PolicyError
from modicum.kv.policy import Policy, check_between, check_flag
from modicum.kv.registry import alias, register
from modicum.kv.view import View

if TYPE_CHECKING:
    from modicum.kv.heads import HeadScores


def _fallback() -> Policy:
    from modicum.kv.policies.keydiff import KeyDiff

    return KeyDiff()


@register
@dataclass(frozen=True)
class RazorAttention(Policy):
    """Retrieval heads hold nearly all of the budget; the others stream, with one virtual token for what left.

    A probe (`modicum.kv.heads.probe`) scores every head by its attention to earlier copies of a random text.
    Those with the highest share `echo` (weight on the same token one copy earlier) or `induction` (weight on
    the token after it) of all KV heads are the retrieval heads. The paper bounds nothing in them; under a
    hard budget they share equally what the other heads leave, and past that go by the score of `base`. The
    others keep the sinks and the last tokens, `1/share` of the budget (the paper's C, its buffer being N/C),
    and with `compensate` one slot of it is the virtual token of `modicum.kv.compensation`.
    """

    name: ClassVar[str] = "razor"
    title: ClassVar[str] = "RazorAttention"
    paper: ClassVar[str] = "https://arxiv.org/abs/2407.15891"
    summary: ClassVar[str] = (
        "Retrieval heads hold the context, the others sinks, recent tokens and one mean token."
    )

    base: Policy = field(default_factory=_fallback)
    """Scores the tokens of retrieval heads once they no longer all fit."""
    echo: float = 0.01
    induction: float = 0.14
    strong: float = 1
    """Heads whose induction score is as high as this retrieve too, however many they are; not in the paper,
    whose shares are of a thousand heads. At 1 there are none."""
    share: float = 5
    compensate: bool = True
    heads: str | None = None
    """File of saved head scores; None: the cache probes the model, once."""

    def __post_init__(self) -> None:
        if not isinstance(self.base, Policy):
            raise PolicyError(f"razor: base is {self.base!r}; it must be a policy, such as 'keydiff'")
        if not self.base.evicts:
            raise PolicyError(
                f"razor: {self.base} never evicts, so it cannot serve as fallback: use 'keydiff'"
            )
        object.__setattr__(self, "base", self.base.per_head())
        check_between(self, 0, 1, echo=self.echo, induction=self.induction, strong=self.strong)
        check_between(self, 1, math.inf, share=self.share)
        check_flag(self, compensate=self.compensate)
        if self.heads is not None and not isinstance(self.heads, str):
            raise PolicyError(f"razor: heads is {self.heads!r}; it is the path of saved head scores, or None")

    def retrieval(self, scores: HeadScores) -> list[list[bool]]:
        """[layers][KV heads]: which heads retrieve. Equals go by layer, then by head, lower first."""
        heads = [(i, j) for i, n in enumerate(scores.heads) if i not in scores.skipped for j in range(n)]
        chosen: set[tuple[int, int]] = set()
        for part, table in ((self.echo, scores.echo), (self.induction, scores.induction)):
            number = math.ceil(part * len(heads) - 1e-9)  # 0.14 · 100 is a little more than 14
            chosen.update(sorted(heads, key=lambda at: -table[at[0]][at[1]])[:number])
        chosen.update((i, j) for i, j in heads if scores.induction[i][j] >= self.strong < 1)
        return [[(i, j) in chosen for j in range(n)] for i, n in enumerate(scores.heads)]

    def head_budgets(self, scores: HeadScores, budget: int, sinks: int, recent: int) -> list[list[int]]:
        """[layers][KV heads]: slots per KV head, the virtual token's included; `budget` on average at most.

        Layers that the probe skipped (sliding windows) take no part: `budget` stands there.

        Raises:
            BudgetError: the budget does not hold sinks, recent tokens and the virtual token.
        """
        least = sinks + recent + int(self.compensate)
        if budget < least:
            raise BudgetError(
                f"a budget of {budget} tokens per KV head is too small for RazorAttention's {sinks} sinks + "
                f"{recent} recent tokens{' + 1 virtual token' * self.compensate}: give at "
                f"least {least}, or fewer of them"
            )
        retrieval = self.retrieval(scores)
        kinds = [kind for i, layer in enumerate(retrieval) if i not in scores.skipped for kind in layer]
        found = sum(kinds)
        if found in (0, len(kinds)):
            return [[budget] * len(layer) for layer in retrieval]
        small = max(least, round(budget / self.share))
        each, left = divmod(len(kinds) * budget - (len(kinds) - found) * small, found)
        slots = []
        for i, layer in enumerate(retrieval):
            if i in scores.skipped:
                slots.append([budget] * len(layer))
                continue
            row = []
            for kind in layer:
                row.append(each + (left > 0) if kind else small)
                left -= kind
            slots.append(row)
        return slots

    def score(self, view: View) -> Tensor:
        """The base's score, for retrieval heads; the cache streams in the others."""
        return self.base.score(view)

    def ranking(self, view: View) -> Tensor:
        return self.base.ranking(view)

    def head_scores(self, view: View) -> Tensor:
        return self.base.head_scores(view)

    @property
    def query_rows(self) -> int:
        return self.base.query_rows

    @property
    def kept_queries(self) -> int:
        return self.base.kept_queries

    def tally_width(self, group: int, key_dim: int) -> int:
        return self.base.tally_width(group, key_dim)

    @property
    def needs_rotary(self) -> bool:
        return self.base.needs_rotary

    @property
    def needs_regression(self) -> bool:
        return self.base.needs_regression

    @property
    def replays(self) -> bool:
        return self.base.replays

    @property
    def needs_residual_norms(self) -> bool:
        return self.base.needs_residual_norms

    @property
    def window(self) -> int:
        return self.base.window

    @property
    def needs_output_weight(self) -> bool:
        return self.base.needs_output_weight

    def state_width(self, group: int) -> int:
        return self.base.state_width(group)

    def token_state(self, keys: Tensor, values: Tensor, group: int, output_weight: Tensor | None) -> Tensor:
        return self.base.token_state(keys, values, group, output_weight)

    def sum_width(self, key_dim: int, value_dim: int) -> int:
        return self.base.sum_width(key_dim, value_dim)

    def summand(self, keys: Tensor, values: Tensor, state: Tensor) -> Tensor:
        return self.base.summand(keys, values, state)

    def probe(self, sums: Tensor) -> Tensor | None:
        return self.base.probe(sums)

    @property
    def layerwise(self) -> bool:
        return self.base.layerwise

    @property
    def is_rotation_invariant(self) -> bool:
        return self.base.is_rotation_invariant

    @property
    def traceable(self) -> bool:
        return self.base.traceable

    @property
    def accumulates(self) -> bool:
        return self.base.accumulates

    def observe(self, view: View) -> Tensor | None:
        return self.base.observe(view)


alias("razorattention", "razor")
