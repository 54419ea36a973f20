"""What modicum relies on in transformers and promises to its users, on every supported version."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch
import transformers
from torch import Tensor
from transformers import AttentionInterface, GenerationConfig, PreTrainedModel
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicLayer
from transformers.masking_utils import AttentionMaskInterface

import modicum
from modicum import BudgetCache, CacheError, InputError
from modicum.compat import cache_argument, cache_kwargs
from modicum.kv.layer import BudgetLayer
from modicum.kv.window import WindowLayer
from tests import zoo
from tests.bounds import assert_same_logits, assert_same_tokens, network_error
from tests.driver import all_kept, check_limits, every, feed, full_cache, kept, pad_left

VERSION = tuple(int(part) for part in transformers.__version__.split(".")[:2])
SMALL = {"n_sink": 2, "recent": 4}

models = pytest.mark.parametrize("name", zoo.ALL)
flavours = pytest.mark.parametrize(
    ("name", "attention"), [(name, kind) for name in zoo.ALL for kind in zoo.attentions(name)]
)


def greedy(model: PreTrainedModel, ids: Tensor, cache: Cache, new: int = 12, **more: object) -> Tensor:
    """The new tokens of `generate`, [B, new] (or fewer)."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        out = model.generate(
            ids, **cache_kwargs(model.generate, cache), max_new_tokens=new, do_sample=False, **more
        )
    return out[:, ids.shape[1] :]


@contextmanager
def watched(model: PreTrainedModel, check: Callable[[], None]) -> Iterator[list[int]]:
    """Run `check` after every forward of the model; the list says how many there were."""
    calls = [0]

    def look(*_: object) -> None:
        calls[0] += 1
        check()

    hook = model.register_forward_hook(look)
    try:
        yield calls
    finally:
        hook.remove()


# -- what modicum relies on ------------------------------------------------------------------------


def test_a_cache_layer_has_the_abstract_methods_that_ours_define() -> None:
    abstract = set(CacheLayerMixin.__abstractmethods__)
    core = {"lazy_initialization", "update", "get_mask_sizes", "get_seq_length"}
    assert core <= abstract
    assert abstract - core <= {"get_max_length", "get_max_cache_shape"}
    assert not getattr(BudgetLayer, "__abstractmethods__", None)
    assert not getattr(WindowLayer, "__abstractmethods__", None)
    for cls in (BudgetLayer, WindowLayer):
        for method in ("reset", "reorder_cache", "batch_repeat_interleave", "batch_select_indices", "crop"):
            assert callable(getattr(cls, method)), (cls, method)


def test_a_budget_layer_overrides_whatever_touches_keys_and_values() -> None:
    # The mixin's own `reset`, `offload` and `reorder_cache` read self.keys, which a budget layer lacks.
    for owner in (CacheLayerMixin, DynamicLayer):
        for method, function in vars(owner).items():
            if inspect.isfunction(function) and not method.startswith("__"):
                text = inspect.getsource(function)
                if "self.keys" in text:
                    assert method in vars(BudgetLayer), method


def test_the_signatures_of_cache_and_layer_are_those_we_call_and_serve() -> None:
    assert "layers" in inspect.signature(Cache.__init__).parameters
    parameters = list(inspect.signature(Cache.update).parameters)
    assert parameters[:4] == ["self", "key_states", "value_states", "layer_idx"]
    sizes = list(inspect.signature(CacheLayerMixin.get_mask_sizes).parameters)
    assert sizes in (["self", "query_length"], ["self", "cache_position"])
    assert list(inspect.signature(Cache.get_seq_length).parameters)[:2] == ["self", "layer_idx"]


def test_mask_sizes_are_read_from_a_number_and_from_a_tensor() -> None:
    model = zoo.shared("llama")
    cache = BudgetCache(model, "streamingllm", 16, **SMALL)
    feed(model, cache, zoo.tokens(1, 30))
    layer = cache.layers[0]
    assert layer.get_mask_sizes(5) == (16 + 5, 30 - 16)
    assert layer.get_mask_sizes(torch.arange(30, 35)) == (16 + 5, 30 - 16)
    assert cache.get_seq_length() == layer.get_seq_length() == 30
    assert layer.get_max_length() == layer.get_max_cache_shape() == -1


def test_registering_goes_through_the_two_public_interfaces() -> None:
    before = set(AttentionInterface._global_mapping), set(AttentionMaskInterface._global_mapping)
    assert "modicum_sdpa" in before[0]
    assert "modicum_sdpa" in before[1]
    for interface in (AttentionInterface, AttentionMaskInterface):
        assert list(inspect.signature(interface.register).parameters) == ["key", "value"]
        assert isinstance(inspect.getattr_static(interface, "register"), classmethod)
    BudgetCache(zoo.build("llama"), budget=64)
    assert set(AttentionInterface._global_mapping) == before[0]
    assert set(AttentionMaskInterface._global_mapping) == before[1]


@pytest.fixture(autouse=True, scope="module")
def _attached() -> None:
    BudgetCache(zoo.shared("llama"), budget=64)


def test_a_budget_cache_is_a_cache_of_one_layer_per_model_layer() -> None:
    for name in zoo.ALL:
        model = zoo.shared(name)
        cache = BudgetCache(model, budget=64)
        assert isinstance(cache, Cache)
        assert len(cache.layers) == model.config.num_hidden_layers
        assert not cache.is_compileable
        assert not getattr(cache, "is_croppable", False)
        assert cache.get_seq_length() == 0


# -- budget ≥ length -------------------------------------------------------------------------------


@flavours
@pytest.mark.parametrize("chunk", [512, 7])
def test_greedy_tokens_are_those_of_the_full_cache_when_all_fits(
    name: str, attention: str, chunk: int
) -> None:
    model, ids = zoo.shared(name, attention=attention), zoo.tokens(2, 40)
    expected = greedy(model, ids, full_cache(model))
    cache = BudgetCache(model, "keydiff", 64, chunk=chunk, **SMALL)
    assert_same_tokens(model, ids, greedy(model, ids, cache), expected)
    assert cache.seen == 40 + 12 - 1


@flavours
def test_logits_are_those_of_the_full_cache_when_all_fits_call_by_call(name: str, attention: str) -> None:
    model, ids = zoo.shared(name, attention=attention), zoo.tokens(2, 45)
    expected = feed(model, full_cache(model), ids)
    cache = BudgetCache(model, "snapkv(window=4)", 64, chunk=16, **SMALL)
    actual = feed(model, cache, ids, cuts=(*every(40, 7), *range(40, 45)))
    assert_same_logits(model, actual, expected)


@flavours
def test_renumbered_positions_are_the_full_caches_when_all_fits(name: str, attention: str) -> None:
    """The model tells its attention the positions at which it turned queries and keys, padded rows' too."""
    model = zoo.shared(name, attention=attention)
    ids, mask = pad_left([zoo.tokens(1, 30)[0], zoo.tokens(1, 30, seed=1)[0][:19]])
    cache = BudgetCache(model, "keydiff", 64, positions="renumbered", **SMALL)
    got = greedy(model, ids, cache, attention_mask=mask)
    expected = greedy(model, ids, full_cache(model), attention_mask=mask)
    assert_same_tokens(model, ids, got, expected, mask)
    check_limits(cache)


@models
def test_generate_goes_on_beyond_the_models_positions_in_8_bits(name: str) -> None:
    model, ids = zoo.shared(name), zoo.tokens(2, 600)
    cache = BudgetCache(model, "snapkv(window=4)", 40, positions="renumbered", store="int8", **SMALL)
    with watched(model, lambda: check_limits(cache)):
        assert greedy(model, ids, cache, 8).shape == (2, 8)
    assert cache.seen == 607


@pytest.mark.skipif(VERSION < (5, 3), reason="prefill_chunk_size gives wrong positions on transformers 5.2")
@models
def test_greedy_tokens_are_the_same_with_transformers_own_chunks(name: str) -> None:
    model, ids = zoo.shared(name), zoo.tokens(2, 40)
    expected = greedy(model, ids, full_cache(model))
    cache = BudgetCache(model, "keydiff", 64, chunk=16, **SMALL)
    with watched(model, lambda: check_limits(cache)) as calls:
        actual = greedy(model, ids, cache, prefill_chunk_size=7)
    assert_same_tokens(model, ids, actual, expected)
    assert calls[0] == 6 + 11


@models
def test_the_bytes_of_a_full_cache_are_those_that_transformers_takes(name: str) -> None:
    model, ids = zoo.shared(name), zoo.tokens(2, 45)
    for length in (4, 9, 10, 45):
        cache, full = BudgetCache(model, "keydiff", 20, chunk=16, **SMALL), full_cache(model)
        feed(model, cache, ids[:, :length])
        feed(model, full, ids[:, :length])
        assert cache.full_nbytes == sum(layer.keys.nbytes + layer.values.nbytes for layer in full.layers)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@models
def test_half_precision_is_the_full_cache_to_its_rounding(name: str, dtype: torch.dtype) -> None:
    model, ids = zoo.shared(name, dtype), zoo.tokens(1, 40)
    expected = feed(model, full_cache(model), ids).float()
    cache = BudgetCache(model, "keydiff", 64, chunk=16, **SMALL)
    actual = feed(model, cache, ids, cuts=(20, 38, 39)).float()
    # A wrong mask or position changes logits by their own size.
    assert_same_logits(model, actual, expected)
    error = (actual - expected).square().mean().sqrt() / expected.square().mean().sqrt()
    assert float(error) < 2 * network_error(model, 40) < 0.4
    check_limits(cache)


@models
def test_sampling_with_a_seed_draws_the_tokens_of_the_full_cache(name: str) -> None:
    model, ids = zoo.shared(name), zoo.tokens(2, 30)
    drawn = []
    for cache in (full_cache(model), BudgetCache(model, "tova", 64, chunk=16, **SMALL)):
        torch.manual_seed(7)
        drawn.append(
            model.generate(
                ids,
                **cache_kwargs(model.generate, cache),
                max_new_tokens=15,
                do_sample=True,
                top_k=20,
                temperature=0.8,
            ).tolist()
        )
    assert drawn[0] == drawn[1]


@models
def test_beams_are_those_of_the_full_cache_when_all_fits(name: str) -> None:
    model, ids = zoo.shared(name), zoo.tokens(2, 20)
    settings = {"num_beams": 3, "num_return_sequences": 2, "new": 10}
    expected = greedy(model, ids, full_cache(model), **settings)
    for policy in ("keydiff", "snapkv(window=4)"):
        cache = BudgetCache(model, policy, 64, chunk=8, **SMALL)
        assert greedy(model, ids, cache, **settings).tolist() == expected.tolist()
        cache.check_integrity()


# -- under the budget ------------------------------------------------------------------------------

POLICIES = ("keydiff", "snapkv(window=4)", "h2o", "pyramidkv+snapkv(window=4)", "adakv+tova", "razor")


@models
@pytest.mark.parametrize("policy", POLICIES)
def test_nothing_goes_over_the_budget_in_any_forward_of_generate(name: str, policy: str) -> None:
    model, ids = zoo.shared(name), zoo.tokens(2, 70)
    cache = BudgetCache(model, policy, 24, chunk=16, **SMALL)

    def check() -> None:
        check_limits(cache)
        if policy.startswith(("keydiff", "snapkv", "h2o")):
            assert all(int(held.max()) <= 24 for held in cache.held)

    with watched(model, check) as calls:
        tokens = greedy(model, ids, cache, new=10)
    assert calls[0] == 10
    assert tokens.shape == (2, 10)
    assert cache.seen == 79
    assert cache.nbytes == cache.budget_nbytes
    chunk = max(
        16 * 2 * layer.kv_heads * (layer.key_dim + layer.value_dim) * 4 for layer in cache.shape.layers
    )
    if not any(layer.window for layer in cache.shape.layers) and "adakv" not in policy:
        assert cache.peak_nbytes <= cache.budget_nbytes + chunk


@models
@pytest.mark.parametrize("size", ["24KB", "40 KiB"])
def test_a_budget_in_bytes_covers_every_tensor_in_every_forward(name: str, size: str) -> None:
    model, ids = zoo.shared(name), zoo.tokens(1, 90)
    limit = {"24KB": 24_000, "40 KiB": 40 * 1024}[size]
    for policy in ("keydiff", "h2o", "snapkv(window=4)"):
        cache = BudgetCache(model, policy, size, chunk=16, **SMALL)

        def check(cache: BudgetCache = cache) -> None:
            check_limits(cache)
            assert cache.nbytes <= cache.budget_nbytes <= limit

        with watched(model, check):
            greedy(model, ids, cache, new=5)


@models
def test_a_bare_call_after_eviction_goes_on_at_the_position_of_the_tokens_seen(name: str) -> None:
    model, ids, more = zoo.shared(name), zoo.tokens(1, 50), zoo.tokens(1, 9, seed=1)
    cache = BudgetCache(model, "keydiff", 20, chunk=16, **SMALL)
    feed(model, cache, ids)
    twin, wrong = cache.copy(), cache.copy()
    with torch.no_grad():
        bare = model(more, **cache_kwargs(model, cache)).logits
        said = model(more, **cache_kwargs(model, twin), position_ids=torch.arange(50, 59)[None]).logits
        other = model(more, **cache_kwargs(model, wrong), position_ids=torch.arange(70, 79)[None]).logits
    assert torch.equal(bare, said)  # the same operations
    assert (bare - other).abs().max() > 0.1
    assert cache.seen == 59
    assert all(max(head) == 58 for layer in all_kept(cache) for row in layer for head in row)


@models
def test_two_turns_are_one_long_call_when_nothing_goes(name: str) -> None:
    model, ids = zoo.shared(name), zoo.tokens(2, 48)
    once = feed(model, BudgetCache(model, "keydiff", 64, **SMALL), ids)
    cache = BudgetCache(model, "keydiff", 64, **SMALL)
    first = greedy(model, ids[:, :30], cache, new=6)
    cache_seen = cache.seen
    twin = BudgetCache(model, "keydiff", 64, **SMALL)
    turns = feed(model, twin, ids, cuts=(30, 31, 32))
    assert_same_logits(model, turns, once)
    # And with generate: the second turn is given the whole conversation and reads only what is new of it.
    talk = torch.cat([ids[:, :30], first, ids[:, 36:]], dim=1)
    assert cache_seen == 35
    second = greedy(model, talk, cache, new=6)
    assert_same_tokens(model, talk, second, greedy(model, talk, full_cache(model), new=6))
    assert cache.seen == 48 + 5


@models
@pytest.mark.parametrize("policy", ["keydiff", "snapkv(window=4)", "h2o", "adakv+snapkv(window=4)"])
def test_a_row_of_a_left_padded_batch_is_what_it_is_alone(name: str, policy: str) -> None:
    model = zoo.shared(name)
    rows = [zoo.tokens(1, n, seed=n)[0] for n in (50, 37, 4)]
    ids, mask = pad_left(rows)
    cache = BudgetCache(model, policy, 20, chunk=16, **SMALL)
    with watched(model, lambda: check_limits(cache)):
        together = feed(model, cache, ids, mask)
        for step in range(3):
            new = zoo.tokens(3, 1, seed=100 + step)
            ids, mask = torch.cat([ids, new], 1), torch.cat([mask, torch.ones_like(new)], 1)
            together = torch.cat([together, feed(model, cache, ids, mask, start=ids.shape[1] - 1)], 1)
    for i, row in enumerate(rows):
        line = torch.cat([row, ids[i, 50:]])[None]
        alone = BudgetCache(model, policy, 20, chunk=16, **SMALL)
        logits = feed(model, alone, line, cuts=(len(row), len(row) + 1, len(row) + 2))
        assert_same_logits(model, together[i : i + 1, 50 - len(row) :], logits)
        assert [layer[i] for layer in all_kept(cache)] == [layer[0] for layer in all_kept(alone)]
    assert cache.row_seen == (53, 40, 7) or not all_kept(cache)


@models
def test_a_left_padded_batch_is_generated_row_by_row_as_alone(name: str) -> None:
    model = zoo.shared(name)
    rows = [zoo.tokens(1, n, seed=n)[0] for n in (30, 45, 12)]
    ids, mask = pad_left(rows)
    cache = BudgetCache(model, "keydiff", 20, chunk=16, **SMALL)
    together = greedy(model, ids, cache, new=8, attention_mask=mask)
    for i, row in enumerate(rows):
        alone = BudgetCache(model, "keydiff", 20, chunk=16, **SMALL)
        assert greedy(model, row[None], alone, new=8)[0].tolist() == together[i].tolist()


@models
@pytest.mark.parametrize(
    "policy", ["pyramidkv+keydiff", "adakv+snapkv(window=4)", "razor", "pyramidkv+adakv+h2o"]
)
def test_follow_ups_of_several_tokens_work_where_layers_and_heads_hold_unequally(
    name: str, policy: str
) -> None:
    model, ids = zoo.shared(name), zoo.tokens(2, 90)
    cache = BudgetCache(model, policy, 24, chunk=16, **SMALL)
    logits = feed(model, cache, ids, cuts=(50, 51, 52, 59, 60, 83), after=lambda: check_limits(cache))
    assert bool(torch.isfinite(logits).all())
    held = [int(n) for i, _ in enumerate(cache.layers) for n in cache.held[i].flatten()]
    windowed = any(layer.window for layer in cache.shape.layers)
    if policy != "razor" and not windowed and not (policy.startswith("adakv") and name == "llama-mqa"):
        assert len(set(held)) > 1, "nothing was ragged"
    # The same in other calls of the same pieces: each call is one piece here.
    twin = BudgetCache(model, policy, 24, chunk=64, **SMALL)
    again = feed(model, twin, ids, cuts=(2, 18, 34, 50, 51, 52, 59, 60, 67, 83))
    assert_same_logits(model, again, logits)
    assert all_kept(twin) == all_kept(cache)


@models
@pytest.mark.parametrize("policy", ["keydiff", "snapkv(window=4)", "adakv+h2o", "razor"])
def test_beams_and_samples_run_while_tokens_go(name: str, policy: str) -> None:
    model, ids = zoo.shared(name), zoo.tokens(2, 40)
    for more in ({"num_beams": 3}, {"num_beams": 2, "num_return_sequences": 2}):
        cache = BudgetCache(model, policy, 20, chunk=16, **SMALL)
        with watched(model, lambda cache=cache: check_limits(cache)):
            out = greedy(model, ids, cache, new=8, **more)
        assert out.shape[1] == 8
    torch.manual_seed(0)
    cache = BudgetCache(model, policy, 20, chunk=16, **SMALL)
    with watched(model, lambda: check_limits(cache)):
        out = model.generate(
            ids,
            **cache_kwargs(model.generate, cache),
            max_new_tokens=6,
            do_sample=True,
            num_return_sequences=3,
        )
    assert out.shape == (6, 46)


@models
def test_a_beam_goes_on_from_the_row_that_it_came_from(name: str) -> None:
    model, ids, more = zoo.shared(name), zoo.tokens(3, 40), zoo.tokens(3, 6, seed=5)
    for policy in ("keydiff", "snapkv(window=4)", "adakv+h2o", "razor"):
        cache = BudgetCache(model, policy, 20, chunk=16, **SMALL)
        feed(model, cache, ids, cuts=(38, 39))
        cache.reorder_cache(torch.tensor([2, 0, 0]))
        check_limits(cache)
        with torch.no_grad():
            moved = model(more, **cache_kwargs(model, cache)).logits
        for row, source in enumerate((2, 0, 0)):
            alone = BudgetCache(model, policy, 20, chunk=16, **SMALL)
            feed(model, alone, ids[source : source + 1], cuts=(38, 39))
            with torch.no_grad():
                logits = model(more[row : row + 1], **cache_kwargs(model, alone)).logits
            assert_same_logits(model, moved[row : row + 1], logits)


@pytest.mark.parametrize("name", ["llama", "gemma3", "mistral-window"])
def test_assisted_decoding_is_refused(name: str) -> None:
    model, ids = zoo.shared(name), zoo.tokens(1, 30)
    for more in ({"prompt_lookup_num_tokens": 3}, {"assistant_model": zoo.build("llama-mqa", seed=1)}):
        cache = BudgetCache(model, "keydiff", 64, chunk=16, **SMALL)
        with pytest.raises((CacheError, InputError), match="assist"):
            greedy(model, ids, cache, **more)


# -- the model without us --------------------------------------------------------------------------


def outputs(model: PreTrainedModel) -> list[Tensor]:
    """Logits with no cache, with transformers' own (padded too), in training, and the gradients."""
    ids, mask = pad_left([zoo.tokens(1, n, seed=n)[0] for n in (33, 20)])
    with torch.no_grad():
        found = [
            model(ids, use_cache=False).logits,
            model(ids, attention_mask=mask).logits,
            feed(model, full_cache(model), ids, cuts=(20, 30, 31)),
            feed(model, full_cache(model), ids, mask, cuts=(20, 30, 31)),
            greedy(model, ids, full_cache(model), new=5, attention_mask=mask).float(),
            greedy(model, ids, full_cache(model), new=5, num_beams=2).float(),
        ]
    model.train()
    loss = model(ids, attention_mask=mask, labels=ids).loss
    loss.backward()
    found += [loss.detach(), *(p.grad for p in model.parameters() if p.grad is not None)]
    assert sum(float(p.grad.abs().sum()) > 0 for p in model.parameters() if p.grad is not None) > 10
    model.zero_grad()
    model.eval()
    return found


@flavours
def test_the_model_without_our_cache_is_bit_for_bit_as_before(name: str, attention: str) -> None:
    model = zoo.build(name, attention=attention)
    before = outputs(model)
    cache = BudgetCache(model, "keydiff", 20, chunk=16, **SMALL)
    assert model.config._attn_implementation == f"modicum_{attention}"
    attached = outputs(model)
    feed(model, cache, zoo.tokens(1, 50))
    used = outputs(model)
    modicum.detach(model)
    assert model.config._attn_implementation == attention
    after = outputs(model)
    for other in (attached, used, after):
        assert len(other) == len(before)
        assert all(torch.equal(a, b) for a, b in zip(before, other, strict=True))


@models
def test_two_budget_caches_take_turns_on_one_model(name: str) -> None:
    model = zoo.shared(name)
    lines = zoo.tokens(1, 60, seed=1), zoo.tokens(1, 60, seed=2)
    settings = (("keydiff", 20, 16), ("adakv+snapkv(window=4)", 28, 8))
    alone = []
    for line, (policy, budget, chunk) in zip(lines, settings, strict=True):
        cache = BudgetCache(model, policy, budget, chunk=chunk, **SMALL)
        alone.append(feed(model, cache, line, cuts=(40, 50, 51, 52)))
    caches = [BudgetCache(model, p, b, chunk=c, **SMALL) for p, b, c in settings]
    turns: list[list[Tensor]] = [[], []]
    for a, b in ((0, 40), (40, 50), (50, 51), (51, 52), (52, 60)):
        for cache, line, said in zip(caches, lines, turns, strict=True):
            said.append(feed(model, cache, line[:, :b], start=a))
    for said, expected in zip(turns, alone, strict=True):
        assert torch.equal(torch.cat(said, 1), expected)  # the same operations


@models
def test_after_detach_the_cache_refuses_and_a_new_one_works(name: str) -> None:
    model, ids = zoo.build(name), zoo.tokens(1, 30)
    cache = BudgetCache(model, "keydiff", 20, chunk=16, **SMALL)
    feed(model, cache, ids)
    modicum.detach(model)
    with pytest.raises(CacheError, match="detached"):
        feed(model, cache, ids)
    modicum.detach(model)  # once more is no error
    again = BudgetCache(model, "keydiff", 20, chunk=16, **SMALL)
    feed(model, again, ids)
    assert all_kept(again) == all_kept(cache)


def test_a_generation_config_that_names_the_cache_elsewhere_is_served() -> None:
    model, ids = zoo.shared("llama"), zoo.tokens(1, 30)
    config = GenerationConfig(max_new_tokens=5, do_sample=False, pad_token_id=0)
    cache = BudgetCache(model, "keydiff", 20, chunk=16, **SMALL)
    out = model.generate(
        ids,
        **cache_kwargs(model.generate, cache),
        generation_config=config,
        return_dict_in_generate=True,
        output_scores=True,
    )
    assert out[cache_argument(model.generate)] is cache
    assert len(out.scores) == 5
    assert {max(head) for row in kept(cache, 0) for head in row} == {33}


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_a_cache_of_another_model_is_refused_in_words(attention: str) -> None:
    """Whatever an attention function of transformers does first with a handle that is not for it."""
    ids = torch.ones(1, 6, dtype=torch.long)
    own, other = (zoo.build("llama") for _ in range(2))
    other.set_attn_implementation(attention)
    cache = BudgetCache(own, "keydiff", 48)
    with torch.no_grad(), pytest.raises(CacheError, match="another model"):
        other(ids, **cache_kwargs(other, cache))
