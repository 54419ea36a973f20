"""The eviction methods that wrap another one, as they are specified (see `reference_methods`)."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from tests.kv.reference_methods import (
    FIRST,
    INF,
    TOVA,
    Layer,
    Method,
    Query,
    Rules,
    Scores,
    SnapKV,
    Token,
    best,
    join,
    mean,
    norm,
    ranked,
)


def lifted(scores: Scores, counted: list[bool]) -> Scores:
    """Scores as weights: raised so that the lowest counted is 0, if that is negative."""
    low = min([s for s, c in zip(scores, counted, strict=True) if c], default=0.0)
    return [s - min(low, 0.0) for s in scores]


def normalised(scores: Scores, counted: list[bool]) -> Scores:
    """Lifted scores over the sum of the counted ones; 0 elsewhere, equal where all are 0."""
    raised = [s if c else 0.0 for s, c in zip(lifted(scores, counted), counted, strict=True)]
    total, number = sum(raised), max(sum(counted), 1)
    return [s / total if total > 0 else c / number for s, c in zip(raised, counted, strict=True)]


@dataclass
class Wrapper(Method):
    base: Method = field(default_factory=SnapKV)

    def __post_init__(self) -> None:
        self.base = self.base.per_head()
        self.ties = self.base.ties and not isinstance(self, CAOTE)

    @property
    def protects(self) -> int:
        return self.base.protects

    def observe(self, layer: Layer, new: list[Query]) -> None:
        self.base.observe(layer, new)

    def score(self, layer: Layer, head: int) -> Scores:
        return self.base.score(layer, head)

    def per_query_head(self, layer: Layer, head: int) -> list[Scores]:
        return self.base.per_query_head(layer, head)

    def layer_budgets(self, rules: Rules, layers: int, least: int) -> list[int]:
        return self.base.layer_budgets(rules, layers, least)


@dataclass
class CAOTE(Wrapper):
    """c_j = α_j/(1 - α_j) · ‖X - v_j‖, X = Σ α v; α the base's scores per query head, summing to 1.

    α and X run over all tokens held where α is attention itself (TOVA's row, or rows="window"), else over
    those that may go. fast: X is the plain mean of the values. group: how query heads join. rows="window":
    √Σ_i c_ij² over the last queries' rows. iterative: after each drop α ← α/(1 - α_j), X anew, down to b.
    """

    group: str = "rss"
    rows: str = "base"
    iterative: bool = False
    x_over: str = "auto"
    fast: bool = False

    def counted(self, layer: Layer, head: int) -> list[bool]:
        exact = self.rows == "window" or isinstance(self.base, TOVA)
        held = exact if self.x_over == "auto" else self.x_over == "held"
        return [held or not layer.safe(t) for t in layer.heads[head]]

    def errors(self, alpha: Scores, tokens: list[Token], counted: list[bool]) -> Scores:
        values = [(a, t.value) for a, t, c in zip(alpha, tokens, counted, strict=True) if c]
        if not values:
            return [0.0] * len(tokens)  # only protected ones are left: nothing is asked
        x = mean([v for _, v in values]) if self.fast else sum(a * v for a, v in values)
        return [
            INF if a >= 1 - 1e-6 else a / (1 - a) * norm(x - t.value)
            for a, t in zip(alpha, tokens, strict=True)
        ]

    def per_query_head(self, layer: Layer, head: int) -> list[Scores]:
        tokens, counted = layer.heads[head], self.counted(layer, head)
        if self.rows == "base":
            alphas = [normalised(line, counted) for line in self.base.per_query_head(layer, head)]
            return [self.errors(alpha, tokens, counted) for alpha in alphas]
        lines = []
        for member in layer.members(head):
            rows = [normalised(layer.row(q, member), counted) for q in layer.queries[-self.base.protects :]]
            lines.append(join([self.errors(row, tokens, counted) for row in rows], "rss"))
        return lines

    def score(self, layer: Layer, head: int) -> Scores:
        if self.iterative:
            return self.one_by_one(layer, head)
        return join(self.per_query_head(layer, head), self.group)

    def one_by_one(self, layer: Layer, head: int) -> Scores:
        tokens, counted = layer.heads[head], self.counted(layer, head)
        alphas = [normalised(line, counted) for line in self.base.per_query_head(layer, head)]
        dropped: list[int] = []
        while True:
            there = [c and j not in dropped for j, c in enumerate(counted)]
            left = [normalised(alpha, there) for alpha in alphas]
            errors = join([self.errors(alpha, tokens, there) for alpha in left], self.group)
            if len(tokens) - len(dropped) <= layer.capacity[head]:
                return [dropped.index(j) - len(tokens) if j in dropped else e for j, e in enumerate(errors)]
            loose = [j for j, t in enumerate(tokens) if j not in dropped and not layer.safe(t)]
            order = sorted(loose, key=lambda j: (errors[j], j))
            if len(order) > 1:
                layer.clarity.gap(errors[order[0]], errors[order[1]], [errors[j] for j in loose])
            dropped.append(order[0])


@dataclass
class CriticalKV(Wrapper):
    """The base's best share · b first (protected on top), the rest by (A_j + ε) · mean_h ‖v_j W_O^h‖₁."""

    share: float = 0.5
    eps: float = 1e-4

    def score(self, layer: Layer, head: int) -> Scores:
        tokens, base = layer.heads[head], self.base.score(layer, head)
        first = int(self.share * layer.capacity[head])
        best(layer, tokens, base, first)  # for the clarity of this cut
        out = [a + self.eps for a in lifted(base, [not layer.safe(t) for t in tokens])]
        for rank, j in enumerate(ranked(layer, tokens, base)):
            sizes = [abs(layer.output_slice(m) @ tokens[j].value).sum() for m in layer.members(head)]
            out[j] = FIRST * (2 - rank / len(tokens)) if rank < first else out[j] * float(mean(sizes))
        return out


@dataclass
class PyramidKV(Wrapper):
    """Free slots f (beside sinks and recent) fall evenly from 2f - f/β in the first layer to f/β in the last.

    Rounded down; what is left over goes to the lower layers, so that they add up to layers · b.
    """

    beta: float = 20

    def layer_budgets(self, rules: Rules, layers: int, least: int) -> list[int]:
        f = rules.budget - least
        low = f / self.beta
        high = 2 * f - low
        slots = [math.floor(high - (high - low) * i / (layers - 1) + 1e-9) for i in range(layers)]
        left = layers * f - sum(slots)
        return [least + s + (i < left) for i, s in enumerate(slots)]


@dataclass
class AdaKV(Wrapper):
    """The base's scores; heads of a layer compete in pieces of several tokens (see `Decoder.compete`)."""

    safeguard: float = 0.2


@dataclass
class RazorAttention(Wrapper):
    """Retrieval heads (top shares by echo or induction) go by the base; the others stream.

    Those hold max(least, b/share) slots, one of them a virtual token for all N they let go: the mean key and
    value, its logit raised by ln N. Retrieval heads share equally what is left of the whole budget.
    """

    scores: tuple[list[list[float]], list[list[float]]] = ((), ())  # echo and induction, [layer][KV head]
    echo: float = 0.01
    induction: float = 0.14
    share: float = 5
    compensate: bool = True

    def retrieval(self) -> set[tuple[int, int]]:
        chosen: set[tuple[int, int]] = set()
        for table, part in zip(self.scores, (self.echo, self.induction), strict=True):
            heads = [(i, j) for i, row in enumerate(table) for j in range(len(row))]
            ranked = sorted(heads, key=lambda at: (-table[at[0]][at[1]], at))
            chosen |= set(ranked[: math.ceil(part * len(heads))])
        return chosen
