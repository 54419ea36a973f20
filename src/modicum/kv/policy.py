"""What a policy is, and what it sees when it scores."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, fields, replace
from typing import Any, ClassVar, Literal, Self

import torch
from torch import Tensor
from torch.nn import functional as F

from modicum.errors import PolicyError

GroupReduction = Literal["mean", "max", "rss"]

ALL = -1
"""Value of `Policy.query_rows` that asks for every query of the call, not only the last few."""

_TILE = 4096  # tokens turned to fp32 at a time: scoring scratch stays small beside the cache
_ROW_BYTES = 32 * 2**20  # attention rows made at a time


@dataclass
class View:
    """The candidates among which a policy chooses: B rows, H KV heads of G query heads each, N tokens per
    head.

    The tokens lie in parts (the arena, then the chunk that has just come), in no particular order:
    `positions` tells where each stood in its row. Scores are in fp32 whatever the dtype of the cache.
    """

    parts: tuple[tuple[Tensor, Tensor], ...]
    """Pairs of keys [B, H, n_i, Dk] (post-RoPE) and values [B, H, n_i, Dv]; the n_i add up to N."""
    positions: Tensor
    """[B, H, N] int32 or int64: absolute position in the row (pads not counted), -1 where there is no
    token.
    """
    valid: Tensor | None
    """[B, H, N] bool, False where there is no token; None when there is one everywhere."""
    protected: Tensor
    """[B, H, N] bool: sinks and recent tokens, which the engine keeps whatever their score."""
    seen: Tensor
    """[B] int64: tokens each row has seen, this call's included."""
    capacity: int
    """Slots a head may hold between calls (b)."""
    layer: int
    layers: int
    scaling: float
    """Factor on q·k in the model's attention, usually 1/sqrt(Dk)."""
    softcap: float | None = None
    queries: Tensor | None = None
    """[B, H, G, R, Dk]: the queries that the policy asked for (the last R, or all of this call)."""
    query_positions: Tensor | None = None
    """[B, R] int64: position of each query in its row, -1 for none (a pad, or fewer than R seen)."""
    state: Tensor | None = None
    """[B, H, N, F] fp32: the policy's own numbers per token, as `token_state` gave and `observe` changed
    them.
    """
    newcomers: int = 0
    """How many of the N tokens came with this call."""
    output_weight: Tensor | None = None
    """[H, G, Dv, hidden]: slices of the output projection, one per query head; None if the model has none."""

    @property
    def keys(self) -> Tensor:
        """[B, H, N, Dk]; copied into one tensor when there are several parts."""
        return self.parts[0][0] if len(self.parts) == 1 else torch.cat([k for k, _ in self.parts], dim=2)

    @property
    def values(self) -> Tensor:
        """[B, H, N, Dv]; copied into one tensor when there are several parts."""
        return self.parts[0][1] if len(self.parts) == 1 else torch.cat([v for _, v in self.parts], dim=2)

    @property
    def count(self) -> Tensor:
        """[B, H] fp32: tokens there are per head (N where all are valid)."""
        if self.valid is None:
            return torch.full(
                self.positions.shape[:2], float(self.positions.shape[2]), device=self.positions.device
            )
        return self.valid.sum(-1).float()

    @property
    def group(self) -> int:
        """G, query heads per KV head (1 when the policy asked for no queries)."""
        return 1 if self.queries is None else self.queries.shape[2]

    @property
    def asked(self) -> tuple[Tensor, Tensor]:
        """The queries [B, H, G, R, Dk] and their positions [B, R], as the policy's `query_rows` asked for."""
        if self.queries is None or self.query_positions is None:
            raise PolicyError("a policy read attention rows without asking for them: set its `query_rows`")
        return self.queries, self.query_positions

    def masked(self, x: Tensor, fill: float = 0.0) -> Tensor:
        """`x` [B, H, N] with `fill` where there is no token."""
        return x if self.valid is None else x.masked_fill(~self.valid, fill)

    def per_key(self, fn: Callable[[Tensor], Tensor]) -> Tensor:
        """Apply fn: [B, H, n, Dk] fp32 -> [B, H, n, ...] to the keys tile by tile; join along the tokens."""
        return self._per_token(fn, 0)

    def per_value(self, fn: Callable[[Tensor], Tensor]) -> Tensor:
        """Apply fn: [B, H, n, Dv] fp32 -> [B, H, n, ...] to the values tile by tile; join along the
        tokens.
        """
        return self._per_token(fn, 1)

    def sum_keys(self, weights: Tensor) -> Tensor:
        """Σ_j w_j k_j: weights [B, H, ..., N] fp32 -> [B, H, ..., Dk] fp32."""
        return self._weighted_sum(weights, 0)

    def sum_values(self, weights: Tensor, origin: Tensor | None = None) -> Tensor:
        """Σ_j w_j (v_j - origin), the origin [B, H, 1, Dv]: weights [B, H, ..., N] -> [B, H, ...,
        Dv]; fp32.
        """
        return self._weighted_sum(weights, 1, origin)

    def _tiles(self, which: int) -> Iterator[Tensor]:
        for part in self.parts:
            x = part[which]
            whole = x.shape[2] <= _TILE  # decode's case: spared the split
            for tile in (x,) if whole else torch.split(x, _TILE, dim=2):
                yield tile.float()

    def _per_token(self, fn: Callable[[Tensor], Tensor], which: int) -> Tensor:
        done = [fn(tile) for tile in self._tiles(which)]
        return done[0] if len(done) == 1 else torch.cat(done, dim=2)

    def dot_keys(self, vectors: Tensor) -> Tensor:
        """Each of M vectors times each key: [B, H, M, Dk] fp32 -> [B, H, M, N] fp32."""
        b, h, m, dim = vectors.shape
        flat = vectors.reshape(b * h, m, dim)
        # Three dimensions and vectors @ kT: half the price of k @ vectorsT for few vectors, in decode.
        done = [torch.bmm(flat, tile.reshape(b * h, -1, dim).transpose(1, 2)) for tile in self._tiles(0)]
        return (done[0] if len(done) == 1 else torch.cat(done, dim=2)).view(b, h, m, -1)

    def _weighted_sum(self, weights: Tensor, which: int, origin: Tensor | None = None) -> Tensor:
        b, h = weights.shape[:2]
        flat = weights.reshape(b * h, -1, weights.shape[-1])  # [B·H, M, N]
        total, start = None, 0
        for tile in self._tiles(which):
            n, dim = tile.shape[2:]
            part = flat if n == flat.shape[2] else flat[..., start : start + n]
            part = torch.bmm(part, (tile if origin is None else tile - origin).reshape(b * h, n, dim))
            total = part if total is None else total + part
            start += n
        assert total is not None
        return total.view(*weights.shape[:-1], total.shape[-1])

    def logits(self, first: int = 0, last: int | None = None, gain: Tensor | None = None) -> Tensor:
        """z = scaling · q·k of queries first:last, soft-capped where the model does: [B, H, G, R, N] fp32.

        gain: [B, R] or [B, H, R], a factor on each query's z. -inf where there is no token, and where
        the token came after the query.
        """
        queries, at = self.asked
        q = queries[:, :, :, first:last].float().flatten(2, 3) * self.scaling  # [B, H, G*R, Dk]
        z = torch.unflatten(self.dot_keys(q), 2, (self.group, -1))  # [B, H, G, R, N]
        if self.softcap is not None:
            z = self.softcap * torch.tanh(z / self.softcap)
        if gain is not None:
            z = z * (gain if gain.dim() == 3 else gain.unsqueeze(1))[:, :, None, first:last, None]
        unseen = self.positions[:, :, None, None, :] > at[:, None, None, first:last, None]
        if self.valid is not None:
            unseen = unseen | ~self.valid[:, :, None, None, :]
        return z.masked_fill_(unseen, -math.inf)

    def rows(self, gain: Tensor | None = None, first: int = 0, last: int | None = None) -> Tensor:
        """Attention rows softmax(gain · z) of queries first:last over the tokens at hand: [B, H, G,
        R, N] fp32.

        A row without a query, or of a query before all tokens at hand, is zero.
        """
        rows = torch.softmax(self.logits(first, last, gain), dim=-1)
        _, at = self.asked
        oldest = self.masked(self.positions, torch.iinfo(self.positions.dtype).max).amin(-1)  # [B, H]
        blind = at[:, None, first:last] < oldest[:, :, None]  # [B, H, R]
        return rows.masked_fill_(blind[:, :, None, :, None], 0.0)

    def row_tiles(self, gain: Tensor | None = None) -> Iterator[Tensor]:
        """`rows` in tiles of queries, so that the full map never stands in memory."""
        b, h, g, r = self.asked[0].shape[:4]
        tile = max(1, _ROW_BYTES // (4 * b * h * g * self.positions.shape[2]))
        for first in range(0, r, tile):
            yield self.rows(gain, first, min(r, first + tile))

    def pool(
        self, x: Tensor, kernel: int, kind: Literal["avg", "max"], where: Tensor | None = None
    ) -> Tensor:
        """Pool x [B, H, N] (or [B, H, G, N]) over neighbours in the order of positions; stride 1,
        same length.

        Tokens outside `where` [B, H, N] (default: all there are) neither give nor take: their own x
        comes back. The edges average over what is there, not over padding.
        """
        if kernel == 1:
            return x
        member = self.valid if where is None else (where if self.valid is None else where & self.valid)
        key = (
            self.positions
            if member is None
            else self.positions.masked_fill(~member, torch.iinfo(self.positions.dtype).max)
        )
        order = key.argsort(dim=-1)  # members first, oldest first
        inside = None if member is None else member.gather(-1, order)
        if x.dim() == 4:
            order = order.unsqueeze(2).expand_as(x)
            inside = None if inside is None else inside.unsqueeze(2).expand_as(x)
        line = x.gather(-1, order)
        flat = line.flatten(0, -2).unsqueeze(1)  # [M, 1, N]
        if kind == "avg":
            if inside is None:
                pooled = F.avg_pool1d(flat, kernel, 1, kernel // 2, count_include_pad=False)
            else:
                weight = inside.flatten(0, -2).unsqueeze(1).to(flat.dtype)
                number = F.avg_pool1d(weight, kernel, 1, kernel // 2)
                # filled, not multiplied: what stands outside need not be finite
                flat = flat.masked_fill(weight == 0, 0.0)
                pooled = F.avg_pool1d(flat, kernel, 1, kernel // 2) / number.clamp_min(1e-9)
        else:
            if inside is not None:
                flat = flat.masked_fill(~inside.flatten(0, -2).unsqueeze(1), -math.inf)
            pooled = F.max_pool1d(flat, kernel, 1, kernel // 2)
        pooled = pooled.reshape(line.shape)
        if inside is not None:
            pooled = torch.where(inside, pooled, line)
        return torch.empty_like(x).scatter_(-1, order, pooled)


def reduce_group(x: Tensor, how: GroupReduction) -> Tensor:
    """Join the query heads of a group: x [B, H, G, N] -> [B, H, N]."""
    if x.shape[2] == 1:
        return x.squeeze(2)
    if how == "mean":
        return x.mean(2)
    if how == "max":
        return x.amax(2)
    return x.square().sum(2).sqrt()


def sequence_max(x: Tensor) -> Tensor:
    """Largest of x [B, H, N] along the tokens, kept as [B, H, 1]."""
    return x.amax(-1, keepdim=True)


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
        returned.
        """
        return view.state

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
                shown.append(str(value))
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
