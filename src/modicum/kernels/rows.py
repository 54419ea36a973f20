"""Sums over attention rows: how much some queries together attend to each token, never storing a row."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
import triton  # type: ignore[import-untyped]  # triton ships no types
import triton.language as tl  # type: ignore[import-untyped]  # as above
from torch import Tensor

from modicum.kernels.sizes import ROOMY, pow2

# ruff: noqa: N803, N806
# Shapes and compile-time constants are in capitals, as everywhere in Triton.
# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator"
# The bodies under @triton.jit are Triton's language: their arguments have no Python type.

_LOG2E = tl.constexpr(1.4426950408889634)
_INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)
_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
_WAVE = 264  # programs that keep a large GPU busy: two on each of 132 multiprocessors
_MOST_SPLITS = 32


@dataclass(frozen=True)
class Config:
    """Sizes for one shape of input; a benchmark may sweep them."""

    rows: int
    """Query rows (of all heads of a group) in a tile: a power of two, at least 16."""
    block: int
    """Tokens in a tile: a power of two, at least 16."""
    splits: int
    """Programs that share the tokens of one tile of rows in the first launch, for each part."""
    warps: int
    stages: int


def serves(dim: int, *dtypes: torch.dtype) -> str | None:
    """Why the kernels do not take heads of this size and these dtypes (queries', keys'); None if they do."""
    if dim % 16 or not 16 <= dim <= 256:
        return f"a head size of {dim}, not a multiple of 16 up to 256"
    if len(set(dtypes)) != 1:
        return "queries and keys of several dtypes"
    if dtypes[0] not in _DTYPES:
        return f"{dtypes[0]}, neither fp16, bf16 nor fp32"
    return None


def choose(queries: Tensor, parts: tuple[Tensor, ...]) -> Config:
    """The sizes for queries [B, H, G, R, Dk] against parts [B, H, n_i, Dk]."""
    b, h, g, r, dim = queries.shape
    exact = queries.element_size() == 4  # no tensor cores: small tiles, or registers spill
    tight = exact or not _roomy(queries)
    most = (16 if dim > 128 else 32) if exact else 64 if tight or dim > 128 else 128
    rows = max(16, min(most, pow2(g) * pow2(r)))
    block = 32 if tight else 64
    tiles = b * h * triton.cdiv(pow2(g) * r, rows)
    n = max(part.shape[2] for part in parts)
    splits = max(1, min(_MOST_SPLITS, _WAVE // (tiles * len(parts)), triton.cdiv(n, 2 * block)))
    warps = 8 if rows == 128 and dim > 64 else 4
    return Config(rows, block, splits, warps, stages=1 if tight else 2)


def _roomy(x: Tensor) -> bool:
    """Whether x's device has the shared memory of a data centre's GPU."""
    return not x.is_cuda or torch.cuda.get_device_capability(x.device) in ROOMY


def row_sums(
    queries: Tensor,
    query_positions: Tensor,
    parts: tuple[Tensor, ...],
    positions: Tensor,
    scaling: float,
    *,
    softcap: float | None = None,
    gain: Tensor | None = None,
    over: Literal["sum", "max"] = "sum",
    lse: Tensor | None = None,
    config: Config | None = None,
) -> Tensor:
    """Σ_i softmax_j(gain_i · z_ij) over the R queries i (or the largest), for each token j: [B, H, G, N].

    The sums are in fp32. queries [B, H, G, R, Dk]; query_positions [B, R] or [B, H, R] int, -1 where there
    is no query; parts: one or two key tensors [B, H, n_i, Dk] (arena, then chunk), N = Σ n_i; positions
    [B, H, N] int, -1 where
    there is no token; gain [B, R] or [B, H, R] fp32. z = scaling · q·k, soft-capped where `softcap` is given.
    Query i sees token j where 0 ≤ positions[j] ≤ query_positions[i]; a row that sees nothing is zero.
    lse: [B, H, G, R] fp32, the natural log-sum-exps of these very rows where they are known already.

    Source: the observation window's votes of SnapKV (arXiv 2404.14469) and the accumulated sums of H2O
    (arXiv 2306.14048), as `View.row_tiles` defines them; the split of the tokens is Flash-Decoding's.
    Floor: keys read twice (once with `lse`) and N·G sums written: 2·B·H·N·Dk·bytes + 4·B·H·G·N;
    4·B·H·G·R·N·Dk FLOPs (half of it with `lse`). Sums are made in a fixed order, without atomics.
    """
    b, h, g, r, dim = queries.shape
    n0 = parts[0].shape[2]
    n1 = 0 if len(parts) == 1 else parts[1].shape[2]
    n = positions.shape[2]
    if n == 0 or r == 0:
        return queries.new_zeros(b, h, g, n, dtype=torch.float32)
    out = torch.empty(b, h, g, n, dtype=torch.float32, device=queries.device)
    first, second = parts[0], parts[-1]
    size = choose(queries, parts) if config is None else config
    in_group = min(pow2(g), size.rows)  # query heads in a tile of rows
    in_rows = size.rows // in_group
    group_tiles = triton.cdiv(g, in_group)
    at = _per_head(query_positions, h)
    factor = at if gain is None else _per_head(gain, h)  # not read without a gain
    common = (
        *(queries, *queries.stride()[:4], at, *at.stride(), factor, *factor.stride()),
        *(first, *first.stride()[:3], second, *second.stride()[:3], positions, *positions.stride()),
        *(n0, n1, h, g, r, scaling, 1.0 if softcap is None else softcap),
    )
    fixed = {
        "DIM": dim,
        "WIDE": pow2(dim),
        "IN_GROUP": in_group,
        "IN_ROWS": in_rows,
        "BLOCK": size.block,
        "CAPPED": softcap is not None,
        "GAINED": gain is not None,
        "num_warps": size.warps,
        "num_stages": size.stages,
    }
    if lse is None:
        splits0 = min(size.splits, triton.cdiv(n0, size.block))
        splits = splits0 + min(size.splits, triton.cdiv(n1, size.block))
        part_lse = torch.empty(b, h, splits, g, r, dtype=torch.float32, device=queries.device)
        grid = (group_tiles * triton.cdiv(r, in_rows), splits, b * h)
        _part_lse[grid](*common, part_lse, splits0, group_tiles, **fixed)
        unit = 1.0
    else:
        part_lse, splits, unit = lse.unsqueeze(2), 1, _LOG2E.value
    blocks0 = triton.cdiv(n0, size.block)
    grid = (blocks0 + triton.cdiv(n1, size.block), group_tiles, b * h)
    _sums[grid](
        *common,
        *(part_lse, *part_lse.stride(), splits, unit, out, blocks0),
        SPLITS=pow2(splits),
        MAXIMUM=over == "max",
        **fixed,
    )
    return out


def _per_head(x: Tensor, heads: int) -> Tensor:
    """[B, R] or [B, H, R] -> [B, H, R], without a copy."""
    return x if x.dim() == 3 else x.unsqueeze(1).expand(-1, heads, -1)


@triton.jit
def _load_queries(base, stride_g, stride_r, group, row, real, DIM: tl.constexpr, WIDE: tl.constexpr):
    """[M, WIDE] the queries of a tile of rows, zeros past the head size and past the rows."""
    lane = tl.arange(0, WIDE)
    where = base + (group * stride_g + row * stride_r)[:, None] + lane[None, :]
    return tl.load(where, mask=real[:, None] & (lane < DIM)[None, :], other=0.0)


@triton.jit
def _load_keys(base, stride_n, token, n, DIM: tl.constexpr, WIDE: tl.constexpr):
    """[WIDE, N] keys, already turned."""
    lane = tl.arange(0, WIDE)
    where = base + (token * stride_n)[None, :] + lane[:, None]
    return tl.load(where, mask=(token < n)[None, :] & (lane < DIM)[:, None], other=0.0)


@triton.jit
def _logits(q, k, at, position, gain, scaling, softcap, CAPPED: tl.constexpr, GAINED: tl.constexpr):
    """[M, N] logits times log2 e, -inf where a row does not see a token."""
    if _INTERPRETED:  # the interpreter would multiply the bits of bf16 as whole numbers
        q, k = q.to(tl.float32), k.to(tl.float32)
    z = tl.dot(q, k, input_precision="ieee") * scaling
    if CAPPED:
        # tanh x = 1 - 2/(e^2x + 1), which neither overflows nor needs a device library
        z = softcap * (1.0 - 2.0 / (tl.exp2(z * (2.0 * _LOG2E / softcap)) + 1.0))
    if GAINED:
        z = z * gain[:, None]
    seen = (position[None, :] >= 0) & (position[None, :] <= at[:, None])
    return tl.where(seen, z * _LOG2E, float("-inf"))


@triton.jit
def _span_lse(
    q, at, gain, keys, stride_n, positions, stride_pos, first, last, scaling, softcap,
    DIM: tl.constexpr, WIDE: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
    CAPPED: tl.constexpr, GAINED: tl.constexpr,
):  # fmt: skip  # one argument a line would hide the rest
    """[M] base-2 log-sum-exp of each row over the tokens first … last - 1 of one part."""
    top = tl.full((ROWS,), float("-inf"), tl.float32)
    mass = tl.zeros((ROWS,), tl.float32)
    for start in range(first, last, BLOCK):
        token = start + tl.arange(0, BLOCK)
        k = _load_keys(keys, stride_n, token, last, DIM, WIDE)
        position = tl.load(positions + token * stride_pos, mask=token < last, other=-1).to(tl.int32)
        z = _logits(q, k, at, position, gain, scaling, softcap, CAPPED, GAINED)
        higher = tl.maximum(top, tl.max(z, 1))
        origin = tl.where(higher == float("-inf"), 0.0, higher)  # -inf - -inf is not a number
        mass = mass * tl.exp2(top - origin) + tl.sum(tl.exp2(z - origin[:, None]), 1)
        top = higher
    return top + tl.log2(tl.where(mass > 0, mass, 1.0))


@triton.jit
def _part_lse(
    queries, q_b: tl.int64, q_h: tl.int64, q_g: tl.int64, q_r: tl.int64,
    ats, at_b: tl.int64, at_h: tl.int64, at_r: tl.int64,
    gains, gain_b: tl.int64, gain_h: tl.int64, gain_r: tl.int64,
    keys0, k0_b: tl.int64, k0_h: tl.int64, k0_n: tl.int64,
    keys1, k1_b: tl.int64, k1_h: tl.int64, k1_n: tl.int64,
    positions, pos_b: tl.int64, pos_h: tl.int64, pos_n: tl.int64,
    n0, n1, H, G, R, scaling, softcap,
    lse, splits0, group_tiles,
    DIM: tl.constexpr, WIDE: tl.constexpr, IN_GROUP: tl.constexpr, IN_ROWS: tl.constexpr,
    BLOCK: tl.constexpr, CAPPED: tl.constexpr, GAINED: tl.constexpr,
):  # fmt: skip  # a tensor and its strides on one line
    """One tile of rows over one share of the tokens; lse [B, H, splits, G, R] in base 2."""
    tile, split, splits = tl.program_id(0), tl.program_id(1), tl.num_programs(1)
    head = tl.program_id(2)
    b, h = (head // H).to(tl.int64), (head % H).to(tl.int64)
    m = tl.arange(0, IN_GROUP * IN_ROWS)
    group = (tile % group_tiles) * IN_GROUP + m // IN_ROWS
    row = (tile // group_tiles) * IN_ROWS + m % IN_ROWS
    real = (group < G) & (row < R)
    q = _load_queries(queries + b * q_b + h * q_h, q_g, q_r, group, row, real, DIM, WIDE)
    at = tl.load(ats + b * at_b + h * at_h + row * at_r, mask=real, other=-1).to(tl.int32)
    gain = tl.full((IN_GROUP * IN_ROWS,), 1.0, tl.float32)
    if GAINED:
        gain = tl.load(gains + b * gain_b + h * gain_h + row * gain_r, mask=real, other=1.0)
    where = positions + b * pos_b + h * pos_h
    to = lse + (head.to(tl.int64) * splits + split) * G * R + group * R + row
    if split < splits0:
        share = tl.cdiv(tl.cdiv(n0, splits0), BLOCK) * BLOCK
        first = split * share
        some = _span_lse(
            q, at, gain, keys0 + b * k0_b + h * k0_h, k0_n, where, pos_n, first,
            tl.minimum(n0, first + share), scaling, softcap, DIM, WIDE, IN_GROUP * IN_ROWS, BLOCK,
            CAPPED, GAINED,
        )  # fmt: skip
        tl.store(to, some, mask=real)
    else:
        share = tl.cdiv(tl.cdiv(n1, splits - splits0), BLOCK) * BLOCK
        first = (split - splits0) * share
        some = _span_lse(
            q, at, gain, keys1 + b * k1_b + h * k1_h, k1_n, where + n0 * pos_n, pos_n, first,
            tl.minimum(n1, first + share), scaling, softcap, DIM, WIDE, IN_GROUP * IN_ROWS, BLOCK,
            CAPPED, GAINED,
        )  # fmt: skip
        tl.store(to, some, mask=real)


@triton.jit
def _block_sums(
    queries, q_g, q_r, ats, at_r, gains, gain_r, lse, lse_s, lse_g, lse_r, splits, unit,
    keys, k_n, positions, pos_n, start, n, scaling, softcap, group_tile, G, R, out, N,
    DIM: tl.constexpr, WIDE: tl.constexpr, IN_GROUP: tl.constexpr, IN_ROWS: tl.constexpr,
    BLOCK: tl.constexpr, CAPPED: tl.constexpr, GAINED: tl.constexpr,
    SPLITS: tl.constexpr, MAXIMUM: tl.constexpr,
):  # fmt: skip  # a tensor and its strides together
    """All rows of some query heads at one block of one part's tokens; out: where its [G, N] begins."""
    token = start + tl.arange(0, BLOCK)
    k = _load_keys(keys, k_n, token, n, DIM, WIDE)
    position = tl.load(positions + token * pos_n, mask=token < n, other=-1).to(tl.int32)
    m = tl.arange(0, IN_GROUP * IN_ROWS)
    group = group_tile * IN_GROUP + m // IN_ROWS
    share = tl.arange(0, SPLITS)
    total = tl.zeros((IN_GROUP, BLOCK), tl.float32)
    for start_row in range(0, R, IN_ROWS):
        row = start_row + m % IN_ROWS
        real = (group < G) & (row < R)
        q = _load_queries(queries, q_g, q_r, group, row, real, DIM, WIDE)
        at = tl.load(ats + row * at_r, mask=real, other=-1).to(tl.int32)
        gain = tl.full((IN_GROUP * IN_ROWS,), 1.0, tl.float32)
        if GAINED:
            gain = tl.load(gains + row * gain_r, mask=real, other=1.0)
        where = lse + (group * lse_g + row * lse_r)[None, :] + (share * lse_s)[:, None]
        parts = tl.load(where, mask=(share < splits)[:, None] & real[None, :], other=float("-inf")) * unit
        top = tl.max(parts, 0)
        origin = tl.where(top == float("-inf"), 0.0, top)  # a row that sees nothing: exp2(-inf - 0) is 0
        mass = tl.sum(tl.exp2(parts - origin[None, :]), 0)
        norm = origin + tl.log2(tl.where(mass > 0, mass, 1.0))
        z = _logits(q, k, at, position, gain, scaling, softcap, CAPPED, GAINED)
        weight = tl.reshape(tl.exp2(z - norm[:, None]), (IN_GROUP, IN_ROWS, BLOCK))
        if MAXIMUM:
            total = tl.maximum(total, tl.max(weight, 1))
        else:
            total += tl.sum(weight, 1)
    head = group_tile * IN_GROUP + tl.arange(0, IN_GROUP)
    tl.store(out + head[:, None] * N + token[None, :], total, mask=(head < G)[:, None] & (token < n)[None, :])


@triton.jit
def _sums(
    queries, q_b: tl.int64, q_h: tl.int64, q_g: tl.int64, q_r: tl.int64,
    ats, at_b: tl.int64, at_h: tl.int64, at_r: tl.int64,
    gains, gain_b: tl.int64, gain_h: tl.int64, gain_r: tl.int64,
    keys0, k0_b: tl.int64, k0_h: tl.int64, k0_n: tl.int64,
    keys1, k1_b: tl.int64, k1_h: tl.int64, k1_n: tl.int64,
    positions, pos_b: tl.int64, pos_h: tl.int64, pos_n: tl.int64,
    n0, n1, H, G, R, scaling, softcap,
    lse, lse_b: tl.int64, lse_h: tl.int64, lse_s: tl.int64, lse_g: tl.int64, lse_r: tl.int64,
    splits, unit, out, blocks0,
    DIM: tl.constexpr, WIDE: tl.constexpr, IN_GROUP: tl.constexpr, IN_ROWS: tl.constexpr,
    BLOCK: tl.constexpr, CAPPED: tl.constexpr, GAINED: tl.constexpr,
    SPLITS: tl.constexpr, MAXIMUM: tl.constexpr,
):  # fmt: skip  # a tensor and its strides on one line
    """One block of tokens, some query heads, all rows: out [B, H, G, N], each sum written once."""
    block, group_tile, head = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    b, h = (head // H).to(tl.int64), (head % H).to(tl.int64)
    q = queries + b * q_b + h * q_h
    at = ats + b * at_b + h * at_h
    gain = gains + b * gain_b + h * gain_h
    norm = lse + b * lse_b + h * lse_h
    where = positions + b * pos_b + h * pos_h
    N = n0 + n1
    to = out + head.to(tl.int64) * G * N
    if block < blocks0:
        _block_sums(
            q, q_g, q_r, at, at_r, gain, gain_r, norm, lse_s, lse_g, lse_r, splits, unit,
            keys0 + b * k0_b + h * k0_h, k0_n, where, pos_n, block * BLOCK, n0, scaling, softcap, group_tile,
            G, R, to, N, DIM, WIDE, IN_GROUP, IN_ROWS, BLOCK, CAPPED, GAINED, SPLITS, MAXIMUM,
        )  # fmt: skip
    else:
        _block_sums(
            q, q_g, q_r, at, at_r, gain, gain_r, norm, lse_s, lse_g, lse_r, splits, unit,
            keys1 + b * k1_b + h * k1_h, k1_n, where + n0 * pos_n, pos_n, (block - blocks0) * BLOCK, n1,
            scaling, softcap, group_tile, G, R, to + n0, N, DIM, WIDE, IN_GROUP, IN_ROWS, BLOCK, CAPPED,
            GAINED, SPLITS, MAXIMUM,
        )  # fmt: skip
