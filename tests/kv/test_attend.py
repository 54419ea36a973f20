"""Attention over survivors and chunk against loops in float64."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from modicum.kv import attend
from tests.bounds import (
    FUNCTION,
    assert_within,
    attention_bound,
    gamma,
    logit_bound,
    lse_bound,
    softmax_bound,
)

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


def examples(number: int) -> settings:
    return settings(max_examples=number, derandomize=True, deadline=None, database=None)


def loop(
    query: Tensor, keys: Tensor, values: Tensor, scaling: float, sees: list[bool], softcap: float | None
) -> tuple[list[float], float]:
    """One query [Dk] over the keys it sees, one after the other, in float64: output [Dv] and log-sum-exp."""
    logits = []
    for key in keys.double():
        z = scaling * sum(float(a) * float(b) for a, b in zip(query.double(), key, strict=True))
        logits.append(z if softcap is None else softcap * math.tanh(z / softcap))
    seen = [i for i, yes in enumerate(sees) if yes]
    if not seen:
        return [0.0] * values.shape[-1], -math.inf
    top = max(logits[i] for i in seen)
    weights = {i: math.exp(logits[i] - top) for i in seen}
    total = sum(weights.values())
    out = [
        sum(weights[i] / total * float(values[i, d].double()) for i in seen) for d in range(values.shape[-1])
    ]
    return out, top + math.log(total)


@dataclass
class Bounds:
    """Error bounds of attention over these vectors; the reference, in float64, has errors of its own.

    Sums and log-sum-exps are in fp32 (float64 for such queries). Where parts are joined, the share of one is
    computed from the difference of their log-sum-exps: those are off as logits are, so logits count twice.
    """

    logit: float
    out: float
    tokens: int
    wide: torch.dtype

    @classmethod
    def of(
        cls, query: Tensor, keys: Tensor, values: Tensor, scaling: float, softcap: float | None = None
    ) -> Bounds:
        wide, tokens = torch.promote_types(query.dtype, torch.float32), keys.shape[-2]
        logit = 2 * logit_bound(wide, query, keys, scaling, softcap)
        # of the log-sum-exp itself: logits of some size, the logarithm of their number
        largest = scaling * float(query.double().norm(dim=-1).max() * keys.double().norm(dim=-1).max())
        logit += gamma(tokens + 2 * FUNCTION, wide) * (largest + math.log(tokens))
        size = float(values.double().abs().max())
        out = attention_bound(tokens, wide, logit, size, query.dtype)
        twice = 2 if wide == torch.float64 else 1
        return cls(twice * logit, twice * out, tokens, wide)

    def check(self, out: Tensor, lse: Tensor | None, wanted: tuple[list[float], float]) -> None:
        assert_within(out, torch.tensor(wanted[0], dtype=torch.float64), self.out, "output")
        if lse is not None:
            exact = torch.tensor(wanted[1], dtype=torch.float64)
            size = 0.0 if math.isinf(wanted[1]) else wanted[1]
            assert_within(lse, exact, lse_bound(self.tokens, self.wide, self.logit, size), "log-sum-exp")


@st.composite
def shapes(draw: st.DrawFn, widths: tuple[int, ...] = (1, 5, 8, 16)) -> dict[str, Any]:
    torch.manual_seed(draw(st.integers(0, 999)))
    same = draw(st.booleans())
    dk = draw(st.sampled_from(widths))
    return {
        "b": draw(st.integers(1, 2)),
        "h": draw(st.integers(1, 2)),
        "g": draw(st.integers(1, 3)),
        "m": draw(st.integers(1, 7)),
        "n": draw(st.integers(1, 9)),
        "dk": dk,
        "dv": dk if same else draw(st.sampled_from(widths)),
        "dtype": draw(st.sampled_from(DTYPES)),
        "scaling": draw(st.sampled_from([0.1, 0.5, 1.7])),
        "softcap": draw(st.sampled_from([None, None, 2.0])),
    }


def random(*size: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(*size, dtype=torch.float64).to(dtype)


@given(s=shapes(), data=st.data())
@examples(80)
def test_with_lse_is_attention_over_what_is_seen(s: dict[str, Any], data: st.DataObject) -> None:
    kind = data.draw(st.sampled_from(["all", "causal", "row mask", "mask"]))
    m = s["n"] if kind == "causal" else s["m"]
    query = random(s["b"], s["h"], m, s["dk"], dtype=s["dtype"])
    keys = random(s["b"], s["h"], s["n"], s["dk"], dtype=s["dtype"])
    values = random(s["b"], s["h"], s["n"], s["dv"], dtype=s["dtype"])
    mask = None
    if "mask" in kind:
        size = (s["b"], 1, 1 if kind == "row mask" else m, s["n"])
        mask = torch.rand(size) < data.draw(st.sampled_from([0.15, 0.7]))
    out, lse = attend.with_lse(query, keys, values, s["scaling"], kind == "causal", mask, s["softcap"])
    assert out.dtype == s["dtype"]
    assert lse.dtype == (torch.float64 if s["dtype"] == torch.float64 else torch.float32)
    bounds = Bounds.of(query, keys, values, s["scaling"], s["softcap"])
    for b in range(s["b"]):
        for h in range(s["h"]):
            for i in range(m):
                if mask is not None:
                    sees = mask[b, 0, 0 if kind == "row mask" else i].tolist()
                else:
                    sees = [kind == "all" or j <= i for j in range(s["n"])]
                wanted = loop(query[b, h, i], keys[b, h], values[b, h], s["scaling"], sees, s["softcap"])
                bounds.check(out[b, h, i], lse[b, h, i], wanted)


@given(s=shapes(), data=st.data())
@examples(80)
def test_a_chunk_sees_what_is_held_and_itself_up_to_each_token(
    s: dict[str, Any], data: st.DataObject
) -> None:
    b, h, g, m, n = (s[key] for key in "bhgmn")
    query = random(b, h, g, m, s["dk"], dtype=s["dtype"])
    fresh = random(b, h, m, s["dk"], dtype=s["dtype"]), random(b, h, m, s["dv"], dtype=s["dtype"])
    held = held_valid = valid = None
    counts = [n] * b
    if data.draw(st.booleans()):
        held = random(b, h, n, s["dk"], dtype=s["dtype"]), random(b, h, n, s["dv"], dtype=s["dtype"])
        if data.draw(st.booleans()):  # rows that hold fewer, or nothing at all
            counts = data.draw(st.lists(st.integers(0, n), min_size=b, max_size=b))
            held_valid = (torch.arange(n) < torch.tensor(counts)[:, None])[:, None].expand(b, h, n)
    pads = [0] * b
    if data.draw(st.booleans()):
        pads = data.draw(st.lists(st.integers(0, m), min_size=b, max_size=b))
        valid = torch.arange(m) >= torch.tensor(pads)[:, None]
    out, lse = attend.chunk(query, held, held_valid, *fresh, valid, s["scaling"], s["softcap"])
    assert out.shape == (b, h, g, m, s["dv"])
    assert lse.shape == (b, h, g, m)
    assert bool(out.isfinite().all()), "a pad's output means nothing, but must not be what spoils others"
    for row in range(b):
        for head in range(h):
            keys, values = fresh[0][row, head], fresh[1][row, head]
            before = 0
            if held is not None:
                before = counts[row]
                keys = torch.cat([held[0][row, head, :before], keys])
                values = torch.cat([held[1][row, head, :before], values])
            bounds = Bounds.of(query[row, head], keys, values, s["scaling"], s["softcap"])
            for j in range(g):
                for i in range(pads[row], m):
                    sees = [True] * before + [pads[row] <= k <= i for k in range(m)]
                    wanted = loop(query[row, head, j, i], keys, values, s["scaling"], sees, s["softcap"])
                    bounds.check(out[row, head, j, i], lse[row, head, j, i], wanted)


@given(s=shapes(), data=st.data())
@examples(50)
def test_one_new_token_sees_what_is_held(s: dict[str, Any], data: st.DataObject) -> None:
    b, h, g, n = (s[key] for key in "bhgn")
    query = random(b, h, g, s["dk"], dtype=s["dtype"])
    keys, values = (random(b, h, n, s[width], dtype=s["dtype"]) for width in ("dk", "dv"))
    counts, valid = [n] * b, None
    if data.draw(st.booleans()):
        counts = data.draw(st.lists(st.integers(1, n), min_size=b, max_size=b))
        valid = (torch.arange(n) < torch.tensor(counts)[:, None])[:, None].expand(b, h, n)
    out = attend.decode(query, keys, values, s["scaling"], valid)
    bounds = Bounds.of(query, keys, values, s["scaling"])
    for row in range(b):
        for head in range(h):
            for j in range(g):
                sees = [i < counts[row] for i in range(n)]
                args = query[row, head, j], keys[row, head], values[row, head]
                bounds.check(out[row, head, j], None, loop(*args, s["scaling"], sees, None))


@given(s=shapes(), data=st.data())
@examples(50)
def test_merging_two_parts_is_attention_over_both(s: dict[str, Any], data: st.DataObject) -> None:
    n = s["n"] + 1
    query, keys = random(s["dk"], dtype=torch.float64), random(n, s["dk"], dtype=torch.float64)
    values = random(n, s["dv"], dtype=torch.float64) * data.draw(st.sampled_from([1.0, 100.0]))
    query = query * data.draw(st.sampled_from([1.0, 60.0]))  # one part may outweigh the other wholly
    cut = data.draw(st.integers(0, n))
    parts = [
        loop(query, keys, values, s["scaling"], [a <= i < b for i in range(n)], None)
        for a, b in ((0, cut), (cut, n))
    ]
    sides = [(torch.tensor(out), torch.tensor(lse)) for out, lse in parts]
    out, lse = attend.merge(*sides[0], *sides[1])
    wanted = loop(query, keys, values, s["scaling"], [True] * n, None)
    # Both log-sum-exps and outputs were rounded to fp32, in which the share and the new log-sum-exp are made.
    sizes = [abs(lse) for _, lse in parts if math.isfinite(lse)]
    error = gamma(2 + FUNCTION, torch.float32) * (1 + max(sizes))
    share = softmax_bound(2, torch.float32, error) + gamma(4, torch.float32)
    assert_within(out, torch.tensor(wanted[0], dtype=torch.float64), share * float(values.abs().max()))
    assert_within(lse, torch.tensor(wanted[1], dtype=torch.float64), 2 * error)


@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("causal", [False, True])
def test_tiles_change_nothing(causal: bool, softcap: float | None, monkeypatch: pytest.MonkeyPatch) -> None:
    query, keys = random(2, 2, 9, 8, dtype=torch.float32), random(2, 2, 9, 8, dtype=torch.float32)
    values, mask = random(2, 2, 9, 4, dtype=torch.float32), torch.rand(2, 1, 9, 9) < 0.5
    whole = [
        attend.with_lse(query, keys, values, 0.3, causal, x, softcap) for x in (None, mask, mask[:, :, :1])
    ]
    monkeypatch.setattr(attend, "_TILE_BYTES", 4 * 2 * 2 * 9 * 2)
    tiled = [
        attend.with_lse(query, keys, values, 0.3, causal, x, softcap) for x in (None, mask, mask[:, :, :1])
    ]
    bounds = Bounds.of(query, keys, values, 0.3, softcap)
    for a, b in zip(whole, tiled, strict=True):
        assert_within(a[0], b[0], 2 * bounds.out, "output")
        assert_within(a[1], b[1], 2 * bounds.logit, "log-sum-exp")


def test_strided_parts_of_larger_tensors_are_read_as_they_stand() -> None:
    """Arenas and chunks are slices: no kernel may take their neighbours for them."""
    store = torch.full((2, 3, 20, 16), 1e4)
    keys, values = store[:, 1:, 3:12, :8], store[:, 1:, 3:12, 8:]
    keys.copy_(random(2, 2, 9, 8, dtype=torch.float32))
    values.copy_(random(2, 2, 9, 8, dtype=torch.float32))
    wide = torch.full((2, 9, 4, 8), 1e4)
    query = wide.transpose(1, 2).unflatten(1, (2, 2))  # as a model hands it out
    query.copy_(random(2, 2, 2, 9, 8, dtype=torch.float32))
    held = keys[:, :, :5], values[:, :, :5]
    found = attend.chunk(query[:, :, :, 5:], held, None, keys[:, :, 5:], values[:, :, 5:], None, 0.3, None)
    own = [t.contiguous() for t in (query[:, :, :, 5:], *held, keys[:, :, 5:], values[:, :, 5:])]
    wanted = attend.chunk(own[0], (own[1], own[2]), None, own[3], own[4], None, 0.3, None)
    bounds = Bounds.of(query, keys, values, 0.3)
    assert_within(found[0], wanted[0], 2 * bounds.out, "output")
    assert_within(found[1], wanted[1], 2 * bounds.logit, "log-sum-exp")
    step = attend.decode(query[:, :, :, 0], keys, values, 0.3, None)
    own = [t.contiguous() for t in (query[:, :, :, 0], keys, values)]
    assert_within(step, attend.decode(own[0], own[1], own[2], 0.3, None), 2 * bounds.out)
