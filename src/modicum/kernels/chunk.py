"""Attention of a chunk over the tokens held and itself, in one launch that copies no keys or values."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton  # type: ignore[import-untyped]  # triton ships no types
import triton.language as tl  # type: ignore[import-untyped]  # as above
from torch import Tensor

from modicum.kernels.sizes import ROOMY, pow2

# ruff: noqa: N803
# Shapes and compile-time constants are in capitals, as everywhere in Triton.
# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator"
# The bodies under @triton.jit are Triton's language: their arguments have no Python type.

_LOG2E = tl.constexpr(1.4426950408889634)
_LN2 = tl.constexpr(0.6931471805599453)
_INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)
_DTYPES = (torch.float16, torch.bfloat16, torch.float32)


@dataclass(frozen=True)
class Config:
    """Sizes for one shape of input; a benchmark may sweep them."""

    rows: int
    """Query rows (of all heads of a group) in a tile: a power of two, at least 16."""
    block: int
    """Tokens in a tile: a power of two, at least 16."""
    warps: int
    stages: int


def serves(key_dim: int, value_dim: int, *dtypes: torch.dtype) -> str | None:
    """Why the kernel does not take heads of these sizes and these dtypes (of all inputs); None if it does."""
    for dim in (key_dim, value_dim):
        if dim % 16 or not 16 <= dim <= 256:
            return f"a head size of {dim}, not a multiple of 16 up to 256"
    if len(set(dtypes)) != 1:
        return "queries, keys and values of several dtypes"
    if dtypes[0] not in _DTYPES:
        return f"{dtypes[0]}, neither fp16, bf16 nor fp32"
    return None


def choose(query: Tensor, value_dim: int) -> Config:
    """The sizes for a chunk's queries [B, H, G, m, Dk] and values of Dv."""
    _, _, g, m, key_dim = query.shape
    wide = pow2(max(key_dim, value_dim))
    here = pow2(g * m)
    if query.element_size() == 4:  # no tensor cores: small tiles, or registers spill
        return Config(max(16, min(32 if wide < 128 else 16, here)), 32 if wide <= 128 else 16, 4, 1)
    if query.is_cuda and torch.cuda.get_device_capability(query.device) not in ROOMY:
        return Config(max(16, min(64, here)), 32, 4, 2 if wide <= 128 else 1)
    rows = max(16, min(128, here))
    return Config(rows, 64, 8 if rows == 128 and wide > 64 else 4, 3 if wide <= 128 else 2)


def chunk(
    query: Tensor,
    held: tuple[Tensor, Tensor] | None,
    held_count: Tensor | None,
    key: Tensor,
    value: Tensor,
    valid: Tensor | None,
    scaling: float,
    softcap: float | None = None,
    config: Config | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention of m tokens over those held (all of them earlier) and themselves (causally).

    query [B, H, G, m, Dk]; held: keys [B, H, n, Dk] and values [B, H, n, Dv], of which the first held_count
    [B] int slots hold a token (None: all); key [B, H, m, Dk], value [B, H, m, Dv]; valid [B, m] bool, False
    for pads, which only see what is before them and themselves (their rows mean nothing), or None. Any
    strides, the last dimension contiguous. Returns the output [B, H, G, m, Dv] in the queries' dtype and the
    natural log-sum-exps [B, H, G, m] fp32.
    Source: FlashAttention-2's forward pass (arXiv 2307.08691) over two lists of tokens, after Triton's own
    tutorial; query heads of a group lie side by side in a tile, so that they share every tile of keys.
    Floor: queries, keys, values read and outputs written once; 2·B·H·G·m·(n + m/2)·(Dk + Dv) FLOPs.
    """
    b, h, g, m, key_dim = query.shape
    value_dim = value.shape[-1]
    out = query.new_empty(b, h, g, m, value_dim)
    lse = torch.empty(b, h, g, m, dtype=torch.float32, device=query.device)
    if not m:
        return out, lse
    size = choose(query, value_dim) if config is None else config
    old_key, old_value = (key, value) if held is None else held  # not read where nothing is held
    n = 0 if held is None else old_key.shape[2]
    counted = n > 0 and held_count is not None
    count = lse if held_count is None else held_count  # not read without a count
    pads = key if valid is None else valid.view(torch.uint8)  # not read without pads
    _attend[(triton.cdiv(g * m, size.rows), b * h)](
        *(query, *query.stride()[:4], old_key, *old_key.stride()[:3], old_value, *old_value.stride()[:3]),
        *(key, *key.stride()[:3], value, *value.stride()[:3], count, count.stride(0)),
        *(pads, *pads.stride()[:2], out, *out.stride()[:4], lse, h, g, m, n, scaling),
        1.0 if softcap is None else softcap,
        KEY_DIM=key_dim,
        KEY_WIDE=pow2(key_dim),
        VALUE_DIM=value_dim,
        VALUE_WIDE=pow2(value_dim),
        ROWS=size.rows,
        BLOCK=size.block,
        HELD=n > 0,
        COUNTED=counted,
        PADDED=valid is not None,
        CAPPED=softcap is not None,
        num_warps=size.warps,
        num_stages=size.stages,
    )
    return out, lse


@triton.jit
def _dot(a, b, c):
    if _INTERPRETED:  # the interpreter would multiply the bits of bf16 as whole numbers
        return tl.dot(a.to(tl.float32), b.to(tl.float32), c, input_precision="ieee")
    else:
        return tl.dot(a, b, c, input_precision="ieee")


@triton.jit
def _load(base, stride, token, end, DIM: tl.constexpr, WIDE: tl.constexpr, EDGE: tl.constexpr):
    """[N, WIDE] keys or values; zeros past the head size and, at an edge, past the end."""
    lane = tl.arange(0, WIDE)
    where = base + (token * stride)[:, None] + lane[None, :]
    if EDGE:
        return tl.load(where, mask=(token < end)[:, None] & (lane < DIM)[None, :], other=0.0)
    elif DIM < WIDE:
        return tl.load(where, mask=(lane < DIM)[None, :], other=0.0)
    else:
        return tl.load(where)


@triton.jit
def _span(
    total, mass, top, q, index, keys, key_n, values, value_n, valid, valid_n, first, end, scaling, softcap,
    KEY_DIM: tl.constexpr, KEY_WIDE: tl.constexpr, VALUE_DIM: tl.constexpr, VALUE_WIDE: tl.constexpr,
    BLOCK: tl.constexpr, EDGE: tl.constexpr, CAUSAL: tl.constexpr, PADDED: tl.constexpr,
    CAPPED: tl.constexpr,
):  # fmt: skip  # a tensor and its stride together
    """The running softmax taken over the tokens first … end - 1, whole blocks unless EDGE."""
    for start in range(first, end, BLOCK):
        token = start + tl.arange(0, BLOCK)
        k = _load(keys, key_n, token, end, KEY_DIM, KEY_WIDE, EDGE)
        z = _dot(q, tl.trans(k), tl.zeros((q.shape[0], BLOCK), tl.float32))
        if CAPPED:
            # tanh x = 1 - 2/(e^2x + 1), which neither overflows nor needs a device library
            z = 1.0 - 2.0 / (tl.exp2(z * (scaling * 2.0 * _LOG2E / softcap)) + 1.0)
            z = z * (softcap * _LOG2E)
        else:
            z = z * (scaling * _LOG2E)
        if EDGE:
            z = tl.where((token < end)[None, :], z, float("-inf"))
        if PADDED:
            real = tl.load(valid + token * valid_n, mask=token < end, other=0) != 0
            itself = token[None, :] == index[:, None]
            z = tl.where(real[None, :] | itself, z, float("-inf"))
        if CAUSAL:
            z = tl.where(token[None, :] <= index[:, None], z, float("-inf"))
        higher = tl.maximum(top, tl.max(z, 1))
        origin = higher
        if PADDED:  # nothing but pads so far: -inf - -inf is not a number
            origin = tl.where(higher == float("-inf"), 0.0, higher)
        shrink = tl.exp2(top - origin)
        weight = tl.exp2(z - origin[:, None])
        mass = mass * shrink + tl.sum(weight, 1)
        v = _load(values, value_n, token, end, VALUE_DIM, VALUE_WIDE, EDGE)
        total = _dot(weight.to(v.dtype), v, total * shrink[:, None])
        top = higher
    return total, mass, top


@triton.jit
def _attend(
    queries, q_b: tl.int64, q_h: tl.int64, q_g: tl.int64, q_m: tl.int64,
    old_keys, ok_b: tl.int64, ok_h: tl.int64, ok_n: tl.int64,
    old_values, ov_b: tl.int64, ov_h: tl.int64, ov_n: tl.int64,
    keys, k_b: tl.int64, k_h: tl.int64, k_n: tl.int64,
    values, v_b: tl.int64, v_h: tl.int64, v_n: tl.int64,
    counts, count_b: tl.int64, valid, valid_b: tl.int64, valid_n: tl.int64,
    out, out_b: tl.int64, out_h: tl.int64, out_g: tl.int64, out_m: tl.int64,
    lse, heads, group, m, n, scaling, softcap,
    KEY_DIM: tl.constexpr, KEY_WIDE: tl.constexpr, VALUE_DIM: tl.constexpr, VALUE_WIDE: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, HELD: tl.constexpr, COUNTED: tl.constexpr,
    PADDED: tl.constexpr, CAPPED: tl.constexpr,
):  # fmt: skip  # a tensor and its strides on one line
    """One tile of rows, in the order of tokens and then query heads, of one KV head."""
    head = tl.program_id(1)
    b, h = (head // heads).to(tl.int64), (head % heads).to(tl.int64)
    begin = (tl.num_programs(0) - 1 - tl.program_id(0)) * ROWS  # the longest rows start first
    row = begin + tl.arange(0, ROWS)
    index, member = row // group, row % group
    real = row < group * m
    lane = tl.arange(0, KEY_WIDE)
    where = queries + b * q_b + h * q_h + (member * q_g + index * q_m)[:, None] + lane[None, :]
    q = tl.load(where, mask=real[:, None] & (lane < KEY_DIM)[None, :], other=0.0)
    total = tl.zeros((ROWS, VALUE_WIDE), tl.float32)
    mass = tl.zeros((ROWS,), tl.float32)
    top = tl.full((ROWS,), float("-inf"), tl.float32)
    pads = valid + b * valid_b
    if HELD:
        count = n
        if COUNTED:
            count = tl.load(counts + b * count_b).to(tl.int32)
        whole = count // BLOCK * BLOCK
        old_key, old_value = old_keys + b * ok_b + h * ok_h, old_values + b * ov_b + h * ov_h
        total, mass, top = _span(
            total, mass, top, q, index, old_key, ok_n, old_value, ov_n, pads, valid_n, 0, whole,
            scaling, softcap, KEY_DIM, KEY_WIDE, VALUE_DIM, VALUE_WIDE, BLOCK, False, False, False, CAPPED,
        )  # fmt: skip
        total, mass, top = _span(
            total, mass, top, q, index, old_key, ok_n, old_value, ov_n, pads, valid_n, whole, count,
            scaling, softcap, KEY_DIM, KEY_WIDE, VALUE_DIM, VALUE_WIDE, BLOCK, True, False, False, CAPPED,
        )  # fmt: skip
    key, value = keys + b * k_b + h * k_h, values + b * v_b + h * v_h
    below = (begin // group + 1) // BLOCK * BLOCK  # blocks that every row sees whole
    total, mass, top = _span(
        total, mass, top, q, index, key, k_n, value, v_n, pads, valid_n, 0, below,
        scaling, softcap, KEY_DIM, KEY_WIDE, VALUE_DIM, VALUE_WIDE, BLOCK, False, False, PADDED, CAPPED,
    )  # fmt: skip
    end = tl.minimum((begin + ROWS - 1) // group + 1, m)
    total, mass, top = _span(
        total, mass, top, q, index, key, k_n, value, v_n, pads, valid_n, below, end,
        scaling, softcap, KEY_DIM, KEY_WIDE, VALUE_DIM, VALUE_WIDE, BLOCK, True, True, PADDED, CAPPED,
    )  # fmt: skip
    tl.store(lse + (head.to(tl.int64) * group + member) * m + index, (top + tl.log2(mass)) * _LN2, mask=real)
    lane = tl.arange(0, VALUE_WIDE)
    to = out + b * out_b + h * out_h + (member * out_g + index * out_m)[:, None] + lane[None, :]
    total = total / mass[:, None]
    tl.store(to, total.to(out.dtype.element_ty), mask=real[:, None] & (lane < VALUE_DIM)[None, :])
