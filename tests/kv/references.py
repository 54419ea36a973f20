"""The base policies once more, from their formulas: float64, plain loops over heads, queries and tokens."""

from __future__ import annotations

import math
from collections.abc import Callable

from modicum.kv.policies.ahakv import AhaKV
from modicum.kv.policies.full import Full
from modicum.kv.policies.h2o import H2O
from modicum.kv.policies.keydiff import KeyDiff
from modicum.kv.policies.knorm import Knorm
from modicum.kv.policies.random import Random
from modicum.kv.policies.snapkv import SnapKV
from modicum.kv.policies.streaming import StreamingLLM
from modicum.kv.policies.tova import TOVA
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
        if not z:
            return {}
        top = max(z.values())
        total = sum(math.exp(x - top) for x in z.values())
        return {j: math.exp(x - top) / total for j, x in z.items()}

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
}


def reference(policy: Policy, view: View, row: int, head: int) -> Scores:
    """The scores that the policy must give to the tokens of one head."""
    return REFERENCES[policy.name](policy, Head(view, row, head))
