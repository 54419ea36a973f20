"""The eviction methods as they are specified: scores of a KV head's tokens, one head and one token at a time.

Slow, in float64, with plain lists, and without a line of modicum: what the engine is held against. A KV head
holds a list of tokens in the order of their positions. Higher scores stay; ties keep the more recent token.
z = q·k/√d, a = softmax(z) over the tokens at hand that came no later than the query; q and k after RoPE at
their original positions, or at their ranks in the KV head; all logarithms natural.
"""

from __future__ import annotations

import math
import struct
from dataclasses import dataclass, field, replace
from statistics import median
from typing import Any

import numpy as np

Vector = np.ndarray
Scores = list[float]
INF = math.inf
FIRST = 1e30
"""Scores from here on are of a stage that goes before all others (CriticalKV)."""


@dataclass(eq=False)
class Token:
    """What a KV head holds of one token; `received` is the attention it got so far (H2O), `mark` its score as
    it was last worked out (Compactor, Learned), `plain` the key before RoPE, `given` that and the value, not
    coded."""

    position: int
    key: Vector
    value: Vector
    plain: Vector
    given: tuple[Vector, Vector]
    received: float = 0.0
    mark: float = 0.0


@dataclass
class Query:
    """A token's query vectors, one per query head of the layer; `plain` before RoPE."""

    position: int
    heads: list[Vector]
    plain: list[Vector]


@dataclass
class Rules:
    """The budget b (tokens per KV head, on average) and what holds for every method."""

    budget: int
    chunk: int
    n_sink: int
    recent: int
    evict_every: int = 1
    renumbered: bool = False
    store: str = "model"
    """Or "int8", "k8v4" (values in 4 bits), "int4"."""


@dataclass
class Clarity:
    """How near the decisions were: the smallest relative gap between two scores that had to be told apart.

    ties: whether equal scores come from equal numbers (a pool, a floor), so that recency settles them.
    """

    ties: bool = False
    least: float = INF

    def gap(self, a: float, b: float, among: Scores) -> None:
        if a == b:
            self.least = self.least if self.ties and a < INF else 0.0
        elif max(a, b) < INF:
            typical = median([abs(s) for s in among if s < FIRST] or [0.0])
            self.least = min(self.least, abs(a - b) / max(abs(a), abs(b), typical))


@dataclass
class Layer:
    """One layer: its weights, all queries of the row so far, what each KV head holds, may hold and let go."""

    index: int
    weights: dict[str, np.ndarray]
    capacity: list[int]
    streams: list[bool]
    heads: list[list[Token]]
    gone: list[list[Token]]  # let go by streaming heads, for the virtual token
    queries: list[Query] = field(default_factory=list)
    seen: int = 0
    sinks: int = 0
    recent: int = 0
    group: int = 1
    renumbered: bool = False
    again: int = 0
    """Last queries of the call that are its first ones, read again, and that are not kept."""
    clarity: Clarity = field(default_factory=Clarity)

    def safe(self, token: Token) -> bool:
        """Protected: the first n_sink positions and the last max(recent, the method's window)."""
        return token.position < self.sinks or token.position >= self.seen - self.recent

    def members(self, head: int) -> list[int]:
        """The query heads that share a KV head."""
        return list(range(head * self.group, (head + 1) * self.group))

    def row(self, query: Query, member: int, gain: float = 1.0) -> Scores:
        """softmax_j(gain · z_j) over what the member's KV head holds now; 0 for what came after the query."""
        tokens, q = self.heads[member // self.group], query.heads[member]
        scale = gain / math.sqrt(len(q))
        return softmax([scale * dot(q, t.key) if t.position <= query.position else -INF for t in tokens])

    def output_slice(self, member: int) -> np.ndarray:
        """W_O^h [hidden, d]: the part of the output projection that reads query head h."""
        d = self.weights["o"].shape[1] // (self.group * len(self.heads))
        return self.weights["o"][:, member * d : (member + 1) * d]


def in_8_bits(x: Vector, most: int = 127) -> Vector:
    """What is left of a vector that lies as whole numbers up to 127 and a scale in bfloat16, rounded up."""
    scale = bfloat16(max(abs(float(a)) for a in x) * (1 + 2**-8) / most)
    if scale == 0:
        return 0 * x
    return np.array([max(-most, min(most, round(float(a) / scale))) * scale for a in x])


def in_4_bits(x: Vector) -> Vector:
    """The same up to 7, of the vector rotated; rotated back."""
    return hadamard(in_8_bits(hadamard(x), 7))


def hadamard(x: Vector) -> Vector:
    """Each block, as long as the largest power of two that divides the length, times the matrix of entries
    (-1)^(bits that i and j share) / √size."""
    size = 1
    while len(x) % (2 * size) == 0:
        size *= 2
    out = []
    for start in range(0, len(x), size):
        for i in range(size):
            terms = [(-1) ** (i & j).bit_count() * float(x[start + j]) for j in range(size)]
            out.append(math.fsum(terms) / math.sqrt(size))
    return np.array(out)


def bfloat16(x: float) -> float:
    """The nearest number whose mantissa has 8 bits; of two as near, the even one."""
    bits = struct.unpack("<I", struct.pack("<f", x))[0]
    low = bits & 0xFFFF
    bits >>= 16
    bits += low > 0x8000 or (low == 0x8000 and bits & 1)
    return float(struct.unpack("<f", struct.pack("<I", bits << 16))[0])


def dot(a: Vector, b: Vector) -> float:
    return float(a @ b)


def norm(x: Vector) -> float:
    return math.sqrt(dot(x, x))


def mean(xs: list[Any]) -> Any:
    return sum(xs[1:], xs[0]) / len(xs)


def softmax(z: Scores) -> Scores:
    top = max(z, default=-INF)
    if top == -INF:
        return [0.0] * len(z)
    e = [math.exp(x - top) for x in z]
    total = sum(e)
    return [x / total for x in e]


def add(rows: list[Scores]) -> Scores:
    return [sum(column) for column in zip(*rows, strict=True)]


def join(group: list[Scores], how: str) -> Scores:
    """Query heads of a group made one: mean, max, or root of the sum of squares."""
    columns = list(zip(*group, strict=True))
    if how == "mean":
        return [mean(list(c)) for c in columns]
    return [max(c) if how == "max" else math.sqrt(sum(x * x for x in c)) for c in columns]


def pool(line: Scores, kernel: int, how: str = "avg") -> Scores:
    """Over `kernel` neighbours of each place, of which there are fewer at the edges."""
    half, out = kernel // 2, []
    for j in range(len(line)):
        near = line[max(0, j - half) : j + half + 1]
        out.append(max(near) if how == "max" else sum(near) / len(near))
    return out


def ranked(layer: Layer, tokens: list[Token], scores: Scores) -> list[int]:
    """Indices of the tokens, best first: protected ones, then by score, of equals the more recent."""
    key = [(layer.safe(t), s, t.position) for t, s in zip(tokens, scores, strict=True)]
    return sorted(range(len(tokens)), key=lambda j: key[j], reverse=True)


def best(layer: Layer, tokens: list[Token], scores: Scores, count: int) -> list[Token]:
    """The `count` best, in the order of positions; notes how clear the cut is."""
    order = ranked(layer, tokens, scores)
    if 0 < count < len(order) and not layer.safe(tokens[order[count - 1]]):
        loose = [s for s, t in zip(scores, tokens, strict=True) if not layer.safe(t)]
        layer.clarity.gap(scores[order[count - 1]], scores[order[count]], loose)
    return [tokens[j] for j in sorted(order[:count])]


@dataclass
class Method:
    """Scores of every token of a KV head, in the order of its list; protected ones' are not used."""

    ties = False  # whether equal scores are exactly equal (see `Clarity`)
    error = 1.0  # of a score in fp32, as a multiple of an attention weight's

    @property
    def protects(self) -> int:
        """How many of the newest tokens the method itself protects."""
        return getattr(self, "window", 0)

    def observe(self, layer: Layer, new: list[Query]) -> None:
        """After each piece's attention."""

    def score(self, layer: Layer, head: int) -> Scores:
        raise NotImplementedError

    def per_query_head(self, layer: Layer, head: int) -> list[Scores]:
        """One line of scores per query head of the group, or a single one for all of them."""
        return [self.score(layer, head)]

    def per_head(self) -> Method:
        """The same with every KV head deciding for itself, as wrappers need it."""
        return self

    def layer_budgets(self, rules: Rules, layers: int, least: int) -> list[int]:
        return [rules.budget] * layers


class StreamingLLM(Method):
    """The position: the newest stay."""

    def score(self, layer: Layer, head: int) -> Scores:
        return [float(t.position) for t in layer.heads[head]]


class Full(StreamingLLM):
    """Nothing is ever let go; it is used with room for everything."""


@dataclass
class Random(Method):
    """A lot drawn once per (seed, layer, KV head, position): 24 bits of Wellons' lowbias32 hash."""

    seed: int = 0

    @staticmethod
    def mix(x: int) -> int:
        x = ((x ^ (x >> 16)) * 0x7FEB352D) % 2**32
        x = ((x ^ (x >> 15)) * 0x846CA68B) % 2**32
        return x ^ (x >> 16)

    def score(self, layer: Layer, head: int) -> Scores:
        salt = self.mix(self.mix(self.mix(self.seed) + layer.index) + head)
        return [(self.mix(t.position ^ salt) >> 8) / 2**24 for t in layer.heads[head]]


class Knorm(Method):
    """-‖k‖₂"""

    def score(self, layer: Layer, head: int) -> Scores:
        return [-norm(t.key) for t in layer.heads[head]]


@dataclass
class KeyDiff(Method):
    """cosine: -cos(μ, k), μ the mean of k/‖k‖. l2 (ManifoldKV): ‖k - μ‖, μ the mean of k.

    μ is over all tokens held and new; anchor_window: one μ for each stretch of so many positions.
    """

    metric: str = "cosine"
    anchor_window: int | None = None

    def score(self, layer: Layer, head: int) -> Scores:
        tokens, out = layer.heads[head], []
        for t in tokens:
            w = self.anchor_window
            near = [u for u in tokens if w is None or u.position // w == t.position // w]
            if self.metric == "l2":
                out.append(norm(t.key - mean([u.key for u in near])))
            else:
                anchor = mean([u.key / norm(u.key) for u in near])
                out.append(-dot(anchor, t.key) / (norm(anchor) * norm(t.key)))
        return out


@dataclass
class TOVA(Method):
    """a_t, the newest query's row: the mean over all query heads of the layer, or over a KV head's group."""

    heads: str = "layer"
    window: int = 1

    def per_head(self) -> TOVA:
        return replace(self, heads="each")

    def per_query_head(self, layer: Layer, head: int) -> list[Scores]:
        return [layer.row(layer.queries[-1], member) for member in layer.members(head)]

    def score(self, layer: Layer, head: int) -> Scores:
        heads = range(len(layer.heads)) if self.heads == "layer" else [head]
        return join([row for h in heads for row in self.per_query_head(layer, h)], "mean")


class H2O(Method):
    """Σ_i a_ij over every query since j came, the group's mean; each row over what was held at the time."""

    def observe(self, layer: Layer, new: list[Query]) -> None:
        for head, tokens in enumerate(layer.heads):
            for query in new:
                row = join([layer.row(query, member) for member in layer.members(head)], "mean")
                for token, weight in zip(tokens, row, strict=True):
                    token.received += weight

    def score(self, layer: Layer, head: int) -> Scores:
        return [t.received for t in layer.heads[head]]


@dataclass
class Replay(Method):
    """The largest a_ij that any query of a second reading, of any query head of the group, has given to j.

    Rows over all that is held, the tokens read again included. In a call that is not read again, the largest
    that any query after j has given to it.
    """

    window: int = 32

    def observe(self, layer: Layer, new: list[Query]) -> None:
        for query in new[-layer.again :] if layer.again else new:
            for head, tokens in enumerate(layer.heads):
                rows = [layer.row(query, member) for member in layer.members(head)]
                for token, *weights in zip(tokens, *rows, strict=True):
                    if token.position < query.position:
                        token.mark = max(token.mark, *weights)

    def score(self, layer: Layer, head: int) -> Scores:
        return [t.mark for t in layer.heads[head]]


@dataclass
class Learned(Method):
    """x·w_h + c_h, once, when a token comes; x its keys before RoPE, its values and the norms of these, in
    all KV heads.
    """

    weights: dict[int, np.ndarray]
    """Layer -> [F, H]"""
    intercepts: dict[int, np.ndarray]

    def observe(self, layer: Layer, new: list[Query]) -> None:
        for query in new:
            tokens = [next(t for t in head if t.position == query.position) for head in layer.heads]
            parts = [t.given[0] for t in tokens] + [t.given[1] for t in tokens]
            x = np.concatenate([*parts, [norm(part) for part in parts]])
            for head, token in enumerate(tokens):
                token.mark = dot(x, self.weights[layer.index][:, head]) + self.intercepts[layer.index][head]

    def score(self, layer: Layer, head: int) -> Scores:
        return [t.mark for t in layer.heads[head]]


@dataclass
class SnapKV(Method):
    """pool_j(Σ_i a_ij) (or max_i) over the last `window` queries, for the tokens before the window.

    Rows are made anew from the last queries, over what is held now. The group's query heads are pooled one by
    one, then joined by mean or max. floor: no score below the mean of those that may go.
    """

    window: int = 32
    kernel: int = 5
    pooling: str = "avg"
    group: str = "mean"
    over: str = "sum"
    floor: bool = False
    ties = True

    def votes(self, layer: Layer, head: int) -> list[Scores]:
        tokens, lines = layer.heads[head], []
        before = [t.position < layer.seen - self.window for t in tokens]
        for member in layer.members(head):
            rows = [layer.row(query, member) for query in layer.queries[-self.window :]]
            votes = add(rows) if self.over == "sum" else join(rows, "max")
            early = [v for v, b in zip(votes, before, strict=True) if b]
            pooled = iter(pool(early, self.kernel, self.pooling))
            lines.append([next(pooled) if b else v for v, b in zip(votes, before, strict=True)])
        return lines

    def clamped(self, votes: Scores, layer: Layer, head: int) -> Scores:
        loose = [v for v, t in zip(votes, layer.heads[head], strict=True) if not layer.safe(t)]
        if not self.floor or not loose:
            return votes
        floor = mean(loose)
        for v in loose:
            layer.clarity.gap(v, floor, loose)
        return [max(v, floor) for v in votes]

    def per_query_head(self, layer: Layer, head: int) -> list[Scores]:
        return [self.clamped(votes, layer, head) for votes in self.votes(layer, head)]

    def score(self, layer: Layer, head: int) -> Scores:
        return self.clamped(join(self.votes(layer, head), self.group), layer, head)


@dataclass
class AhaKV(Method):
    """γ̄_j · Σ_i softmax_j(G_i z_ij) over the last `window` queries, G_i = √(2 ln(i/b)), 0 for i ≤ b.

    i: tokens the query had seen (or how many of them are still held). γ̄ = γ / max γ, γ = avg-pooled ‖v‖².
    """

    window: int = 32
    kernel: int = 5
    min_gain: float = 0.0
    count: str = "seen"
    group: str = "mean"

    def per_query_head(self, layer: Layer, head: int) -> list[Scores]:
        tokens, lines = layer.heads[head], []
        prior = pool([dot(t.value, t.value) for t in tokens], self.kernel)
        for member in layer.members(head):
            rows = []
            for query in layer.queries[-self.window :]:
                held = sum(t.position <= query.position for t in tokens)
                i = query.position + 1 if self.count == "seen" else held
                gain = math.sqrt(2 * math.log(max(i / layer.capacity[head], 1.0)))
                rows.append(layer.row(query, member, max(gain, self.min_gain)))
            lines.append([s * p / max(prior) for s, p in zip(add(rows), prior, strict=True)])
        return lines

    def score(self, layer: Layer, head: int) -> Scores:
        return join(self.per_query_head(layer, head), self.group)


@dataclass
class OBCache(Method):
    """Σ_i a_ij² ‖v_j‖² + (a_ij z_ij)² ‖v_j - o_i‖² + 2 a_ij² z_ij (‖v_j‖² - v_j·o_i) over the last `window`
    queries, o_i the row's output; pooled among the tokens before the window.
    """

    window: int = 32
    kernel: int = 1
    pooling: str = "avg"
    group: str = "mean"
    ties = True  # a pool's
    error = 6.0  # of a² and of (1 + z)², each twice that of a, and of terms that cancel

    def per_query_head(self, layer: Layer, head: int) -> list[Scores]:
        tokens, lines = layer.heads[head], []
        for member in layer.members(head):
            rows = []
            for query in layer.queries[-self.window :]:
                weights, q = layer.row(query, member), query.heads[member]
                output = sum(a * t.value for a, t in zip(weights, tokens, strict=True))
                row = []
                for a, t in zip(weights, tokens, strict=True):
                    z, v = dot(q, t.key) / math.sqrt(len(q)), t.value
                    value, key = dot(v, v), dot(v - output, v - output)
                    row.append(a**2 * (value + z**2 * key + 2 * z * (value - dot(v, output))))
                rows.append(row)
            before = [t.position < layer.seen - self.window for t in tokens]
            total = add(rows)
            early = iter(
                pool([s for s, b in zip(total, before, strict=True) if b], self.kernel, self.pooling)
            )
            lines.append([next(early) if b else s for s, b in zip(total, before, strict=True)])
        return lines

    def score(self, layer: Layer, head: int) -> Scores:
        return join(self.per_query_head(layer, head), self.group)


@dataclass
class Compactor(Method):
    """z(u) + β z(ℓ) of a piece of at least `window` tokens, and z(u) of the last `window` tokens otherwise.

    u: what the queries of a block pay to its tokens, unmasked and unscaled, times ‖v‖, pooled over
    neighbours. ℓ: leverage of the piece's keys. β: the share that is let go.
    """

    block: int = 256
    window: int = 32
    kernel: int = 3
    ridge: float = 0.01
    blending: float | None = None
    error = 12.0  # logits are not divided by √8, and what is 4 deviations large has the error of 1

    def observe(self, layer: Layer, new: list[Query]) -> None:
        count = max(len(new), self.window)
        for head, held in enumerate(layer.heads):
            tokens = sorted((t for t in held if t.position >= layer.seen - count), key=lambda t: t.position)
            scores = standard(self.attention(layer, head, tokens, count))
            if len(new) >= self.window:
                share = min(1.0, layer.capacity[head] / layer.seen)
                blending = 1 - share if self.blending is None else self.blending
                outlying = standard(self.leverage([t.key for t in tokens]))
                scores = [s + blending * x for s, x in zip(scores, outlying, strict=True)]
            for token, score in zip(tokens, scores, strict=True):
                token.mark = score

    def attention(self, layer: Layer, head: int, tokens: list[Token], count: int) -> Scores:
        first, mass = layer.seen - count, dict.fromkeys([t.position for t in tokens], 0.0)
        asked = {query.position: query for query in layer.queries}
        for stop in [*range(self.block, count, self.block), count]:
            start = max(0, stop - self.block)
            inside = [t for t in tokens if first + start <= t.position < first + stop]
            mass |= dict.fromkeys([t.position for t in inside], 0.0)
            for query in [asked[t.position] for t in inside]:
                for member in layer.members(head):
                    row = softmax([dot(query.heads[member], t.key) for t in inside])
                    for t, a in zip(inside, row, strict=True):
                        mass[t.position] += a / layer.group
        return pool([mass[t.position] * norm(t.value) for t in tokens], self.kernel)

    def leverage(self, keys: list[Vector]) -> Scores:
        x = np.array(keys) - np.mean(keys, axis=0)
        gram = x.T @ x
        gram += self.ridge * np.trace(gram) / len(gram) * np.eye(len(gram))
        return [dot(row, np.linalg.solve(gram, row)) for row in x]

    def score(self, layer: Layer, head: int) -> Scores:
        return [t.mark for t in layer.heads[head]]


@dataclass
class TriAttention(Method):
    """mean_δ Σ_f |μ_f||k_f| cos(ω_f(t - p + δ) + arg μ_f - arg k_f) + Σ_f (m_f - |μ_f|)|k_f|, per query head
    over its standard deviation; then the largest, or the mean, of the group.

    μ_f, m_f: the means of q_f and |q_f| over all queries of the row, before RoPE as complex numbers; k_f a
    key turned back from its position p, t the newest; all of them ranks where positions are renumbered.
    """

    window: int = 128
    group: str = "max"

    def per_query_head(self, layer: Layer, head: int) -> list[Scores]:
        tokens, lines = layer.heads[head], []
        places = [t.position for t in tokens]
        if layer.renumbered:
            places = [sorted(places).index(p) for p in places]
        now = len(tokens) - 1 if layer.renumbered else layer.seen - 1
        for member in layer.members(head):
            queries = np.array([as_pairs(query.plain[member]) for query in layer.queries])
            center, size = queries.mean(0), np.abs(queries).mean(0)
            speed = 10000.0 ** (-np.arange(len(center)) / len(center))
            line = []
            for token, place in zip(tokens, places, strict=True):
                key = as_pairs(token.key) * np.exp(-1j * speed * place)
                phase = np.angle(center) - np.angle(key)
                far = [
                    float((np.abs(center) * np.abs(key) * np.cos(speed * (now - place + 2**i) + phase)).sum())
                    for i in range(17)
                ]
                line.append(mean(far) + float(((size - np.abs(center)) * np.abs(key)).sum()))
            lines.append(standard(line))
        return lines

    def score(self, layer: Layer, head: int) -> Scores:
        return join(self.per_query_head(layer, head), self.group)


def as_pairs(x: Vector) -> np.ndarray:
    """Dimension i and i + d/2 as one complex number."""
    return x[: len(x) // 2] + 1j * x[len(x) // 2 :]


def standard(x: Scores) -> Scores:
    """Less their mean, over their standard deviation."""
    middle = sum(x) / len(x)
    deviation = math.sqrt(sum((a - middle) ** 2 for a in x) / max(1, len(x) - 1))
    return [(a - middle) / max(deviation, 1e-6) for a in x]
