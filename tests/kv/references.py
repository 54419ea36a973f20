"""The base policies once more, from their formulas: float64, plain loops over heads, queries and tokens."""

from __future__ import annotations

import cmath
import math
from collections.abc import Callable

from modicum.kv.policies.ahakv import AhaKV
from modicum.kv.policies.compactor import Compactor
from modicum.kv.policies.full import Full
from modicum.kv.policies.h2o import H2O
from modicum.kv.policies.keydiff import KeyDiff
from modicum.kv.policies.knorm import Knorm
from modicum.kv.policies.learned import Learned
from modicum.kv.policies.obcache import OBCache
from modicum.kv.policies.random import Random
from modicum.kv.policies.replay import Replay
from modicum.kv.policies.snapkv import SnapKV
from modicum.kv.policies.streaming import StreamingLLM
from modicum.kv.policies.tova import TOVA
from modicum.kv.policies.triattention import TriAttention
from modicum.kv.policy import Policy
from modicum.kv.view import View

Scores = dict[int, float]
"""Slot -> score, for the slots of one head that hold a token."""
Vector = list[float]


class Head:
    """One KV head of one row of a view, as Python numbers."""

    def __init__(self, view: View, row: int, head: int) -> None:
        self.view, self.row, self.head = view, row, head
        self.position: list[int] = view.positions[row, head].tolist()
        self.slots = [
            j for j in range(len(self.position)) if view.valid is None or bool(view.valid[row, head, j])
        ]
        self.key: list[Vector] = view.keys[row, head].double().tolist()
        self.value: list[Vector] = view.values[row, head].double().tolist()
        self.seen = int(view.seen[row])

    def attention(self, g: int, r: int, gain: float = 1.0) -> Scores:
        """Softmax of query r of query head g over the tokens that it may see; empty if there is none."""
        return softmax(self.logits(g, r, gain))

    def logits(self, g: int, r: int, gain: float = 1.0) -> Scores:
        """Of query r of query head g, for the tokens that it may see."""
        view = self.view
        assert view.queries is not None
        assert view.query_positions is not None
        query: Vector = view.queries[self.row, self.head, g, r].double().tolist()
        at = int(view.query_positions[self.row, r])
        z: Scores = {}
        for j in self.slots:
            if self.position[j] <= at:
                z[j] = dot(query, self.key[j]) * view.scaling
                if view.softcap is not None:
                    z[j] = view.softcap * math.tanh(z[j] / view.softcap)
                z[j] *= gain
        return z

    def rows(self, g: int) -> list[Scores]:
        """The rows of every query of query head g."""
        assert self.view.query_positions is not None
        return [self.attention(g, r) for r in range(self.view.query_positions.shape[1])]

    def pool(self, x: Scores, kernel: int, kind: str, where: set[int]) -> Scores:
        """Over the neighbours in order of positions, among `where` only; the rest as it was."""
        line = sorted(where, key=lambda j: self.position[j])
        pooled = dict(x)
        for i, j in enumerate(line):
            near = [x[m] for m in line[max(0, i - kernel // 2) : i + kernel // 2 + 1]]
            pooled[j] = max(near) if kind == "max" else sum(near) / len(near)
        return pooled


def softmax(z: Scores) -> Scores:
    """Of the logits there are; empty if there is none."""
    if not z:
        return {}
    top = max(z.values())
    total = sum(math.exp(x - top) for x in z.values())
    return {j: math.exp(x - top) / total for j, x in z.items()}


def dot(a: Vector, b: Vector) -> float:
    return math.fsum(x * y for x, y in zip(a, b, strict=True))


def norm(a: Vector) -> float:
    return math.sqrt(dot(a, a))


def mean_vector(vectors: list[Vector]) -> Vector:
    return [math.fsum(column) / len(vectors) for column in zip(*vectors, strict=True)]


def join(heads: list[Scores], how: str) -> Scores:
    """The query heads of a group into one."""
    return {j: (max if how == "max" else _mean)([one[j] for one in heads]) for j in heads[0]}


def _mean(x: list[float]) -> float:
    return math.fsum(x) / len(x)


def full(policy: Full, head: Head) -> Scores:
    return dict.fromkeys(head.slots, 0.0)


def streaming(policy: StreamingLLM, head: Head) -> Scores:
    return {j: float(head.position[j]) for j in head.slots}


def knorm(policy: Knorm, head: Head) -> Scores:
    return {j: -norm(head.key[j]) for j in head.slots}


def random(policy: Random, head: Head) -> Scores:
    def mix(x: int) -> int:
        x %= 2**32
        x = (x ^ (x >> 16)) * 0x7FEB352D % 2**32
        x = (x ^ (x >> 15)) * 0x846CA68B % 2**32
        return x ^ (x >> 16)

    key = mix(mix(mix(policy.seed) + head.view.layer) + head.head)
    return {j: mix(head.position[j] ^ key) // 2**8 / 2**24 for j in head.slots}


def keydiff(policy: KeyDiff, head: Head) -> Scores:
    windows: dict[int, list[int]] = {}
    for j in head.slots:
        window = 0 if policy.anchor_window is None else head.position[j] // policy.anchor_window
        windows.setdefault(window, []).append(j)
    scores: Scores = {}
    for slots in windows.values():
        keys = [head.key[j] for j in slots]
        if policy.metric == "l2":
            anchor = mean_vector(keys)
            for j in slots:
                scores[j] = norm([x - m for x, m in zip(head.key[j], anchor, strict=True)])
        else:
            anchor = mean_vector([[x / max(norm(k), 1e-8) for x in k] for k in keys])
            for j in slots:
                length = max(norm(anchor), 1e-8) * max(norm(head.key[j]), 1e-8)
                scores[j] = -dot(anchor, head.key[j]) / length
    return scores


def tova(policy: TOVA, head: Head) -> Scores:
    view = head.view
    _, heads, group = view.positions.shape[0], view.positions.shape[1], view.group
    own = [head.attention(g, 0) for g in range(group)]
    if policy.heads == "each":
        return {j: sum(row.get(j, 0.0) for row in own) / group for j in head.slots}
    by_position: dict[int, float] = {}
    for h in range(heads):
        other = Head(view, head.row, h)
        for g in range(group):
            for j, a in other.attention(g, 0).items():
                where = other.position[j]
                by_position[where] = by_position.get(where, 0.0) + a / (heads * group)
    return {j: by_position.get(head.position[j], 0.0) for j in head.slots}


def snapkv(policy: SnapKV, head: Head) -> Scores:
    before = {j for j in head.slots if head.position[j] < head.seen - policy.window}
    votes = []
    for g in range(head.view.group):
        rows = head.rows(g)
        over = max if policy.over == "max" else sum
        votes.append({j: float(over([row.get(j, 0.0) for row in rows])) for j in head.slots})
    pooled = [head.pool(one, policy.kernel, policy.pooling, before) for one in votes]
    return floored(policy, head, join(pooled, policy.group))


def floored(policy: SnapKV, head: Head, scores: Scores) -> Scores:
    if not policy.floor:
        return scores
    protected = head.view.protected[head.row, head.head].tolist()
    may_go = [
        x for j, x in scores.items() if head.position[j] < head.seen - policy.window and not protected[j]
    ]
    least = _mean(may_go) if may_go else 0.0
    return {j: max(x, least) for j, x in scores.items()}


def ahakv(policy: AhaKV, head: Head) -> Scores:
    view = head.view
    assert view.query_positions is not None
    squared = {j: dot(head.value[j], head.value[j]) for j in head.slots}
    pooled = head.pool(squared, policy.kernel, "avg", set(head.slots))
    largest = max(pooled.values(), default=0.0)
    heads = []
    for g in range(view.group):
        scores = dict.fromkeys(head.slots, 0.0)
        for r, at in enumerate(view.query_positions[head.row].tolist()):
            count = at + 1
            if policy.count == "held":
                count = sum(head.position[j] <= at for j in head.slots)
            gain = math.sqrt(2 * math.log(count / view.capacity)) if count > view.capacity else 0.0
            for j, a in head.attention(g, r, max(gain, policy.min_gain)).items():
                scores[j] += a
        heads.append({j: x * (pooled[j] / largest if largest else 1.0) for j, x in scores.items()})
    return join(heads, policy.group)


def h2o(policy: H2O, head: Head) -> Scores:
    view = head.view
    assert view.state is not None
    scores = {j: float(view.state[head.row, head.head, j, 0]) for j in head.slots}
    for g in range(view.group):
        for row in head.rows(g):
            for j, a in row.items():
                scores[j] += a / view.group
    return scores


def obcache(policy: OBCache, head: Head) -> Scores:
    before = {j for j in head.slots if head.position[j] < head.seen - policy.window}
    heads = []
    for g in range(head.view.group):
        scores = dict.fromkeys(head.slots, 0.0)
        assert head.view.query_positions is not None
        for r in range(head.view.query_positions.shape[1]):
            z, row = head.logits(g, r), head.attention(g, r)
            out = [math.fsum(a * head.value[j][d] for j, a in row.items()) for d in range(len(head.value[0]))]
            for j, a in row.items():
                v = head.value[j]
                apart = [x - o for x, o in zip(v, out, strict=True)]
                scores[j] += a**2 * dot(v, v)
                scores[j] += (a * z[j]) ** 2 * dot(apart, apart)
                scores[j] += 2 * a**2 * z[j] * (dot(v, v) - dot(v, out))
        heads.append(head.pool(scores, policy.kernel, policy.pooling, before))
    return join(heads, policy.group)


def compactor(policy: Compactor, head: Head) -> Scores:
    view = head.view
    assert view.state is not None
    scores = {j: float(view.state[head.row, head.head, j, 0]) for j in head.slots}
    attention, leverage = compactor_parts(policy, head)
    share = min(1.0, view.capacity / head.seen)
    blending = 1 - share if policy.blending is None else policy.blending
    scores |= z_scores(attention)
    if leverage:
        outlying = z_scores(leverage)
        scores |= {j: scores[j] + blending * outlying[j] for j in outlying}
    return scores


def compactor_parts(policy: Compactor, head: Head) -> tuple[Scores, Scores]:
    """Attention times value norms, pooled, and leverage, of the tokens that are scored anew."""
    view = head.view
    assert view.queries is not None
    assert view.query_positions is not None
    count = max(view.newcomers, policy.window)
    first = head.seen - count
    slot = {head.position[j]: j for j in head.slots if head.position[j] >= first}
    asked = {p: r for r, p in enumerate(view.query_positions[head.row].tolist()) if p >= max(0, first)}
    mass: Scores = {}
    for stop in [*range(policy.block, count, policy.block), count]:
        block = range(first + max(0, stop - policy.block), first + stop)
        inside = [slot[p] for p in block if p in slot]
        mass |= dict.fromkeys(inside, 0.0)
        for g in range(view.group):
            for p in block:
                if p in asked:
                    query = view.queries[head.row, head.head, g, asked[p]].double().tolist()
                    for j, a in softmax({j: dot(query, head.key[j]) for j in inside}).items():
                        mass[j] += a / view.group
    weighed = {j: a * norm(head.value[j]) for j, a in mass.items()}
    half, pooled = policy.kernel // 2, {}
    for p, j in slot.items():
        pooled[j] = _mean([weighed[slot[i]] for i in range(p - half, p + half + 1) if i in slot])
    if view.newcomers < policy.window:
        return pooled, {}
    return pooled, leverages({j: head.key[j] for j in slot.values()}, policy.ridge)


def leverages(keys: dict[int, Vector], ridge: float) -> Scores:
    """xᵀ(XᵀX + εI)⁻¹x of each key x less their mean."""
    if not keys:
        return {}
    mean = mean_vector(list(keys.values()))
    x = {j: [a - m for a, m in zip(key, mean, strict=True)] for j, key in keys.items()}
    dims = range(len(mean))
    gram = [[math.fsum(v[a] * v[b] for v in x.values()) for b in dims] for a in dims]
    size = math.fsum(gram[d][d] for d in dims) / len(mean)
    for d in dims:
        gram[d][d] += ridge * size
    return {j: dot(v, solve(gram, v)) if size else 0.0 for j, v in x.items()}


def solve(matrix: list[Vector], right: Vector) -> Vector:
    """The solution of a positive definite system, by elimination."""
    rows, n = [[*line, b] for line, b in zip(matrix, right, strict=True)], len(right)
    for i in range(n):
        for k in range(i + 1, n):
            factor = rows[k][i] / rows[i][i]
            rows[k] = [a - factor * b for a, b in zip(rows[k], rows[i], strict=True)]
    out = [0.0] * n
    for i in reversed(range(n)):
        out[i] = (rows[i][n] - math.fsum(rows[i][k] * out[k] for k in range(i + 1, n))) / rows[i][i]
    return out


def z_scores(x: Scores) -> Scores:
    """Less their mean, over their standard deviation (of n - 1, at least 1e-6)."""
    if not x:
        return {}
    mean = _mean(list(x.values()))
    return {j: (a - mean) / deviation(x) for j, a in x.items()}


def deviation(x: Scores) -> float:
    mean = _mean(list(x.values()))
    return max(1e-6, math.sqrt(math.fsum((a - mean) ** 2 for a in x.values()) / max(1, len(x) - 1)))


def replay(policy: Replay, head: Head) -> Scores:
    """The best of what was kept and the largest weight of a query of the second reading, over the tokens at
    hand and those of the reading itself; or, where there is none, of a query of the call after the token.
    With `plus` times the norm of the projected value, over that of the query's hidden state.
    """
    view = head.view
    assert view.state is not None
    assert view.query_positions is not None
    state = view.state[head.row, head.head].double().tolist()
    best = {j: state[j][0] for j in head.slots}
    for g in range(view.group):
        rows = second_reading(head, g) if view.replay is not None else []
        if view.replay is None:
            for r, at in enumerate(view.query_positions[head.row].tolist()):
                row = head.attention(g, r)
                rows.append({j: a for j, a in row.items() if head.position[j] < at})
        for row, asking in zip(rows, replay_norms(policy, head, len(rows)), strict=True):
            for j, a in row.items():
                best[j] = max(best[j], a * state[j][1 + g] / asking if policy.plus else a)
    return best


def replay_norms(policy: Replay, head: Head, count: int) -> Vector:
    """Norms of so many queries' hidden states: the second reading's own, or the mean of earlier ones."""
    view = head.view
    if not policy.plus:
        return [1.0] * count
    if view.replay is None:
        assert view.tally is not None
        number, total = view.tally[head.row, head.head].tolist()
        return [total / number if number else 1.0] * count
    assert view.replay.residual_norms is not None
    norms: Vector = view.replay.residual_norms[head.row].double().tolist()
    there = [True] * len(norms) if view.replay.valid is None else view.replay.valid[head.row].tolist()
    return [norm for norm, is_there in zip(norms, there, strict=True) if is_there]


def second_reading(head: Head, g: int) -> list[Scores]:
    """The weights that the second reading's queries give to the tokens at hand."""
    view, rows = head.view, []
    assert view.replay is not None
    queries = view.replay.queries[head.row, head.head, g].double().tolist()
    keys = view.replay.keys[head.row, head.head].double().tolist()
    there = [True] * len(keys) if view.replay.valid is None else view.replay.valid[head.row].tolist()
    for i, query in enumerate(queries):
        if not there[i]:
            continue
        every = {j: dot(query, head.key[j]) * view.scaling for j in head.slots}
        # Numbers below 0 stand for the reading's own tokens, of which a query sees those up to its own.
        every |= {-1 - c: dot(query, keys[c]) * view.scaling for c in range(i + 1) if there[c]}
        if view.softcap is not None:
            every = {j: view.softcap * math.tanh(z / view.softcap) for j, z in every.items()}
        if view.sink_logits is not None:
            every[-1 - len(keys)] = float(view.sink_logits[head.head, g])
        rows.append({j: a for j, a in softmax(every).items() if j >= 0})
    return rows


def learned(policy: Learned, head: Head) -> Scores:
    """What the newcomers are told to be, and what was kept beside the others."""
    view = head.view
    assert view.state is not None
    assert view.newcomer_scores is not None
    assert view.newcomer_slots is not None
    told = view.newcomer_scores[head.row, head.head].tolist()
    fresh = dict(zip(view.newcomer_slots[head.row, head.head].tolist(), told, strict=True))
    return {j: fresh.get(j, float(view.state[head.row, head.head, j, 0])) for j in head.slots}


def triattention(policy: TriAttention, head: Head) -> Scores:
    return join([z_scores(raw) for raw in triattention_parts(head)], policy.group) if head.slots else {}


def triattention_parts(head: Head) -> list[Scores]:
    """Of each query head, before they are standardised."""
    view, heads = head.view, []
    assert view.queries is not None
    assert view.query_positions is not None
    assert view.tally is not None
    assert view.rotary is not None
    tally: Vector = view.tally[head.row, head.head].tolist()
    speeds: Vector = view.rotary.speed.double().tolist()
    dims = len(head.key[0]) // 2
    scales = [view.rotary.scale] * len(speeds) + [1.0] * (dims - len(speeds))
    speeds += [0.0] * (dims - len(speeds))
    asked = [(r, p) for r, p in enumerate(view.query_positions[head.row].tolist()) if p >= 0]
    for g in range(view.group):
        before = [tally[1 + (3 * g + i) * dims :][:dims] for i in range(3)]
        center = [complex(x, y) for x, y in zip(before[0], before[1], strict=True)]
        size = list(before[2])
        for r, at in asked:
            query = as_pairs(view.queries[head.row, head.head, g, r].double().tolist(), view)
            for f, q in enumerate(query):
                plain = q * cmath.exp(-1j * speeds[f] * at) / scales[f]
                center[f] += plain
                size[f] += abs(plain)
        number, raw = tally[0] + len(asked), {}
        for j in head.slots:
            total = 0.0
            for f, k in enumerate(as_pairs(head.key[j], view)):
                plain = k * cmath.exp(-1j * speeds[f] * head.position[j]) / scales[f]
                mu, most = center[f] / number, size[f] / number
                phase = cmath.phase(mu * plain.conjugate())
                far = [
                    math.cos(speeds[f] * (head.seen - 1 - head.position[j] + 2**i) + phase) for i in range(17)
                ]
                total += scales[f] ** 2 * abs(mu) * abs(plain) * _mean(far)
                total += scales[f] ** 2 * (most - abs(mu)) * abs(plain)
            raw[j] = total
        heads.append(raw)
    return heads


def as_pairs(x: Vector, view: View) -> list[complex]:
    """The rotary pairs of a vector, then what is left of it, two by two."""
    assert view.rotary is not None
    half = len(view.rotary.speed)
    turned, rest = x[: 2 * half], x[2 * half :]
    if view.rotary.neighbours:
        both = list(zip(turned[::2], turned[1::2], strict=True))
    else:
        both = list(zip(turned[:half], turned[half:], strict=True))
    both += list(zip(rest[::2], rest[1::2], strict=True))
    return [complex(a, b) for a, b in both]


REFERENCES: dict[str, Callable[..., Scores]] = {
    "full": full,
    "streamingllm": streaming,
    "knorm": knorm,
    "random": random,
    "keydiff": keydiff,
    "tova": tova,
    "snapkv": snapkv,
    "ahakv": ahakv,
    "h2o": h2o,
    "obcache": obcache,
    "compactor": compactor,
    "triattention": triattention,
    "learned": learned,
    "replay": replay,
}


def reference(policy: Policy, view: View, row: int, head: int) -> Scores:
    """The scores that the policy must give to the tokens of one head."""
    return REFERENCES[policy.name](policy, Head(view, row, head))
