"""A small Llama-like decoder whose cache is held under a budget, one row, one head and one token at a time.

The other half of the specification (the methods' scores are in `reference_methods`, `reference_wrappers`): in
float64, without a line of modicum. A call is cut into pieces from its end; each piece goes through the whole
model, and in every layer: append its tokens, attend, score, evict. What comes later sees survivors only.
"""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import numpy as np

from tests.kv.reference_methods import (
    Clarity,
    Layer,
    Method,
    Query,
    Rules,
    StreamingLLM,
    Token,
    Vector,
    best,
    dot,
    in_4_bits,
    in_8_bits,
    mean,
    softmax,
)
from tests.kv.reference_wrappers import AdaKV, RazorAttention


class Decoder:
    """A Llama-like decoder over one row. weights: a LlamaForCausalLM's, as float64 arrays by their names."""

    def __init__(
        self, weights: dict[str, np.ndarray], kv_heads: int, head_dim: int, method: Method, rules: Rules
    ):
        self.weights, self.dim, self.method, self.rules = weights, head_dim, method, rules
        self.theta, self.eps, self.seen, self.clarity = 10000.0, 1e-6, 0, Clarity(method.ties)
        number = 1 + max(int(name.split(".")[2]) for name in weights if name.startswith("model.layers."))
        recent = max(rules.recent, method.protects)
        self.least = max(1, rules.n_sink + recent) + rules.evict_every - 1
        budgets = method.layer_budgets(rules, number, self.least)
        self.layers = []
        for i in range(number):
            own = {n.split(".")[-2][0]: w for n, w in weights.items() if f"layers.{i}.self_attn." in n}
            group = own["q"].shape[0] // own["k"].shape[0]
            empty: list[Any] = [[[] for _ in range(kv_heads)] for _ in range(2)]
            layer = Layer(i, own, [budgets[i]] * kv_heads, [False] * kv_heads, *empty)
            layer.sinks, layer.recent, layer.group, layer.clarity = rules.n_sink, recent, group, self.clarity
            layer.renumbered = rules.renumbered
            self.layers.append(layer)
        if isinstance(method, RazorAttention):
            self.split_by_kind(method)

    def split_by_kind(self, method: RazorAttention) -> None:
        """RazorAttention's slots; a streaming head's virtual token takes one of its own."""
        heads = [(i, j) for i, layer in enumerate(self.layers) for j in range(len(layer.heads))]
        chosen = method.retrieval()
        if len(chosen) in (0, len(heads)):
            return  # nothing to divide: every head goes by the base
        small = max(self.least + method.compensate, round(self.rules.budget / method.share))
        each, left = divmod(len(heads) * self.rules.budget - (len(heads) - len(chosen)) * small, len(chosen))
        for i, j in heads:
            layer, streams = self.layers[i], (i, j) not in chosen
            layer.streams[j] = streams
            layer.capacity[j] = small - method.compensate if streams else each + (left > 0)
            left -= not streams

    def positions(self, layer: int) -> list[list[int]]:
        return [[t.position for t in head] for head in self.layers[layer].heads]

    def forward_twice(self, ids: list[int]) -> np.ndarray:
        """Logits [2 len(ids), vocab] of the ids and of the same ids once more, of which nothing is kept."""
        return np.array(self.piece(ids + ids, again=len(ids)))

    def forward(self, ids: list[int]) -> np.ndarray:
        """Logits [len(ids), vocab]. A call is cut from its end: len mod chunk tokens, then whole chunks."""
        first, logits = len(ids) % self.rules.chunk, []
        edges = ([0] if first else []) + list(range(first, len(ids) + 1, self.rules.chunk))
        for start, stop in pairwise(edges):
            logits += self.piece(ids[start:stop])
        return np.array(logits)

    def piece(self, ids: list[int], again: int = 0) -> list[Vector]:
        w, hidden = self.weights, [self.weights["model.embed_tokens.weight"][i] for i in ids]
        positions = range(self.seen, self.seen + len(ids))
        self.seen += len(ids) - again
        for layer in self.layers:
            at = f"model.layers.{layer.index}."
            layer.seen, layer.again = self.seen, again
            x = [self.rms(h, w[at + "input_layernorm.weight"]) for h in hidden]
            hidden = [h + a for h, a in zip(hidden, self.attention(layer, x, positions), strict=True)]
            for i, h in enumerate(hidden):
                x = self.rms(h, w[at + "post_attention_layernorm.weight"])
                gate, up = w[at + "mlp.gate_proj.weight"] @ x, w[at + "mlp.up_proj.weight"] @ x
                hidden[i] = h + w[at + "mlp.down_proj.weight"] @ (gate / (1 + np.exp(-gate)) * up)
        return [w["lm_head.weight"] @ self.rms(h, w["model.norm.weight"]) for h in hidden]

    def rms(self, x: Vector, weight: Vector) -> Vector:
        return weight * x / math.sqrt(dot(x, x) / len(x) + self.eps)

    def heads_of(self, x: Vector, weight: np.ndarray) -> list[Vector]:
        """The projection of x, head by head."""
        return list((weight @ x).reshape(-1, self.dim))

    def turned(self, v: Vector, position: int) -> Vector:
        """A query or key at its position (RoPE: dimension i with i + d/2)."""
        half = self.dim // 2
        angle = np.array([position * self.theta ** (-2 * i / self.dim) for i in range(half)])
        a, b = v[:half], v[half:]
        return np.concatenate([a * np.cos(angle) - b * np.sin(angle), b * np.cos(angle) + a * np.sin(angle)])

    def renumber(self, layer: Layer) -> None:
        """Turn each key to its rank in its head, and each query to that of its token (or the last before)."""
        for tokens in layer.heads:
            for rank, token in enumerate(sorted(tokens, key=lambda t: t.position)):
                token.key = self.turned(token.plain, rank)
        for query in layer.queries:
            for member, plain in enumerate(query.plain):
                held = layer.heads[member // layer.group]
                rank = sum(token.position <= query.position for token in held) - 1
                query.heads[member] = self.turned(plain, max(rank, 0))

    def attention(self, layer: Layer, xs: list[Vector], positions: range) -> list[Vector]:
        """Append, attend, score, evict."""
        w, outs = layer.weights, []
        for x, at in zip(xs, positions, strict=True):
            plain = self.heads_of(x, w["q"])
            layer.queries.append(Query(at, [self.turned(q, at) for q in plain], plain))
            keys, values = self.heads_of(x, w["k"]), self.heads_of(x, w["v"])
            for head, plain_key, value in zip(layer.heads, keys, values, strict=True):
                head.append(self.token(at, plain_key, value))
        if self.rules.renumbered:
            self.renumber(layer)
        new = layer.queries[-len(xs) :]
        for query in new:
            parts = [self.attend(layer, query, member) for member in range(len(query.heads))]
            outs.append(w["o"] @ np.concatenate(parts))
        self.method.observe(layer, new)
        if layer.again:
            layer.heads = [[t for t in head if t.position < layer.seen] for head in layer.heads]
            del layer.queries[-layer.again :]
            xs = xs[: -layer.again]
        if isinstance(self.method, AdaKV) and len(xs) > 1:
            self.compete(layer, self.method)
            return outs
        kept = [self.survivors(layer, head, len(xs)) for head in range(len(layer.heads))]
        for head, keep in enumerate(kept):
            layer.gone[head] += [t for t in layer.heads[head] if layer.streams[head] and t not in keep]
            layer.heads[head] = keep
        return outs

    def token(self, at: int, plain: Vector, value: Vector) -> Token:
        """As it lies in its slot; a key that is to be renumbered lies there as it was before RoPE."""
        key, given = self.turned(plain, at), (plain, value)
        if self.rules.store != "model":
            of_keys = in_4_bits if self.rules.store == "int4" else in_8_bits
            of_values = in_8_bits if self.rules.store == "int8" else in_4_bits
            plain, key, value = of_keys(plain), of_keys(key), of_values(value)
        return Token(at, key, value, plain, given)

    def attend(self, layer: Layer, query: Query, member: int) -> Vector:
        """Σ a_j v_j over what is held and came no later; the virtual token weighs N times what one would."""
        q, head = query.heads[member], member // layer.group
        seen = [t for t in layer.heads[head] if t.position <= query.position]
        z = [dot(q, t.key) / math.sqrt(self.dim) for t in seen]
        values = [t.value for t in seen]
        gone = layer.gone[head] if getattr(self.method, "compensate", False) else []
        if gone:
            virtual = mean([t.key for t in gone])
            if self.rules.renumbered:  # right after the sinks
                virtual = self.turned(mean([t.plain for t in gone]), self.rules.n_sink)
            z.append(dot(q, virtual) / math.sqrt(self.dim) + math.log(len(gone)))
            values.append(mean([t.value for t in gone]))
        return sum(a * v for a, v in zip(softmax(z), values, strict=True))

    def survivors(self, layer: Layer, head: int, new: int) -> list[Token]:
        """What a head keeps: b after a piece of several tokens and b + 1 - evict_every after a single one."""
        tokens, b = layer.heads[head], layer.capacity[head]
        if len(tokens) <= b:
            return tokens
        count = b if new > 1 else b + 1 - self.rules.evict_every
        method = StreamingLLM() if layer.streams[head] else self.method
        return best(layer, tokens, method.score(layer, head), count)

    def compete(self, layer: Layer, method: AdaKV) -> None:
        """Ada-KV: each head is sure of its best safeguard · b, the best of all get the other slots.

        What a head wins is its budget until the next draw. Slots that nobody takes leave the budgets as they
        are, or, if those have become too small, are shared equally.
        """
        number = len(layer.heads)
        b = sum(layer.capacity) // number
        sure = max(int(method.safeguard * b), self.least)
        rated = []  # (certain, score, position, head, token)
        for head, tokens in enumerate(layer.heads):
            scores = method.score(layer, head)
            top = best(layer, tokens, scores, sure)
            rated += [(t in top, s, t.position, head, t) for t, s in zip(tokens, scores, strict=True)]
        rated.sort(key=lambda r: r[:4], reverse=True)
        won, lost = rated[: number * b], rated[number * b :]
        if lost and not won[-1][0]:
            self.clarity.gap(won[-1][1], lost[0][1], [r[1] for r in rated if not r[0]])
        for head in range(number):
            layer.heads[head] = sorted((r[4] for r in won if r[3] == head), key=lambda t: t.position)
        counts = [len(tokens) for tokens in layer.heads]
        free = number * b - sum(counts)
        if free == 0 or any(n > c for n, c in zip(counts, layer.capacity, strict=True)):
            layer.capacity = [n + free // number + (h < free % number) for h, n in enumerate(counts)]
