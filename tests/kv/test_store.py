"""Slots in 8 bits: codes and scales by their definition, bytes, and how far they are from what came."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from modicum import BudgetCache, generate
from modicum.errors import InputError, ModelError
from modicum.kv.store import STORES, Store
from tests import zoo
from tests.bounds import assert_same_logits
from tests.driver import all_kept, check_limits, feed, full_cache
from tests.generation.test_models import Letters
from tests.kv.reference_methods import bfloat16, in_8_bits

CODED = ("int8", "fp8")
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
    store, x = Store(name), vectors(torch.float64)
    got = store.decode(store.encode(x), torch.float64)
    for i in range(6):
        for j in range(5):
            assert np.array_equal(got[i, j].numpy(), plainly(x[i, j].numpy()))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", CODED)
def test_errors_are_those_of_eight_bits(name: str, dtype: torch.dtype) -> None:
    store, x = Store(name), vectors(dtype, 1)
    stored = store.encode(x)
    assert stored.dtype == store.dtype(dtype) == torch.uint8
    assert stored.shape == (6, 5, store.columns(16))
    assert stored[0, 0].element_size() * stored.shape[-1] == store.nbytes(16, dtype.itemsize) == 18
    error = (store.decode(stored, dtype).double() - x.double()).abs()
    largest = x.double().abs().amax(-1, keepdim=True)
    if name == "int8":  # half a step, and the rounding up of the scale
        bound = largest / 127 * (0.5 + 0.01)
    else:  # half of the last of three bits; below the least exponent half a step of 2^-9
        bound = torch.maximum(x.double().abs() / 16, largest / 448 * 2.0**-10) * 1.02
    bound = bound + x.double().abs() * torch.finfo(dtype).eps
    assert bool((error <= bound).all())
    assert not error[0, 0].any()


def test_the_models_own_form_is_left_alone() -> None:
    store, x = Store(), vectors(torch.bfloat16)
    assert store.encode(x) is x
    assert store.decode(x, torch.bfloat16) is x
    assert (store.columns(16), store.nbytes(16, 2), store.dtype(torch.bfloat16)) == (16, 32, torch.bfloat16)


@pytest.mark.parametrize("name", ["int4", "", None, ["int8"]])
def test_other_names_are_refused(name: Any) -> None:
    with pytest.raises(InputError, match="choose one of model, int8, fp8"):
        BudgetCache(zoo.shared("llama"), budget=48, store=name)


def test_a_device_that_lacks_eight_bits_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def lacking(self: Store, x: Tensor) -> Tensor:
        raise TypeError("no such dtype here")

    monkeypatch.setattr(Store, "encode", lacking)
    with pytest.raises(
        ModelError, match=r"cpu cannot hold slots in fp8 \(no such dtype here\): choose another"
    ):
        BudgetCache(zoo.shared("llama"), budget=48, store="fp8")
    BudgetCache(zoo.shared("llama"), budget=48)


@pytest.mark.parametrize("store", CODED)
def test_as_many_bytes_hold_about_twice_the_tokens(store: str) -> None:
    """Heads of 16 numbers in 16 bits: 18 + 18 bytes and a position, instead of 32 + 32."""
    model, ids = zoo.shared("llama", torch.bfloat16), zoo.tokens(1, 300)
    caches = {}
    for name in ("model", store):
        cache = BudgetCache(model, "streamingllm", "32KiB", chunk=32, n_sink=2, recent=4, store=name)
        feed(model, cache, ids, after=lambda cache=cache: check_limits(cache))
        assert cache.nbytes <= 32 * 2**10
        caches[name] = int(cache.held[0].max())
        assert (f"store={name}" in repr(cache)) == (name != "model")
    assert caches[store] / caches["model"] == pytest.approx((64 + 4) / (36 + 4), rel=0.02)


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


@pytest.mark.parametrize("store", CODED)
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
