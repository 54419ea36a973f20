"""Row sums against loops in float64, the Triton kernels and their twin alike."""

from __future__ import annotations

import os

import torch

if not torch.cuda.is_available():  # before Triton is imported, which reads it then
    os.environ["TRITON_INTERPRET"] = "1"

from collections.abc import Callable
from dataclasses import dataclass
from math import exp, log, tanh

import pytest
from torch import Tensor

from modicum.kernels import rows, rows_twin
from tests.bounds import assert_within, gamma, logit_bound, softmax_bound, underflow

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SMALL = rows.Config(rows=16, block=16, splits=2, warps=4, stages=1)

pytestmark = pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning")  # the interpreter's


@dataclass
class Case:
    queries: Tensor
    query_positions: Tensor
    parts: tuple[Tensor, ...]
    positions: Tensor
    scaling: float

    def on(self, device: str) -> tuple[Tensor, Tensor, tuple[Tensor, ...], Tensor, float]:
        parts = tuple(part.to(device) for part in self.parts)
        return (
            *(self.queries.to(device), self.query_positions.to(device)),
            *(parts, self.positions.to(device), self.scaling),
        )


def case(
    g: int = 2,
    r: int = 5,
    dim: int = 16,
    sizes: tuple[int, ...] = (21, 6),
    dtype: torch.dtype = torch.float32,
    b: int = 2,
    h: int = 2,
    empty: float = 0.2,
) -> Case:
    """Tokens in no order, some slots empty; queries of which the first see little and one is none at all."""
    torch.manual_seed(g * 100 + r * 10 + dim)
    n = sum(sizes)
    places = torch.stack([torch.randperm(2 * n)[:n] for _ in range(b * h)]).view(b, h, n).int()
    places = places.masked_fill(torch.rand(b, h, n) < empty, -1)
    at = torch.randint(0, 2 * n, (b, r))
    at[0, 0] = -1
    if r > 2:
        at[1, 1] = 0
    keys = []
    for size in sizes:
        wide = torch.randn(b, size + 3, h, dim).to(dtype)  # a slice of a transposed projection
        keys.append(wide.transpose(1, 2)[:, :, :size])
    queries = torch.randn(b, h, g, r + 1, dim).to(dtype)[:, :, :, 1:]
    return Case(queries, at, tuple(keys), places, 0.3)


def wanted(c: Case, softcap: float | None = None, gain: Tensor | None = None, over: str = "sum") -> Tensor:
    """[B, H, G, N] float64: one query, one token at a time."""
    b, h, g, r, _ = c.queries.shape
    keys = torch.cat(c.parts, 2).double()
    total = torch.zeros(b, h, g, keys.shape[2], dtype=torch.float64)
    for row in range(b):
        for head in range(h):
            for i in range(r):
                at = c.query_positions if c.query_positions.dim() == 2 else c.query_positions[:, head]
                last = int(at[row, i])
                where = c.positions[row, head].tolist()
                seen = [j for j, p in enumerate(where) if 0 <= p <= last]
                for member in range(g):
                    query = c.queries[row, head, member, i].double()
                    logit = [float(query @ keys[row, head, j]) * c.scaling for j in seen]
                    if softcap is not None:
                        logit = [softcap * tanh(z / softcap) for z in logit]
                    if gain is not None:
                        factor = gain if gain.dim() == 2 else gain[:, head]
                        logit = [z * float(factor[row, i]) for z in logit]
                    mass = sum(exp(z) for z in logit)
                    for j, z in zip(seen, logit, strict=True):
                        old, new = float(total[row, head, member, j]), exp(z) / mass
                        total[row, head, member, j] = old + new if over == "sum" else max(old, new)
    return total


def share(c: Case, softcap: float | None = None, gain: Tensor | None = None) -> float:
    """Relative error of a sum of attention weights, all of which are positive.

    Products and sums are in fp32 (float64 for such queries), whatever the dtype of queries and keys.
    """
    wide = torch.promote_types(c.queries.dtype, torch.float32)
    most = 1.0 if gain is None else max(1.0, float(gain.max()))
    error = max(logit_bound(wide, c.queries, part, c.scaling, softcap) for part in c.parts) * 2 * most
    tokens = c.positions.shape[2]
    return softmax_bound(tokens, wide, error) + gamma(c.queries.shape[3], wide)


def check(c: Case, config: rows.Config | None = SMALL, **options: object) -> None:
    expected = wanted(c, **options)  # type: ignore[arg-type]  # the options of row_sums
    moved = {k: v.to(DEVICE) if isinstance(v, Tensor) else v for k, v in options.items()}
    found = {
        "kernel": rows.row_sums(*c.on(DEVICE), config=config, **moved),  # type: ignore[arg-type]  # as above
        "twin": rows_twin.row_sums(*c.on(DEVICE), **moved),  # type: ignore[arg-type]  # as above
    }
    for name, sums in found.items():
        assert sums.dtype == torch.float32, name
        error = share(c, options.get("softcap"), options.get("gain"))  # type: ignore[arg-type]  # as above
        assert_within(sums, expected, error * expected + c.queries.shape[3] * underflow(torch.float32), name)


@pytest.mark.parametrize(("g", "r", "dim"), [(1, 1, 16), (2, 5, 48), (3, 9, 16), (4, 20, 64), (1, 33, 128)])
def test_sums_of_groups_rows_and_head_sizes(g: int, r: int, dim: int) -> None:
    check(case(g, r, dim, h=2 if r < 20 else 1))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sums_of_half_precision(dtype: torch.dtype) -> None:
    check(case(3, 4, 48, dtype=dtype))


@pytest.mark.parametrize("sizes", [(1,), (16,), (70,), (1, 1), (33, 16), (3, 40), (0, 5)])
def test_any_number_of_tokens_in_one_or_two_parts(sizes: tuple[int, ...]) -> None:
    check(case(2, 3, 16, sizes, empty=0.1))


def test_many_splits_and_the_chosen_sizes() -> None:
    c = case(2, 3, 16, (90, 40))
    check(c, rows.Config(rows=16, block=16, splits=5, warps=4, stages=1))
    check(c, None)


@pytest.mark.parametrize("over", ["sum", "max"])
@pytest.mark.parametrize("softcap", [None, 1.5])
def test_a_gain_for_each_query(over: str, softcap: float | None) -> None:
    c = case(2, 6, 16)
    check(c, over=over, softcap=softcap, gain=torch.rand(2, 6) * 3)
    check(c, over=over, softcap=softcap)


def test_gains_and_query_positions_for_each_head() -> None:
    c = case(2, 6, 16)
    c.query_positions = torch.stack([c.query_positions, c.query_positions.flip(1) + 7], 1).int()
    gain = torch.rand(2, 2, 6)
    gain[:, :, 2] = 0  # such a row is uniform
    check(c, gain=gain)


def test_the_largest_of_more_rows_than_a_tile_holds() -> None:
    check(case(2, 20, 16, h=1), over="max")


def test_a_group_wider_than_a_tile_of_rows() -> None:
    check(case(19, 2, 16, b=2, h=1))


def test_a_row_that_sees_nothing_adds_nothing() -> None:
    c = case(2, 2, 16, empty=0.0)
    c.query_positions[:] = torch.tensor([[-1, -1], [-1, 10**6]])
    check(c)
    assert not rows.row_sums(*c.on(DEVICE), config=SMALL)[0].any()


def test_logits_far_apart_neither_overflow_nor_vanish() -> None:
    c = case(1, 3, 16)
    c.queries = c.queries * 200
    check(c)


@pytest.mark.parametrize("make", [rows.row_sums, rows_twin.row_sums])
def test_log_sum_exps_known_already(make: Callable[..., Tensor]) -> None:
    c = case(3, 5, 16)
    b, h, g, r, _ = c.queries.shape
    lse = torch.empty(b, h, g, r + 4)[..., 4:]  # a view, as of a chunk's last rows
    keys = torch.cat(c.parts, 2).double()
    for row, head, member, i in torch.cartesian_prod(*map(torch.arange, (b, h, g, r))).tolist():
        last, where = int(c.query_positions[row, i]), c.positions[row, head].tolist()
        seen = [j for j, p in enumerate(where) if 0 <= p <= last]
        logit = [float(c.queries[row, head, member, i].double() @ keys[row, head, j]) * 0.3 for j in seen]
        lse[row, head, member, i] = log(sum(exp(z) for z in logit)) if seen else -torch.inf
    found = make(*c.on(DEVICE), lse=lse.to(DEVICE)).double().cpu()
    expected = wanted(c)
    assert_within(found, expected, 2 * share(c) * expected)  # the log-sum-exps given are rounded too
    halved = make(*c.on(DEVICE), lse=(lse + log(2)).to(DEVICE)).double().cpu()  # so it is read, not remade
    assert_within(halved, expected / 2, 2 * share(c) * expected / 2)


def test_the_twin_keeps_float64() -> None:
    c = case(2, 5, 16)
    c.queries, c.parts = c.queries.double(), tuple(part.double() for part in c.parts)
    found = rows_twin.row_sums(*c.on("cpu"))
    assert found.dtype == torch.float64
    expected = wanted(c)
    assert_within(found, expected, 2 * share(c) * expected)


def test_what_the_kernels_do_not_take() -> None:
    assert rows.serves(80, torch.bfloat16, torch.bfloat16) is None
    for reason in (rows.serves(40, torch.float32), rows.serves(272, torch.float32)):
        assert reason is not None
        assert "head size" in reason
    assert rows.serves(64, torch.float64) is not None
    assert rows.serves(64, torch.float32, torch.float16) is not None
