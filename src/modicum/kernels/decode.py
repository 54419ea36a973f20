"""Decode attention in Triton: one new token per row against what each KV head holds, read exactly once.

Flash-Decoding (Dao, Haziza, Massa and Sizov 2023, pytorch.org/blog/flash-decoding): programs share a head's
slots, each leaves the attention over its share with its log-sum-exp, and a second launch joins them. Here a
program serves all query heads of a group at once, so that a slot is read once and not G times, and whatever
else wants the keys in the same step rides along: the logits, and the dots of a probe.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch
import triton  # type: ignore[import-untyped]  # triton ships no types
import triton.language as tl  # type: ignore[import-untyped]  # as above
from torch import Tensor

from modicum.errors import InputError
from modicum.kernels.decode_twin import Decoded, Table, Virtual
from modicum.kernels.sizes import pow2

# ruff: noqa: N803
# Compile-time constants are in capitals, as everywhere in Triton.
# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator"
# The bodies under @triton.jit are Triton's language: their arguments have no Python type.

__all__ = ["Config", "Decoded", "Table", "choose", "decode", "serves"]

_LOG2E = tl.constexpr(1.4426950408889634)
_LN2 = tl.constexpr(0.6931471805599453)
_INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)
_TINY = tl.constexpr(1e-30)
_FORMS = {"model": 0, "int8": 1, "fp8": 2}
_DTYPES = {torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}
_SCALE = 2  # bytes behind the codes of a slot: see `modicum.kv.codec`
_MOST_HEADS = 64  # of a group: more rows than that, and a probe's, would not stay in registers
_MOST_SPLITS = 64
_PER_PROCESSOR = 4  # programs, at least: two run together, and a second wave evens out uneven heads
_JOIN = 4096  # numbers that a program of the second launch holds in registers


@dataclass(frozen=True)
class Config:
    """Sizes for one shape of input; a benchmark may sweep them."""

    block: int
    """Slots that a program looks at together: a power of two, at least 16."""
    warps: int
    stages: int
    """Blocks in flight."""
    splits: int
    """Programs that share the slots of a head, at most."""


def serves(key_dim: int, value_dim: int, group: int, dtype: torch.dtype, form: str) -> str | None:
    """Why the kernel does not take such heads: query dtype, form of the slots. None if it does."""
    for dim in (key_dim, value_dim):
        if dim % 16 or not 16 <= dim <= 256:
            return f"a head size of {dim}, not a multiple of 16 up to 256"
    if not 1 <= group <= _MOST_HEADS:
        return f"{group} query heads per KV head, over {_MOST_HEADS}"
    if dtype not in _DTYPES:
        return f"{dtype}, neither fp16, bf16 nor fp32"
    if form not in _FORMS:
        return f"slots in {form}"
    return None


def choose(
    pairs: int, slots: int, key_dim: int, value_dim: int, rows: int, itemsize: int, device: torch.device
) -> Config:
    """The sizes for so many pairs of a row and a KV head, and so many rows in the tile of queries.

    Blocks of about 16 KB of keys, or as many as the registers hold; as many splits as fill the chip. From
    shapes alone, never from counts: a captured graph serves whatever is held.
    """
    wide = pow2(max(key_dim, value_dim))
    roomy, processors = _chip(device)
    # Tensor cores leave most registers free. Without them, and of slots of 8 bits, tiles lie in registers.
    block = {1: 4096, 2: 8192, 4: 2048}[itemsize] // wide
    block = min(128, max(16, min(block, pow2(slots))))
    warps = 8 if rows * wide >= 64 * 128 else 4
    # Slots of 8 bits are 2 bytes off wherever loads into shared memory could begin: nothing to pipeline.
    stages = 2 if itemsize == 1 or not roomy else 3
    splits = min(triton.cdiv(_PER_PROCESSOR * processors, pairs), triton.cdiv(slots, block), _MOST_SPLITS)
    return Config(block, warps, stages, max(1, splits))


@cache
def _chip(device: torch.device) -> tuple[bool, int]:
    """Whether it has the shared memory of a data centre's GPU, and its multiprocessors."""
    if device.type != "cuda":
        return True, 2  # the interpreter: a few programs, one after the other
    chip = torch.cuda.get_device_properties(device)
    room: int = chip.shared_memory_per_block_optin  # type: ignore[attr-defined]  # torch's stubs lack it
    return room > 160 * 1024, chip.multi_processor_count


def decode(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    count: Tensor | None,
    scaling: float,
    *,
    form: str = "model",
    softcap: float | None = None,
    probe: Tensor | None = None,
    logits: bool = False,
    row: str | None = None,
    virtual: Virtual | None = None,
    table: Table | None = None,
    config: Config | None = None,
) -> Decoded:
    """One query token per row against the first `count` slots of each KV head.

    query [B, H, G, Dk]; keys [B, H, S, Ck] and values [B, H, S, Cv] of any strides but the last, in the
    query's dtype or in the form of `Codec(form)`; count [B, H] int32, or None for all slots; probe [B, H, Dk]
    fp32, of which dots are wanted as well; logits, row ("mean" or "max"): whether these are wanted; virtual:
    one more slot, see `modicum.kv.compensation`; table: the heads lie in several banks, of which keys and
    values are the first. What lies past a count is not read. Two launches, shapes that depend on no count,
    and nothing waits for the device.

    Floor: with bytes_k = Dk·itemsize or Dk + 2, likewise bytes_v: B·H·count·(bytes_k + bytes_v) read, plus
    4·B·H·S·G written where logits or a row are wanted (the row reads them again and writes 4·B·H·S) and
    4·B·H·S with a probe; 2·B·H·G·count·(Dk + Dv) FLOPs, of which a tile of at least 16 rows makes 16/G
    times as many. At G = 4 in bf16 that is 16 FLOPs a byte where an H100 has hundreds: memory alone bounds
    it. In fp32, without tensor cores for exact products, it is arithmetic.

    Raises:
        InputError: see `serves`.
    """
    b, h, g, key_dim = query.shape
    coded = form != "model"
    value_dim = values.shape[-1] - (_SCALE if coded else 0)
    problem = serves(key_dim, value_dim, g, query.dtype, form)
    if problem is None and keys.dtype != (torch.uint8 if coded else query.dtype):
        problem = f"slots of {keys.dtype} for queries in {query.dtype}"
    if problem is not None:
        raise InputError(f"the decode kernel does not take {problem}: use decode_twin")
    if row not in (None, "mean", "max"):
        raise InputError(f"row is {row!r}: choose mean or max")
    device = query.device
    slots = keys.shape[2] if table is None else table.slots
    if table is not None and count is None:
        count = table.held
    exact = query.dtype == torch.float32
    half = query.dtype == torch.float16 or (coded and not exact)  # which holds every code, and bf16's digits
    parts = 0 if probe is None else 1 if exact else 3
    rows = max(16, pow2(g + parts))
    size = config or choose(b * h, slots, key_dim, value_dim, rows, keys.element_size(), device)
    share = triton.cdiv(triton.cdiv(slots, size.splits), size.block) * size.block or size.block
    splits = max(1, triton.cdiv(slots, share))
    query = query if query.stride(-1) == 1 else query.contiguous()
    if coded:
        # Two codes at a time, and the scale as a third kind of the same: rows begin at any even byte.
        keys, values = keys.view(torch.int16), values.view(torch.int16)

    def empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=device)

    partial, mass = empty(b * h, splits, g, value_dim), empty(2, b * h, splits, g)
    z = empty(b, h, g, slots) if logits or row is not None else None
    dots = None if probe is None else empty(b, h, slots)
    some = query  # stands for a tensor that is not read or written
    counts = some if count is None else count
    probe = some if probe is None else probe.contiguous()
    _attend[(b * h, splits)](
        *(query, *query.stride()[:3], keys, *keys.stride()[:3], values, *values.stride()[:3]),
        *((some, some) if table is None else (table.keys, table.values)),
        *(counts, *counts.stride()[:2], probe, partial, mass[0], mass[1]),
        *(some if z is None else z, some if dots is None else dots),
        *(h, slots, share, scaling, 1.0 if softcap is None else softcap),
        KEY_DIM=key_dim,
        VALUE_DIM=value_dim,
        KEY_WIDE=max(16, pow2(key_dim // 2 if coded else key_dim)),  # as a dot wants it
        VALUE_WIDE=max(16, pow2(value_dim // 2 if coded else value_dim)),
        GROUP=g,
        ROWS=rows,
        PARTS=parts,
        FORM=_FORMS[form],
        TYPE=tl.float16 if half else _DTYPES[query.dtype],
        SCALED=half and (coded or parts > 0),
        RAGGED=table is not None,
        ALIGNED=table is not None and table.aligned,
        COUNTED=count is not None,
        CAPPED=softcap is not None,
        LOGITS=z is not None,
        BLOCK=size.block,
        num_warps=size.warps,
        num_stages=size.stages,
    )
    out, lse = empty(b, h, g, value_dim, dtype=query.dtype), empty(b, h, g)
    joined = None if row is None else empty(b, h, slots)
    block = max(16, min(512, pow2(slots), _JOIN // pow2(g)))
    key, value, number = (some, some, some) if virtual is None else (x.contiguous() for x in virtual)
    _join[(b * h, g + (0 if joined is None else triton.cdiv(slots, block)))](
        *(partial, mass[0], mass[1], out, lse, some if z is None else z, some if joined is None else joined),
        *(query, *query.stride()[:3], key, value, number),
        *(h, slots, splits, scaling, 1.0 if softcap is None else softcap),
        KEY_DIM=key_dim,
        VALUE_DIM=value_dim,
        KEY_WIDE=pow2(key_dim),
        VALUE_WIDE=pow2(value_dim),
        GROUP=g,
        MEMBERS=pow2(g),
        SPLITS=pow2(splits),
        CAPPED=softcap is not None,
        VIRTUAL=virtual is not None,
        MAXIMUM=row == "max",
        CHUNK=max(1, min(pow2(splits), _JOIN // pow2(value_dim))),
        BLOCK=block,
        num_warps=4,
    )
    return Decoded(out, lse, z if logits else None, joined, dots)


@triton.jit
def _capped(z, softcap, CAPPED: tl.constexpr):
    if CAPPED:
        # tanh x = 1 - 2/(e^2x + 1), which neither overflows nor needs a device library
        z = softcap * (1.0 - 2.0 / (tl.exp2(z * (2.0 * _LOG2E / softcap)) + 1.0))
    return z


@triton.jit
def _dot(a, b):
    if _INTERPRETED:  # the interpreter would multiply the bits of bf16 as whole numbers
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, input_precision="ieee")


@triton.jit
def _queries(
    query, q_g, probe, column, KEY_DIM: tl.constexpr, GROUP: tl.constexpr, PARTS: tl.constexpr,
    ROWS: tl.constexpr,
):  # fmt: skip  # one argument a line would hide the rest
    """[ROWS, columns] fp32: the group's queries, then the probe once for each part that it is split into."""
    row = tl.arange(0, ROWS)[:, None]
    inside = (column < KEY_DIM)[None, :]
    x = tl.load(query + row * q_g + column[None, :], mask=(row < GROUP) & inside, other=0.0).to(tl.float32)
    if PARTS:
        extra = (row >= GROUP) & (row < GROUP + PARTS) & inside
        x += tl.load(probe + row * 0 + column[None, :], mask=extra, other=0.0).to(tl.float32)
    return x


@triton.jit
def _split(x, GROUP: tl.constexpr, PARTS: tl.constexpr, ROWS: tl.constexpr, TYPE: tl.constexpr):
    """Rows in the dtype of the dots. The probe's three are the parts of a sum that has its 24 bits."""
    first = x.to(TYPE)
    if PARTS > 1:
        rest = x - first.to(tl.float32)
        second = rest.to(TYPE)
        third = (rest - second.to(tl.float32)).to(TYPE)
        row = tl.arange(0, ROWS)[:, None]
        first = tl.where(row == GROUP + 1, second, tl.where(row == GROUP + 2, third, first))
    return first


@triton.jit
def _code(bits, FORM: tl.constexpr):
    """Low bytes of int32 -> their codes in fp16, exactly; those of fp8 come out as 1/256 of them."""
    if FORM == 1:
        # The low bits of 1024 + u in fp16 are u, here code + 128: so nothing is converted, which is slow.
        half = ((bits & 0xFF) ^ 0x6480).to(tl.int16).to(tl.float16, bitcast=True)
        return half - 1152.0
    # e4m3's bias is 7 and fp16's 15: the same bits stand for a number 2^8 times smaller.
    return (((bits & 0x80) << 8) | ((bits & 0x7F) << 7)).to(tl.int16).to(tl.float16, bitcast=True)


@triton.jit
def _scales(where, mask, FORM: tl.constexpr):
    """The bfloat16 scales of slots, in fp32: of codes as `_code` gives them."""
    bits = tl.load(where, mask=mask, other=0).to(tl.int32) << 16
    scale = bits.to(tl.float32, bitcast=True)
    return scale * 256.0 if FORM == 2 else scale


@triton.jit
def _attend(
    query, q_b: tl.int64, q_h: tl.int64, q_g,
    keys, k_b: tl.int64, k_h: tl.int64, k_n,
    values, v_b: tl.int64, v_h: tl.int64, v_n,
    key_offsets, value_offsets,
    counts, c_b: tl.int64, c_h: tl.int64, probe,
    partial, tops, masses, logits, dots,
    heads, slots, share, scaling, softcap,
    KEY_DIM: tl.constexpr, VALUE_DIM: tl.constexpr, KEY_WIDE: tl.constexpr, VALUE_WIDE: tl.constexpr,
    GROUP: tl.constexpr, ROWS: tl.constexpr, PARTS: tl.constexpr, FORM: tl.constexpr, TYPE: tl.constexpr,
    SCALED: tl.constexpr, RAGGED: tl.constexpr, ALIGNED: tl.constexpr, COUNTED: tl.constexpr,
    CAPPED: tl.constexpr, LOGITS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip  # a tensor and its strides on one line
    """One head's group over one share of its slots.

    partial [B·H, splits, G, Dv], not divided by masses [B·H, splits, G]: Σ exp2(z - tops), z in base 2. An
    empty share leaves -inf in tops, which says that the rest of it means nothing.
    """
    # All heads' first shares come first: those that are empty come last, when they keep nobody waiting.
    head, split = tl.program_id(0), tl.program_id(1)
    b, h, pair = (head // heads).to(tl.int64), (head % heads).to(tl.int64), head.to(tl.int64)
    lane, row = tl.arange(0, BLOCK), tl.arange(0, ROWS)
    own = row < GROUP
    first = split * share
    last = tl.minimum(first + share, slots)
    end = last
    if COUNTED:
        end = tl.minimum(end, tl.load(counts + b * c_b + h * c_h).to(tl.int32))
    place = (pair * tl.num_programs(1) + split) * GROUP + row
    to_logits = logits + (pair * GROUP + row[:, None]) * slots
    to_dots = dots + pair * slots
    if LOGITS or PARTS > 0:  # what lies past the blocks that are looked at
        for start in range(first + tl.cdiv(tl.maximum(end - first, 0), BLOCK) * BLOCK, last, BLOCK):
            slot = start + lane
            if LOGITS:
                empty = tl.full((ROWS, BLOCK), float("-inf"), tl.float32)
                tl.store(to_logits + slot[None, :], empty, mask=own[:, None] & (slot < last)[None, :])
            if PARTS > 0:
                tl.store(to_dots + slot, tl.zeros((BLOCK,), tl.float32), mask=slot < last)
    if end <= first:
        tl.store(tops + place, tl.full((ROWS,), float("-inf"), tl.float32), mask=own)
        tl.store(masses + place, tl.zeros((ROWS,), tl.float32), mask=own)
        return

    # Of coded slots a column is a word of two codes: even ones in the low byte, odd ones in the high.
    pack: tl.constexpr = 1 if FORM == 0 else 2
    key_words: tl.constexpr = KEY_DIM // pack
    value_words: tl.constexpr = VALUE_DIM // pack
    key_word = tl.arange(0, KEY_WIDE)
    value_word = tl.arange(0, VALUE_WIDE)
    if RAGGED:
        key_at, value_at = tl.load(key_offsets + pair), tl.load(value_offsets + pair)
        if ALIGNED:
            key_at, value_at = tl.multiple_of(key_at, 16), tl.multiple_of(value_at, 16)
        key_at, value_at = key_at // pack, value_at // pack
    else:
        key_at, value_at = b * k_b + h * k_h, b * v_b + h * v_h
    key_block, value_block = keys + key_at, values + value_at
    key_block += first.to(tl.int64) * k_n
    value_block += first.to(tl.int64) * v_n
    query += b * q_b + h * q_h
    probe += pair * KEY_DIM

    x = _queries(query, q_g, probe, key_word * pack, KEY_DIM, GROUP, PARTS, ROWS)
    odd = x
    if FORM != 0:
        odd = _queries(query, q_g, probe, key_word * pack + 1, KEY_DIM, GROUP, PARTS, ROWS)
    unit = tl.full((ROWS,), 1.0, tl.float32)
    if SCALED:
        # A bf16 query's or a probe's range is not fp16's: every row's largest goes between 2^12 and 2^13.
        most = tl.maximum(tl.max(tl.abs(x), 1), tl.max(tl.abs(odd), 1))
        power = tl.maximum(most, _TINY).to(tl.int32, bitcast=True) & 0x7F800000
        unit = power.to(tl.float32, bitcast=True) * (1.0 / 4096.0)
        # 1/2^e from its bits: the chip's quick division need not be exact.
        inverse = (0x7F000000 - power).to(tl.float32, bitcast=True) * 4096.0
        x, odd = x * inverse[:, None], odd * inverse[:, None]
    q = _split(x, GROUP, PARTS, ROWS, TYPE)
    if FORM != 0:
        q_odd = _split(odd, GROUP, PARTS, ROWS, TYPE)
        acc_odd = tl.zeros((ROWS, VALUE_WIDE), tl.float32)
        coarse = tl.full((), _TINY, tl.float32)  # the largest scale of a value so far
    top = tl.full((ROWS,), float("-inf"), tl.float32)
    mass = tl.zeros((ROWS,), tl.float32)
    acc = tl.zeros((ROWS, VALUE_WIDE), tl.float32)

    for start in range(first, end, BLOCK):
        slot = start + lane
        there = slot < end
        k = tl.load(
            key_block + (lane * k_n)[None, :] + key_word[:, None],
            mask=there[None, :] & (key_word < key_words)[:, None],
            other=0,
        )  # [Dk, N]: turned as it is read
        v = tl.load(
            value_block + (lane * v_n)[:, None] + value_word[None, :],
            mask=there[:, None] & (value_word < value_words)[None, :],
            other=0,
        )  # [N, Dv]
        if FORM == 0:
            s = _dot(q, k)
        else:
            bits = k.to(tl.int32)
            s = _dot(q, _code(bits, FORM).to(TYPE)) + _dot(q_odd, _code(bits >> 8, FORM).to(TYPE))
            # A slot's scale is a factor of its logits: one product, not one for each code.
            s *= _scales(key_block + lane * k_n + key_words, there, FORM)[None, :]
        if SCALED:
            s *= unit[:, None]
        if PARTS > 0:
            extra = (row >= GROUP) & (row < GROUP + PARTS)
            tl.store(to_dots + slot, tl.sum(tl.where(extra[:, None], s, 0.0), 0), mask=slot < last)
        z = _capped(s * scaling, softcap, CAPPED)
        z = tl.where(there[None, :], z, float("-inf"))
        if LOGITS:
            tl.store(to_logits + slot[None, :], z, mask=own[:, None] & (slot < last)[None, :])
        z *= _LOG2E
        higher = tl.maximum(top, tl.max(z, 1))
        weight = tl.exp2(z - higher[:, None])
        fade = tl.exp2(top - higher)
        mass = mass * fade + tl.sum(weight, 1)
        top = higher
        if FORM == 0:
            acc = acc * fade[:, None] + _dot(weight.to(TYPE), v)
        else:
            scale = _scales(value_block + lane * v_n + value_words, there, FORM)
            # Weights times scales, over the largest scale: at most 1, which fp16 holds well.
            coarser = tl.maximum(coarse, tl.max(scale, 0))
            fade *= coarse / coarser
            coarse = coarser
            weight = (weight * (scale / coarser)[None, :]).to(TYPE)
            bits = v.to(tl.int32)
            acc = acc * fade[:, None] + _dot(weight, _code(bits, FORM).to(TYPE))
            acc_odd = acc_odd * fade[:, None] + _dot(weight, _code(bits >> 8, FORM).to(TYPE))
        key_block += BLOCK * k_n
        value_block += BLOCK * v_n

    tl.store(tops + place, top, mask=own)
    tl.store(masses + place, mass, mask=own)
    to = partial + place[:, None] * VALUE_DIM + (value_word * pack)[None, :]
    real = own[:, None] & (value_word < value_words)[None, :]
    if FORM == 0:
        tl.store(to, acc, mask=real)
    else:
        tl.store(to, acc * coarse, mask=real)
        tl.store(to + 1, acc_odd * coarse, mask=real)


@triton.jit
def _join(
    partial, tops, masses, out, lses, logits, rows,
    query, q_b: tl.int64, q_h: tl.int64, q_g, virtual_key, virtual_value, virtual_number,
    heads, slots, splits, scaling, softcap,
    KEY_DIM: tl.constexpr, VALUE_DIM: tl.constexpr, KEY_WIDE: tl.constexpr, VALUE_WIDE: tl.constexpr,
    GROUP: tl.constexpr, MEMBERS: tl.constexpr, SPLITS: tl.constexpr, CAPPED: tl.constexpr,
    VIRTUAL: tl.constexpr, MAXIMUM: tl.constexpr, CHUNK: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip  # a tensor and its strides on one line
    """The first GROUP programs of a pair join the shares of one query head each; the others make its row."""
    head, job = tl.program_id(0), tl.program_id(1)
    b, h, pair = (head // heads).to(tl.int64), (head % heads).to(tl.int64), head.to(tl.int64)
    member = tl.arange(0, MEMBERS)
    share = tl.arange(0, SPLITS)
    own = member < GROUP
    where = (pair * splits + share[:, None]) * GROUP + member[None, :]
    there = (share < splits)[:, None] & own[None, :]
    top = tl.load(tops + where, mask=there, other=float("-inf"))
    mass = tl.load(masses + where, mask=there, other=0.0)
    origin = tl.max(top, 0)  # [G]
    if VIRTUAL:
        lane = tl.arange(0, KEY_WIDE)
        q = tl.load(
            query + b * q_b + h * q_h + member[:, None] * q_g + lane[None, :],
            mask=own[:, None] & (lane < KEY_DIM)[None, :],
            other=0.0,
        ).to(tl.float32)
        key = tl.load(virtual_key + pair * KEY_DIM + lane, mask=lane < KEY_DIM, other=0.0)
        number = tl.load(virtual_number + pair)
        more = _capped(tl.sum(q * key[None, :], 1) * scaling, softcap, CAPPED) * _LOG2E
        more += tl.log2(tl.maximum(number, 1.0))
        more = tl.where(number == 0, float("-inf"), more)
        origin = tl.maximum(origin, more)
    origin = tl.where(origin == float("-inf"), 0.0, origin)  # where nothing is held: exp2(-inf - 0) is 0
    total = tl.sum(mass * tl.exp2(top - origin[None, :]), 0)
    if VIRTUAL:
        total += tl.exp2(more - origin)
    nothing = total == 0
    lse = (origin + tl.log2(tl.where(nothing, 1.0, total))) * _LN2

    if job < GROUP:
        this = member == job
        base = tl.sum(tl.where(this, origin, 0.0), 0)
        column = tl.arange(0, VALUE_WIDE)
        inside = column < VALUE_DIM
        acc = tl.zeros((VALUE_WIDE,), tl.float32)
        for start in range(0, splits, CHUNK):
            some = start + tl.arange(0, CHUNK)
            at = (pair * splits + some) * GROUP + job
            peak = tl.load(tops + at, mask=some < splits, other=float("-inf"))
            part = tl.load(
                partial + at[:, None] * VALUE_DIM + column[None, :],
                mask=(peak > float("-inf"))[:, None] & inside[None, :],
                other=0.0,
            )
            acc += tl.sum(part * tl.exp2(peak - base)[:, None], 0)
        if VIRTUAL:
            value = tl.load(virtual_value + pair * VALUE_DIM + column, mask=inside, other=0.0)
            acc += tl.sum(tl.where(this, tl.exp2(more - origin), 0.0), 0) * value
        norm = tl.sum(tl.where(this & ~nothing, total, 0.0), 0)
        acc = acc / tl.where(norm == 0, 1.0, norm)
        to = out + (pair * GROUP + job) * VALUE_DIM + column
        tl.store(to, acc.to(out.dtype.element_ty), mask=inside)
        tl.store(lses + pair * GROUP + member, tl.where(nothing, float("-inf"), lse), mask=this)
    else:
        slot = (job - GROUP) * BLOCK + tl.arange(0, BLOCK)
        z = tl.load(
            logits + (pair * GROUP + member[:, None]) * slots + slot[None, :],
            mask=own[:, None] & (slot < slots)[None, :],
            other=float("-inf"),
        )
        weight = tl.exp2((z - lse[:, None]) * _LOG2E)
        joined = tl.max(weight, 0) if MAXIMUM else tl.sum(weight, 0) * (1.0 / GROUP)
        tl.store(rows + pair * slots + slot, joined, mask=slot < slots)
