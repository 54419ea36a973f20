"""A chunk's attention against loops in float64, the Triton kernel and its twin alike."""

from __future__ import annotations

import os

import torch

if not torch.cuda.is_available():  # before Triton is imported, which reads it then
    os.environ["TRITON_INTERPRET"] = "1"

from dataclasses import dataclass, replace
from math import exp, log, tanh

import pytest
from torch import Tensor

from modicum.kernels import chunk, chunk_twin
from tests.bounds import assert_within, attention_bound, logit_bound, lse_bound

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SMALL = chunk.Config(rows=16, block=16, warps=4, stages=2)

pytestmark = pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning")  # the interpreter's


@dataclass
class Case:
    query: Tensor
    held: tuple[Tensor, Tensor] | None
    held_count: Tensor | None
    key: Tensor
    value: Tensor
    valid: Tensor | None
    scaling: float
    softcap: float | None = None

    def on(self, device: str) -> tuple[object, ...]:
        def at(x: Tensor | None) -> Tensor | None:
            return None if x is None else x.to(device)

        held = None if self.held is None else tuple(x.to(device) for x in self.held)
        return (
            *(at(self.query), held, at(self.held_count), at(self.key), at(self.value), at(self.valid)),
            *(self.scaling, self.softcap),
        )


def case(
    g: int = 2,
    m: int = 7,
    n: int = 21,
    dims: tuple[int, int] = (16, 16),
    dtype: torch.dtype = torch.float32,
    b: int = 2,
    h: int = 2,
    counts: list[int] | None = None,
    valid: list[list[int]] | None = None,
) -> Case:
    """A chunk as slices of transposed projections, what is held as an arena's first slots."""
    torch.manual_seed(1000 * g + 10 * m + n)
    query = torch.randn(b, m + 2, h * g, dims[0]).to(dtype)[:, 2:].transpose(1, 2).unflatten(1, (h, g))
    key, value = (torch.randn(b, m, h, dim).to(dtype).transpose(1, 2) for dim in dims)
    held = None
    if n:
        old_key, old_value = (torch.randn(b, h, n + 5, dim).to(dtype)[:, :, :n] for dim in dims)
        for row, count in enumerate(counts or []):
            old_key[row, :, count:], old_value[row, :, count:] = 9.0, 1e4  # what was there before
        held = old_key, old_value
    held_count = None if counts is None else torch.tensor(counts, dtype=torch.int32)
    mask = None if valid is None else torch.tensor(valid, dtype=torch.bool)
    return Case(query, held, held_count, key, value, mask, 0.3)


def wanted(c: Case) -> tuple[Tensor, Tensor]:
    """Outputs and log-sum-exps in float64, one query at a time, zero for pads."""
    b, h, g, m, _ = c.query.shape
    out = torch.zeros(b, h, g, m, c.value.shape[-1], dtype=torch.float64)
    lse = torch.zeros(b, h, g, m, dtype=torch.float64)
    for row in range(b):
        real = [True] * m if c.valid is None else c.valid[row].tolist()
        for head in range(h):
            old: list[tuple[Tensor, Tensor]] = []
            if c.held is not None:
                count = c.held[0].shape[2] if c.held_count is None else int(c.held_count[row])
                old = [(c.held[0][row, head, j], c.held[1][row, head, j]) for j in range(count)]
            for i in range(m):
                if not real[i]:
                    continue
                seen = old + [(c.key[row, head, j], c.value[row, head, j]) for j in range(i + 1) if real[j]]
                for member in range(g):
                    query = c.query[row, head, member, i].double()
                    logit = [float(query @ k.double()) * c.scaling for k, _ in seen]
                    if c.softcap is not None:
                        logit = [c.softcap * tanh(z / c.softcap) for z in logit]
                    top = max(logit)
                    mass = sum(exp(z - top) for z in logit)
                    lse[row, head, member, i] = top + log(mass)
                    for z, (_, v) in zip(logit, seen, strict=True):
                        out[row, head, member, i] += exp(z - top) / mass * v.double()
    return out, lse


def bounds(c: Case) -> tuple[Tensor | float, Tensor | float, int]:
    """Error bounds of any logit and any output of a case, and how many tokens are attended to at most."""
    keys, values, tokens = [c.key], [c.value], c.key.shape[2]
    if c.held is not None:
        count = c.held[0].shape[2]
        counts = [count] * len(c.query) if c.held_count is None else c.held_count.tolist()
        for row, n in enumerate(counts):  # what lies past a count is not attended to
            keys.append(c.held[0][row : row + 1, :, :n])
            values.append(c.held[1][row : row + 1, :, :n])
        tokens += count
    wide = torch.promote_types(c.query.dtype, torch.float32)
    error = max(logit_bound(wide, c.query, k, c.scaling, c.softcap) for k in keys)
    size = max(float(v.double().abs().max()) for v in values if v.numel())
    return error, attention_bound(tokens, wide, error, size, c.query.dtype), tokens


def check(c: Case, config: chunk.Config | None = SMALL) -> None:
    expected, expected_lse = wanted(c)
    real = torch.ones(c.query.shape[0], c.query.shape[3], dtype=torch.bool) if c.valid is None else c.valid
    mask = real[:, None, None]
    logit_error, out_error, tokens = bounds(c)
    for name, (out, lse) in {
        "kernel": chunk.chunk(*c.on(DEVICE), config=config),  # type: ignore[arg-type]  # a Case's fields
        "twin": chunk_twin.chunk(*c.on(DEVICE)),  # type: ignore[arg-type]  # as above
    }.items():
        assert out.dtype == c.query.dtype, name
        assert lse.dtype == torch.float32, name
        assert bool(out.isfinite().all()), f"{name}: even pads' rows are numbers"
        assert_within(out.double().cpu() * mask[..., None], expected, out_error, name)
        error = lse_bound(tokens, torch.float32, logit_error, expected_lse)
        assert_within(lse.double().cpu() * mask, expected_lse, error, f"{name}'s log-sum-exp")


@pytest.mark.parametrize("g", [1, 2, 3, 4])
@pytest.mark.parametrize(("m", "n"), [(1, 5), (7, 0), (16, 16), (19, 33)])
def test_groups_and_lengths(g: int, m: int, n: int) -> None:
    check(case(g, m, n, h=1))


@pytest.mark.parametrize("dims", [(48, 48), (64, 64), (128, 128), (16, 48), (96, 32)])
def test_head_sizes(dims: tuple[int, int]) -> None:
    check(case(2, 9, 20, dims, h=1))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype: torch.dtype) -> None:
    check(case(3, 20, 18, (48, 16), dtype))


def test_rows_that_hold_different_numbers() -> None:
    check(case(2, 6, 21, counts=[21, 3]))
    check(case(2, 6, 21, counts=[16, 0]))


@pytest.mark.parametrize("n", [0, 18])
def test_pads_on_the_left_and_anywhere(n: int) -> None:
    left = [0] * 20 + [1] * 17  # whole blocks of nothing but pads
    check(case(2, 37, n, h=1, valid=[left, [1, 0, 0, 1, 1] * 7 + [0, 1]]))


def test_pads_and_rows_that_hold_nothing() -> None:
    check(case(3, 5, 9, counts=[0, 4], valid=[[0, 0, 1, 1, 1], [0, 1, 0, 0, 1]]))


def test_soft_capped_logits() -> None:
    check(replace(case(2, 9, 20), softcap=1.5))
    check(replace(case(2, 9, 20), softcap=30.0))


def test_logits_far_apart_neither_overflow_nor_vanish() -> None:
    c = case(1, 9, 20)
    check(replace(c, query=c.query * 100))


@pytest.mark.parametrize(("rows", "block"), [(32, 16), (16, 32), (64, 16)])
def test_any_sizes_of_tiles_give_the_same(rows: int, block: int) -> None:
    check(case(3, 23, 37, h=1), chunk.Config(rows, block, warps=4, stages=1))


def test_the_chosen_sizes() -> None:
    check(case(2, 40, 70, h=1), None)


def test_the_twin_keeps_float64() -> None:
    c = case(2, 5, 6)
    assert c.held is not None
    held = c.held[0].double(), c.held[1].double()
    c = replace(c, query=c.query.double(), held=held, key=c.key.double(), value=c.value.double())
    out, lse = chunk_twin.chunk(*c.on("cpu"))  # type: ignore[arg-type]  # a Case's fields
    logit_error, out_error, tokens = bounds(c)
    expected, expected_lse = wanted(c)
    assert out.dtype == lse.dtype == torch.float64
    assert_within(out, expected, 2 * out_error)  # the reference is in float64 too
    assert_within(lse, expected_lse, 2 * lse_bound(tokens, torch.float64, logit_error, expected_lse))


def test_what_the_kernel_does_not_take() -> None:
    assert chunk.serves(192, 128, torch.bfloat16, torch.bfloat16) is None
    for reason in (chunk.serves(40, 64, torch.float32), chunk.serves(64, 272, torch.float32)):
        assert reason is not None
        assert "head size" in reason
    assert chunk.serves(64, 64, torch.float64) is not None
    assert chunk.serves(64, 64, torch.float32, torch.bfloat16) is not None
