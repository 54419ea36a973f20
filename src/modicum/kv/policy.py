"""Policy: what one is, and what its score is made with."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, fields, replace
from typing import Any, ClassVar, Literal, Self

import torch
from torch import Tensor

from modicum.errors import PolicyError
from modicum.kv.view import View

GroupReduction = Literal["mean", "max", "rss"]

ALL = -1
"""Value of `Policy.query_rows` that asks for every query of the call, not only the last few."""


def reduce_group(x: Tensor, how: GroupReduction) -> Tensor:
    """Join the query heads of a group: x [B, H, G, N] -> [B, H, N]."""
    if x.shape[2] == 1:
        return x.squeeze(2)
    if how == "mean":
        return x.mean(2)
    if how == "max":
        return x.amax(2)
    return x.square().sum(2).sqrt()


@dataclass(frozen=True)
class Policy:
    """A rule for what to keep: settings as fields, one `score`; higher is kept, ties keep the more recent
    token.

    Subclasses are frozen dataclasses. They see tensors only; sinks, recent tokens, chunks, budgets and
    memory are the engine's. Register one with `@register` to call it by name.
    """

    name: ClassVar[str] = ""
    title: ClassVar[str] = ""
    paper: ClassVar[str] = ""
    summary: ClassVar[str] = ""

    def score(self, view: View) -> Tensor:
        """[B, H, N] fp32; what stands where there is no token, or a protected one, is not looked at."""
        raise PolicyError(f"{type(self).__name__} has no score: write `def score(self, view)`")

    def ranking(self, view: View) -> Tensor:
        """[B, H, N]: anything that rises with the score within each head; what a single drop is chosen by."""
        return self.score(view)

    def head_scores(self, view: View) -> Tensor:
        """Score per query head, before the group is joined: [B, H, G, N]. G is 1 where there is none."""
        return self.score(view).unsqueeze(2)

    @property
    def query_rows(self) -> int:
        """Last queries whose attention rows the policy reads: 0, a number, or `ALL` those of the call."""
        return 0

    @property
    def kept_queries(self) -> int:
        """Last queries that are kept from call to call (and counted as bytes): those of `query_rows`.

        With `ALL` none, unless a policy says how many it wants to see before those of the call.
        """
        return max(0, self.query_rows)

    @property
    def window(self) -> int:
        """Newest tokens that the policy must have protected (their evidence is incomplete)."""
        return 0

    @property
    def evicts(self) -> bool:
        """False for the policy that never lets go: a cache that does not fit is then an error."""
        return True

    @property
    def needs_output_weight(self) -> bool:
        """Whether `view.output_weight` must be there."""
        return False

    def state_width(self, group: int) -> int:
        """Numbers the policy keeps per token and KV head of `group` query heads (fp32, counted as bytes)."""
        return 0

    def token_state(self, keys: Tensor, values: Tensor, group: int, output_weight: Tensor | None) -> Tensor:
        """The numbers of new tokens, keys [B, H, m, Dk] and values [B, H, m, Dv]: [B, H, m, F] fp32;
        zeros at first.
        """
        return torch.zeros(*keys.shape[:3], self.state_width(group), device=keys.device)

    @property
    def accumulates(self) -> bool:
        """Whether `observe` is to be called after each attention, whether or not something must go."""
        return False

    def observe(self, view: View) -> Tensor | None:
        """The new state [B, H, N, F] after the attention of a call; `view.state` may be changed and
        returned, and `view.tally` be added to.
        """
        return view.state

    def sum_width(self, key_dim: int, value_dim: int) -> int:
        """Numbers per KV head that the policy sums over the tokens held (fp64, counted as bytes)."""
        return 0

    def summand(self, keys: Tensor, values: Tensor, state: Tensor) -> Tensor:
        """What each token adds to them: keys [B, H, n, Dk], values [B, H, n, Dv], state -> [B, H, n, F].

        In decode the sums are kept by adding what comes and taking away what goes; `view.sums` has them.
        """
        return keys[..., :0]

    def tally_width(self, group: int, key_dim: int) -> int:
        """Numbers per KV head of `group` query heads that the policy adds up over all that it reads, in
        `view.tally` (fp64, counted as bytes); zeros at first.
        """
        return 0

    @property
    def needs_rotary(self) -> bool:
        """Whether `view.rotary` must be there: the model is one with a rotary embedding."""
        return False

    @property
    def needs_regression(self) -> bool:
        """Whether `view.newcomer_scores` must be there: the model's calibration has a `TokenRegression`."""
        return False

    @property
    def replays(self) -> bool:
        """Whether a prompt's chunks are to be read a second time, storing nothing, for `view.replay`."""
        return False

    @property
    def needs_residual_norms(self) -> bool:
        """Whether `view.replay.residual_norms` must be there."""
        return False

    def probe(self, sums: Tensor) -> Tensor | None:
        """A vector [B, H, Dk] whose product with each key the score needs, if the sums say it; else None."""
        return None

    @property
    def layerwise(self) -> bool:
        """Whether the score hangs on which layer it is (`view.layer`), so that each needs a view of its own.

        True unless a policy says otherwise: layers seen together lie behind each other along the rows.
        """
        return True

    @property
    def is_rotation_invariant(self) -> bool:
        """Whether the score stays when queries and keys of a head are rotated by one orthogonal matrix, and
        values by another: it reads them by dot products, norms and distances only.

        Slots in 4 bits are scored as they lie, rotated, and refused to a policy that does not say so. Values
        that `token_state` is given beside `output_weight` are rotated back; `view.output_weight` goes with
        values that are not rotated.
        """
        return False

    @property
    def reads_slots(self) -> bool:
        """Whether `observe` or `score` read the keys or values of tokens that are held.

        Where they do not, slots that are coded need not be decoded to choose what goes.
        """
        return True

    @property
    def traceable(self) -> bool:
        """Whether the score is made of tensor operations alone, none of which hangs on a tensor's content."""
        return True

    def layer_budgets(self, budget: int, layers: int, least: int) -> list[int]:
        """Slots per KV head for each budgeted layer, none below `least`; they add up to layers · budget."""
        return [budget] * layers

    def head_shares(self) -> float | None:
        """None: every head of a layer holds as many. A share f: heads compete, each sure of f · b
        (Ada-KV).
        """
        return None

    def per_head(self) -> Policy:
        """This policy with every head deciding for itself, as wrappers need it."""
        return self

    def settings(self) -> dict[str, Any]:
        """The fields and their values."""
        return {f.name: getattr(self, f.name) for f in fields(self)}

    def with_settings(self, **changes: Any) -> Self:
        """A copy with some settings changed."""
        return replace(self, **changes)

    def __str__(self) -> str:
        shown = []
        for f in fields(self):
            value = getattr(self, f.name)
            if isinstance(value, Policy):
                shown.append(str(value) if f.name == "base" else f"{f.name}={value}")
            elif value != f.default:
                shown.append(f"{f.name}={value!r}")
        label = self.name or type(self).__name__
        return f"{label}({', '.join(shown)})" if shown else label


@dataclass(frozen=True)
class Wrapper(Policy):
    """A policy around a base: it sees the base's score and makes its own of it."""

    base: Policy = field(default=None)  # type: ignore[assignment]  # required; checked below for a clearer error

    def __post_init__(self) -> None:
        if not isinstance(self.base, Policy):
            label = self.name or type(self).__name__
            raise PolicyError(
                f"{label} wraps another policy and got {self.base!r}: give it a base, as in '{label}+snapkv'"
            )
        object.__setattr__(self, "base", self.base.per_head())

    @property
    def query_rows(self) -> int:
        return self.base.query_rows

    @property
    def kept_queries(self) -> int:
        return self.base.kept_queries

    @property
    def window(self) -> int:
        return self.base.window

    @property
    def evicts(self) -> bool:
        return self.base.evicts

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

    def probe(self, sums: Tensor) -> Tensor | None:
        return self.base.probe(sums)

    @property
    def layerwise(self) -> bool:
        return self.base.layerwise

    @property
    def traceable(self) -> bool:
        return self.base.traceable

    @property
    def accumulates(self) -> bool:
        return self.base.accumulates

    def observe(self, view: View) -> Tensor | None:
        return self.base.observe(view)

    def layer_budgets(self, budget: int, layers: int, least: int) -> list[int]:
        return self.base.layer_budgets(budget, layers, least)

    def head_shares(self) -> float | None:
        return self.base.head_shares()


@dataclass(frozen=True)
class Divider(Wrapper):
    """A wrapper that divides the budget anew, over layers or heads, and leaves the scores to its base."""

    @property
    def reads_slots(self) -> bool:
        return self.base.reads_slots

    @property
    def is_rotation_invariant(self) -> bool:
        return self.base.is_rotation_invariant

    def score(self, view: View) -> Tensor:
        return self.base.score(view)

    def ranking(self, view: View) -> Tensor:
        return self.base.ranking(view)

    def head_scores(self, view: View) -> Tensor:
        return self.base.head_scores(view)


def check_positive(policy: Policy, **values: int) -> None:
    """Raise unless each setting is a whole number of at least 1."""
    for key, value in values.items():
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise PolicyError(f"{policy.name}: {key} is {value!r}; it must be a whole number of at least 1")


def check_odd(policy: Policy, **values: int) -> None:
    """Raise unless each setting is an odd whole number: pooling has as many neighbours before as after."""
    check_positive(policy, **values)
    for key, value in values.items():
        if value % 2 == 0:
            raise PolicyError(f"{policy.name}: {key} is {value}; it must be odd, such as {value + 1}")


def check_choice(policy: Policy, key: str, value: str, choices: tuple[str, ...]) -> None:
    """Raise unless the setting is one of the choices."""
    if value not in choices:
        raise PolicyError(f"{policy.name}: {key} is {value!r}; choose one of {', '.join(choices)}")


def check_between(policy: Policy, least: float, most: float, **values: float) -> None:
    """Raise unless each setting is a finite number from `least` to `most` (which may be infinite)."""
    limits = f"from {least} to {most}" if math.isfinite(most) else f"of at least {least}"
    for key, value in values.items():
        number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
        if not number or not least <= value <= most:
            raise PolicyError(f"{policy.name}: {key} is {value!r}; it must be a number {limits}")


def check_flag(policy: Policy, **values: bool) -> None:
    """Raise unless each setting is True or False."""
    for key, value in values.items():
        if not isinstance(value, bool):
            raise PolicyError(f"{policy.name}: {key} is {value!r}; it must be True or False")
