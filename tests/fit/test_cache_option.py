"""What caches take, and their errors between the sizes that were measured."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from modicum.fit.cache_option import CacheErrors, CacheOption, CacheSizes
from modicum.fit.probe import Errors
from modicum.kv.budget import Budget
from modicum.kv.cache import BudgetCache
from tests.fit.fitting import tiny


@pytest.mark.parametrize("store", ["model", "int8", "k8v4", "int4"])
@pytest.mark.parametrize("policy", ["keydiff", "snapkv(window=8)"])
def test_bytes_are_those_that_a_cache_is_planned_for(store: str, policy: str) -> None:
    model, _ = tiny()
    sizes = CacheSizes(model, policy, 256, 256)
    for tokens in (sizes.least, 100):
        cache = BudgetCache(model, policy, Budget(tokens=tokens), store=store, length=256)
        assert sizes.nbytes(CacheOption(store, tokens, 256)) == cache.plan.nbytes


def test_a_full_cache_is_that_of_transformers() -> None:
    model, _ = tiny()
    assert CacheSizes(model, "keydiff", 64, 64).full_nbytes(10) == 10 * 5 * 4 * (8 + 8) * 4


def test_the_grid_runs_from_all_tokens_to_the_least() -> None:
    model, _ = tiny()
    sizes = CacheSizes(model, "keydiff", 4096, 4096)
    grid = sizes.grid(["int8"], 4096)
    tokens = [option.tokens for option in grid]
    assert tokens[0] == 4096
    assert tokens[-1] == sizes.least
    assert tokens == sorted(set(tokens), reverse=True)


@pytest.mark.parametrize(("length", "read"), [(2048, 2048), (2048, 1790), (96, 47), (64, 20)])
@pytest.mark.parametrize("context", [64, 96, 2048, 8192, 100_003])
def test_every_size_that_is_offered_is_measured_at_its_own_share(
    length: int, read: int, context: int
) -> None:
    model, _ = tiny()
    sizes = CacheSizes(model, "keydiff", length, read)
    measured = sizes.measured(["int8"])
    shares = [option.share for option in measured]
    assert shares == sorted(set(shares), reverse=True)
    assert shares[0] == 1
    for option in sizes.grid(["int8"], context):
        assert option.share >= shares[-1] or option.tokens == context
        # A probe's cache of that share, to within its rounding to slots, is one that a cache can be.
        for tokens in (read, length):
            on_probe = option.at(tokens)
            assert abs(on_probe.tokens - option.share * tokens) <= 0.5
            assert on_probe.tokens >= min(sizes.least, tokens)


def test_a_longer_probe_offers_smaller_caches() -> None:
    model, _ = tiny()
    least = CacheSizes(model, "keydiff", 1024, 1024).least
    assert CacheSizes(model, "keydiff", 1024, 1024).smallest(8192) == 8 * least
    assert CacheSizes(model, "keydiff", 8192, 8192).smallest(8192) == least


MEASURED = {
    CacheOption("int8", tokens, 1024): Errors(error, 2 * error, 0.5)
    for tokens, error in ((1024, 1e-3), (512, 4e-3), (256, 2e-3), (128, 0.5))
}


def test_measured_sizes_have_their_errors_and_more_slots_never_a_larger_one() -> None:
    errors = CacheErrors(MEASURED)
    assert errors.of(CacheOption("int8", 1024, 1024)).text == pytest.approx(1e-3)
    assert errors.of(CacheOption("int8", 512, 1024)).text == pytest.approx(4e-3)
    # 256 slots were measured better than 512, which is noise: an error never falls as slots go.
    assert errors.of(CacheOption("int8", 256, 1024)).text == pytest.approx(4e-3)
    assert errors.of(CacheOption("int8", 8, 1024)).text == pytest.approx(0.5)


@given(st.floats(0.05, 1.0), st.floats(0.05, 1.0))
def test_errors_fall_as_slots_grow(first: float, second: float) -> None:
    errors = CacheErrors(MEASURED)
    few, many = sorted((first, second))
    of = [errors.of(CacheOption("int8", round(share * 10**6), 10**6)) for share in (few, many)]
    assert of[0].text >= of[1].text * (1 - 1e-9)
    assert of[0].answers >= of[1].answers * (1 - 1e-9)


def test_halfway_in_the_logarithm_is_the_geometric_mean() -> None:
    errors = CacheErrors(MEASURED)
    middle = errors.of(CacheOption("int8", round(1e9 / math.sqrt(32)), 10**9))  # between 1/8 and 1/4
    assert middle.text == pytest.approx(math.sqrt(0.5 * 4e-3), rel=1e-6)
