"""Slots in 8 and 4 bits: codes and scales by their definition, bytes, and how far they are from what came."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

from modicum import BudgetCache, generate
from modicum.compat import cache_kwargs
from modicum.errors import InputError, ModelError
from modicum.kv.codec import Codec
from modicum.kv.hadamard import block_size
from modicum.kv.store import STORES
from tests import zoo
from tests.bounds import (
    LAMBDA,
    assert_same_logits,
    assert_within,
    gamma,
    network_error,
    underflow,
    unit_roundoff,
)
from tests.driver import all_kept, check_limits, feed, full_cache, pad_left
from tests.generation.test_models import Letters
from tests.kv.coded_cache import CodedCache
from tests.kv.reference_methods import bfloat16, hadamard, in_4_bits, in_8_bits

CODED = ("int8", "fp8")
PACKED = ("k8v4", "int4")
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def vectors(dtype: torch.dtype, seed: int = 0) -> Tensor:
    """Of many sizes, one of zeros, one whose numbers are all alike, one with a single large number."""
    rng = torch.Generator().manual_seed(seed)
    x = torch.randn(6, 5, 16, generator=rng) * 10 ** torch.linspace(-3, 3, 6)[:, None, None]
    x[0, 0], x[1, 0] = 0, 2.5
    x[2, 0], x[2, 0, 7] = 1e-3, 100
    return x.to(dtype)


E4M3 = sorted(
    {0.0}
    | {(m / 8) * 2.0**-6 for m in range(1, 8)}
    | {(1 + m / 8) * 2.0**e for e in range(-6, 9) for m in range(8) if (e, m) != (8, 7)}
)
"""Every positive number of three mantissa bits and exponents from -6 to 8, of which the last is no number."""


def in_fp8(x: np.ndarray) -> np.ndarray:
    scale = bfloat16(max(abs(float(a)) for a in x) * (1 + 2**-8) / 448)
    if scale == 0:
        return 0 * x
    out = []
    for a in x:
        near = sorted(E4M3, key=lambda e, a=a: abs(abs(float(a)) / scale - e))[:2]
        # Of two as near, the one whose last bit is 0: every second of the table.
        tie = math.isclose(*(abs(abs(float(a)) / scale - e) for e in near), rel_tol=1e-12)
        best = next(e for e in near if E4M3.index(e) % 2 == 0) if tie else near[0]
        out.append(math.copysign(best * scale, float(a)))
    return np.array(out)


@pytest.mark.parametrize(("name", "plainly"), [("int8", in_8_bits), ("fp8", in_fp8)])
def test_what_is_left_is_the_definitions(name: str, plainly: Any) -> None:
    codec, x = Codec(name), vectors(torch.float64)
    got = codec.decode(codec.encode(x), torch.float64)
    for i in range(6):
        for j in range(5):
            assert np.array_equal(got[i, j].numpy(), plainly(x[i, j].numpy()))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", CODED)
def test_errors_are_those_of_eight_bits(name: str, dtype: torch.dtype) -> None:
    codec, x = Codec(name), vectors(dtype, 1)
    stored = codec.encode(x)
    assert stored.dtype == codec.dtype(dtype) == torch.uint8
    assert stored.shape == (6, 5, codec.columns(16))
    assert stored[0, 0].element_size() * stored.shape[-1] == codec.nbytes(16, dtype.itemsize) == 18
    error = (codec.decode(stored, dtype).double() - x.double()).abs()
    largest = x.double().abs().amax(-1, keepdim=True)
    if name == "int8":  # half a step, and the rounding up of the scale
        bound = largest / 127 * (0.5 + 0.01)
    else:  # half of the last of three bits; below the least exponent half a step of 2^-9
        bound = torch.maximum(x.double().abs() / 16, largest / 448 * 2.0**-10) * 1.02
    bound = bound + x.double().abs() * torch.finfo(dtype).eps
    assert bool((error <= bound).all())
    assert not error[0, 0].any()


# -- 4 bits ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dim", [2, 6, 16, 24, 64])
def test_what_is_left_of_4_bits_is_the_definitions(dim: int) -> None:
    """Against plain loops: rotated, rounded, rotated back. float64 keeps codes from the halves between."""
    rng = torch.Generator().manual_seed(dim)
    x = torch.randn(12, dim, generator=rng, dtype=torch.float64) * 10 ** torch.linspace(-3, 3, 12)[:, None]
    x[0], x[1] = 0, 2.5
    turned, back = Codec("int4"), Codec("int4", rotates_back=True)
    stored = turned.encode(x)
    assert torch.equal(back.encode(x), stored)
    rotated, found = turned.decode(stored, torch.float64), back.decode(stored, torch.float64)
    for i in range(len(x)):
        plain = torch.from_numpy(in_4_bits(x[i].numpy()))
        share = gamma(4 * dim, torch.float64) * float(x[i].norm())
        assert_within(found[i], plain, share)
        assert_within(rotated[i], torch.from_numpy(hadamard(plain.numpy())), share)


def test_two_codes_lie_in_a_byte_and_the_scale_behind_them() -> None:
    """x is chosen such that x H is 7, -7, 3, -1 times a scale of 1, which the rounding up makes 1 + 2^-7."""
    codes = torch.tensor([7.0, -7.0, 3.0, -1.0])
    stored = Codec("int4").encode(torch.from_numpy(hadamard(codes.numpy())).float())
    scale = torch.tensor([bfloat16(1 + 2**-8)], dtype=torch.bfloat16).view(torch.uint8)
    # Lower halves: the first two, 7 and -7 = 9 of 16; upper halves: 3, and -1 = 15 of 16.
    assert stored.tolist() == [7 | 3 << 4, 9 | 15 << 4, *scale.tolist()]


@pytest.mark.parametrize(("dim", "size"), [(2, 2), (6, 2), (24, 8), (64, 64), (80, 16), (96, 32), (128, 128)])
def test_bytes_of_4_bits(dim: int, size: int) -> None:
    codec = Codec("int4")
    assert block_size(dim) == size
    assert codec.nbytes(dim, 2) == codec.columns(dim) == codec.encode(torch.ones(dim)).nbytes == dim // 2 + 2
    assert codec.columns(0) == 0
    both = Codec("int4", split=dim)  # a latent and its rotary part, each with its scale
    assert both.columns(dim + 6) == both.encode(torch.ones(dim + 6)).nbytes == dim // 2 + 2 + 3 + 2


@pytest.mark.parametrize("dtype", DTYPES)
@given(
    dim=st.sampled_from([2, 6, 16, 48, 64, 128]),
    size=st.floats(-3, 3),
    peak=st.floats(0, 4),
    seed=st.integers(0, 99),
)
def test_errors_are_those_of_four_bits(
    dtype: torch.dtype, dim: int, size: float, peak: float, seed: int
) -> None:
    """Half a step for each code in the rotated space, so √D times that for the vector, rotated back."""
    rng = torch.Generator().manual_seed(seed)
    x = torch.randn(3, dim, generator=rng)
    x[:, 0] *= 10**peak
    x = (x / x.norm(dim=-1, keepdim=True) * 10**size).to(dtype)
    codec = Codec("int4", rotates_back=True)
    left = codec.decode(codec.encode(x), dtype).double()
    for row, found in zip(x.double(), left, strict=True):
        length = float(row.norm())
        # The scale is rounded up by 2^-8 and then to bfloat16, whose roundoff is 2^-9.
        step = max(map(abs, hadamard(row.numpy()))) / 7 * (1 + 2**-8) * (1 + 2**-9)
        wide = torch.promote_types(dtype, torch.float32)
        # Two rotations in the wide dtype, and two roundings to the stored one; √D of each at most.
        rounding = 2 * math.sqrt(dim) * gamma(dim + 4, wide) + 3 * unit_roundoff(dtype)
        bound = math.sqrt(dim) * (step / 2 + 2 * underflow(dtype)) + rounding * (
            length + math.sqrt(dim) * step
        )
        assert float((found - row).norm()) <= bound


@pytest.mark.parametrize("store", PACKED)
def test_odd_heads_are_refused_by_name(store: str) -> None:
    config = GPTNeoXConfig(hidden_size=60, num_attention_heads=4, num_hidden_layers=1, vocab_size=20)
    model = GPTNeoXForCausalLM(config).eval()
    with pytest.raises(
        ModelError, match=f"'{store}'.* heads of 15 numbers.*must be even. Choose store='int8'"
    ):
        BudgetCache(model, budget=48, store=store)
    BudgetCache(model, budget=48, store="int8")


def test_the_models_own_form_is_left_alone() -> None:
    codec, x = Codec(), vectors(torch.bfloat16)
    assert codec.encode(x) is x
    assert codec.decode(x, torch.bfloat16) is x
    assert (codec.columns(16), codec.nbytes(16, 2), codec.dtype(torch.bfloat16)) == (16, 32, torch.bfloat16)


@pytest.mark.parametrize("name", ["int3", "", ["int8"]])
def test_other_names_are_refused(name: Any) -> None:
    with pytest.raises(InputError, match="choose one of model, int8, fp8, k8v4, int4"):
        BudgetCache(zoo.shared("llama"), budget=48, store=name)


def test_a_device_that_lacks_eight_bits_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def lacking(self: Codec, x: Tensor) -> Tensor:
        raise TypeError("no such dtype here")

    monkeypatch.setattr(Codec, "encode", lacking)
    with pytest.raises(
        ModelError, match=r"cpu cannot hold slots in fp8 \(no such dtype here\): choose another"
    ):
        BudgetCache(zoo.shared("llama"), budget=48, store="fp8")
    BudgetCache(zoo.shared("llama"), budget=48)


@pytest.mark.parametrize(("store", "nbytes"), [("int8", 36), ("fp8", 36), ("k8v4", 28), ("int4", 20)])
def test_as_many_bytes_hold_more_tokens(store: str, nbytes: int) -> None:
    """Heads of 16 numbers in 16 bits: 18 or 10 bytes for a key, as for a value, instead of 32."""
    model, ids = zoo.shared("llama", torch.bfloat16), zoo.tokens(1, 400)
    caches = {}
    for name in ("model", store):
        cache = BudgetCache(model, "streamingllm", "32KiB", chunk=32, n_sink=2, recent=4, store=name)
        feed(model, cache, ids, after=lambda cache=cache: check_limits(cache))
        assert cache.nbytes <= 32 * 2**10
        caches[name] = int(cache.held[0].max())
        assert (f"store={name}" in repr(cache)) == (name != "model")
    assert caches[store] / caches["model"] == pytest.approx((64 + 4) / (nbytes + 4), rel=0.03)


@pytest.mark.parametrize("store", CODED)
@pytest.mark.parametrize("name", zoo.ALL)
def test_every_family_is_near_its_full_cache(name: str, store: str) -> None:
    model, ids = zoo.shared(name), zoo.tokens(2, 60)
    expected = feed(model, full_cache(model), ids)
    cache = BudgetCache(model, "keydiff", 64, chunk=16, n_sink=2, recent=4, store=store)
    logits = feed(model, cache, ids, cuts=range(50, 60), after=lambda: check_limits(cache))
    apart = float((logits - expected).square().mean().sqrt() / expected.std())
    assert apart < (0.05 if store == "int8" else 0.25)
    if cache.shape.full:
        assert apart > 0


@pytest.mark.parametrize("store", PACKED)
@pytest.mark.parametrize("name", zoo.ALL)
def test_every_family_is_its_full_cache_of_the_same_codes(name: str, store: str) -> None:
    """transformers' attention over keys and values rotated back, in float64: no code is a near thing."""
    model, ids = zoo.shared(name, torch.float64), zoo.tokens(2, 60)
    expected = feed(model, CodedCache(model, store), ids)
    cache = BudgetCache(model, "keydiff", 64, chunk=16, n_sink=2, recent=4, store=store)
    logits = feed(model, cache, ids, cuts=range(50, 60), after=lambda: check_limits(cache))
    # transformers' eager attention has its softmax in float32 in every dtype.
    dtype = torch.float32 if zoo.attentions(name) == ("eager",) else torch.float64
    size = float(expected.square().mean().sqrt())
    assert_within(logits, expected, 2 * LAMBDA * network_error(model, 60, dtype=dtype) * size)


@pytest.mark.parametrize("store", [*CODED, *PACKED])
def test_logits_do_not_hang_on_the_chunks(store: str) -> None:
    """What a piece attends to while in hand is what is stored, so prompts are read alike in any pieces."""
    model, ids = zoo.shared("llama", torch.float64), zoo.tokens(1, 60)
    runs = []
    for chunk in (60, 16, 7, 1):
        cache = BudgetCache(model, "keydiff", 64, chunk=chunk, n_sink=2, recent=4, store=store)
        runs.append(feed(model, cache, ids))
    for run in runs[1:]:
        assert_same_logits(model, run, runs[0])


@pytest.mark.parametrize("store", STORES)
@pytest.mark.parametrize("positions", ["original", "renumbered"])
def test_generated_saved_and_gone_on_with(store: str, positions: str, tmp_path: Path) -> None:
    model, letters = zoo.shared("qwen3"), Letters()
    settings: dict[str, Any] = {"budget": 24, "chunk": 8, "n_sink": 2, "recent": 4, "max_new_tokens": 12}
    how = {"store": store, "positions": positions}
    first = generate(model, letters, "a prompt that is longer than its budget", **how, **settings)
    first.cache.save(tmp_path / "cache")
    twin = BudgetCache.load(tmp_path / "cache", model)
    assert (twin.store.name, twin.numbering) == (store, positions)
    more = [
        generate(model, letters, question=" and on", cache=cache, max_new_tokens=12)
        for cache in (first.cache, twin)
    ]
    assert more[0].tokens == more[1].tokens
    assert all_kept(first.cache) == all_kept(twin)


@pytest.mark.parametrize("store", PACKED)
def test_beams_and_padded_rows_are_those_of_the_same_codes(store: str) -> None:
    """transformers' own cache reorders and masks coded vectors in the model's own space. In float64."""
    model, ids = zoo.shared("llama", torch.float64), zoo.tokens(2, 30)
    small: dict[str, Any] = {"budget": 48, "chunk": 8, "n_sink": 2, "recent": 4, "store": store}
    settings: dict[str, Any] = {"max_new_tokens": 8, "num_beams": 3, "do_sample": False}
    cache = BudgetCache(model, "keydiff", **small)
    want = model.generate(ids, **cache_kwargs(model, CodedCache(model, store)), **settings)
    assert torch.equal(model.generate(ids, **cache_kwargs(model, cache), **settings), want)
    check_limits(cache)

    ids, mask = pad_left([zoo.tokens(1, 30)[0], zoo.tokens(1, 30, seed=1)[0][:19]])
    cuts, there = (20, 28, 29), mask.bool()
    cache = BudgetCache(model, "keydiff", **small)
    got = feed(model, cache, ids, mask, cuts, after=lambda: check_limits(cache))
    assert_same_logits(model, got[there], feed(model, CodedCache(model, store), ids, mask, cuts)[there])
