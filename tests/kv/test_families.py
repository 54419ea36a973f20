"""Families beyond full attention: hybrids, latents, sinks, shared keys, chunked layers, layers in loops.

transformers' own cache, with a mask over what was evicted where something was, is the reference.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from benchmarks.tiny_configs import tiny_config
from modicum import BudgetCache, ModelError
from modicum.compat import cache_kwargs
from modicum.kv.inspection import inspect_model
from modicum.kv.latent import expands_latents
from modicum.kv.view import View
from tests.bounds import assert_within, gamma
from tests.driver import feed, full_cache, pad_left
from tests.kv.coded_cache import CodedCache

RECURRENT = ("qwen3_next", "falcon_h1", "lfm2", "nemotron_h", "kimi_linear")
"""With recurrent states in some layers, or beside attention."""
LATENT = ("deepseek_v3", "longcat_flash", "kimi_linear")
SINKS = ("gpt_oss",)
SHARED = ("gemma3n_text", "gemma4_text")
"""With layers that read other layers' keys."""
FAMILIES = (*RECURRENT, "deepseek_v3", "longcat_flash", *SINKS, *SHARED, "llama4_text", "dory", "bart")
VOCAB = 90


def build(name: str) -> PreTrainedModel:
    """A tiny model whose wide random weights make attention matter."""
    config = tiny_config(name)
    for part in {id(c): c for c in (config, config.get_text_config(decoder=True))}.values():
        if hasattr(part, "initializer_range"):
            part.initializer_range = 0.15
    torch.manual_seed(0)
    model: Any = AutoModelForCausalLM.from_config(config)
    return model.eval()  # type: ignore[no-any-return]


shared = cache(build)


def ids(rows: int, length: int, seed: int = 0) -> Tensor:
    return torch.randint(3, VOCAB, (rows, length), generator=torch.Generator().manual_seed(seed))


def bound(logits: Tensor) -> float:
    """Of two evaluations of the same network in fp32: a few hundred roundings in a row through its layers.

    Norms, routers and recurrences are in fp32 in every family.
    """
    return 2 * gamma(1024, torch.float32) * float(logits.abs().max())


@pytest.mark.parametrize("name", FAMILIES)
def test_a_budget_as_large_as_the_text_gives_what_transformers_cache_gives(name: str) -> None:
    model, text = shared(name), ids(2, 37)
    cuts = [21, *range(34, 37)]
    want = feed(model, full_cache(model), text, cuts=cuts)
    ours = BudgetCache(model, "keydiff", 48, chunk=8, recent=4)
    got = feed(model, ours, text, cuts=cuts, after=ours.check_integrity)
    assert_within(got, want, bound(want), name)


# Llama 4's chunked layers see less than they hold, which the mask below does not say.
@pytest.mark.parametrize("name", [name for name in FAMILIES if name != "llama4_text"])
def test_what_is_evicted_is_not_attended_to_and_all_else_is(name: str) -> None:
    """Under StreamingLLM it is known what is held: transformers' own attention, with a mask over the rest."""
    model, text, sinks, budget = shared(name), ids(2, 33), 2, 12
    ours = BudgetCache(model, "streamingllm", budget, chunk=32, n_sink=sinks, recent=4)
    theirs = full_cache(model)
    feed(model, ours, text[:, :30])
    feed(model, theirs, text[:, :30])
    for at in range(30, 33):
        new = text[:, at : at + 1]
        # Held before the step: the sinks and the newest; the token itself is seen as well.
        keep = torch.zeros(at + 1, dtype=torch.bool)
        keep[:sinks] = keep[at - (budget - sinks) :] = True
        want = _masked_step(model, theirs, new, keep)
        got = feed(model, ours, text[:, : at + 1], start=at)
        assert_within(got, want, bound(want), f"{name} at {at}")


def _masked_step(model: PreTrainedModel, theirs: Any, new: Tensor, keep: Tensor) -> Tensor:
    """One step of transformers' attention: full layers see what is kept, other layers all they hold."""
    bias = torch.zeros(len(new), 1, 1, len(keep)).masked_fill(~keep, torch.finfo(torch.float32).min)
    kinds = set(getattr(model.config.get_text_config(decoder=True), "layer_types", None) or ())
    at = torch.tensor([[len(keep) - 1]]).expand(len(new), 1)
    mask: Any = bias
    if kinds - {"full_attention", "conv"}:
        mask = dict.fromkeys(kinds | {"sliding_attention", "linear_attention"}) | {"full_attention": bias}
    step: Any = model
    with torch.no_grad():
        out = step(new, attention_mask=mask, position_ids=at, use_cache=True, **cache_kwargs(model, theirs))
    logits: Tensor = out.logits
    return logits


@pytest.mark.parametrize(
    "policy", ["keydiff", "snapkv(window=4)", "h2o", "caote+snapkv(window=4)", "adakv+knorm", "auto"]
)
@pytest.mark.parametrize("name", FAMILIES)
def test_the_bound_holds_under_every_kind_of_policy(name: str, policy: str) -> None:
    model = shared(name)
    ours = BudgetCache(model, policy, 12, chunk=8, n_sink=2, recent=4)

    def look() -> None:
        ours.check_integrity()
        assert ours.nbytes <= ours.budget_nbytes

    feed(model, ours, ids(2, 40), cuts=[19, *range(36, 40)], after=look)
    held = [n for layer, n in zip(ours.shape.layers, ours.held, strict=True) if layer.is_full]
    assert held
    assert sum(int(n.sum()) for n in held) <= 12 * sum(n.numel() for n in held)  # RazorAttention: on average


@pytest.mark.parametrize("name", ["qwen3_next", "deepseek_v3", "gpt_oss", "gemma4_text", "lfm2"])
def test_a_padded_row_is_what_it_is_alone(name: str) -> None:
    model = shared(name)
    rows = [ids(1, n, seed=n)[0] for n in (29, 17)]
    text, mask = pad_left(rows)
    batch = BudgetCache(model, "streamingllm", 14, chunk=8, n_sink=2, recent=4)
    got = feed(model, batch, text, mask, cuts=[13, 26, 27, 28])[:, -1]
    for i, row in enumerate(rows):
        alone = BudgetCache(model, "streamingllm", 14, chunk=8, n_sink=2, recent=4)
        cut = len(row)
        want = feed(model, alone, row[None], cuts=[cut - 16, cut - 3, cut - 2, cut - 1])[:, -1]
        assert_within(got[i : i + 1], want, bound(want), f"row {i}")


@pytest.mark.parametrize("name", ["qwen3_next", "falcon_h1", "deepseek_v3", "gemma4_text"])
def test_saved_loaded_copied_and_reset_caches_go_on_alike(name: str, tmp_path: Path) -> None:
    model, text = shared(name), ids(2, 30)
    settings: dict[str, Any] = {"chunk": 8, "n_sink": 2, "recent": 4}
    ours = BudgetCache(model, "keydiff", 12, **settings)
    feed(model, ours, text, cuts=[15])
    ours.save(tmp_path / "cache")
    loaded, copied = BudgetCache.load(tmp_path / "cache", model), ours.copy()
    more = torch.cat([text, ids(2, 3, seed=5)], dim=1)
    want = feed(model, ours, more, cuts=[31, 32], start=30)
    for other in (loaded, copied):
        assert torch.equal(feed(model, other, more, cuts=[31, 32], start=30), want)
    ours.reset()
    assert ours.nbytes == 0
    again = feed(model, ours, text, cuts=[15])
    fresh = feed(model, BudgetCache(model, "keydiff", 12, **settings), text, cuts=[15])
    assert torch.equal(again, fresh)


@pytest.mark.parametrize("name", ["qwen3_next", "falcon_h1"])
def test_rows_of_recurrent_states_are_reordered_repeated_and_selected(name: str) -> None:
    model, text = shared(name), ids(2, 20)
    settings: dict[str, Any] = {"chunk": 8, "n_sink": 2, "recent": 4}

    def read(order: list[int]) -> BudgetCache:
        ours = BudgetCache(model, "keydiff", 12, **settings)
        feed(model, ours, text[order])
        return ours

    new = ids(4, 1, seed=3)
    for change, order in (
        (lambda c: c.reorder_cache(torch.tensor([1, 0])), [1, 0]),
        (lambda c: c.batch_repeat_interleave(2), [0, 0, 1, 1]),
        (lambda c: c.batch_select_indices(torch.tensor([1])), [1]),
    ):
        ours = read([0, 1])
        change(ours)
        ours.check_integrity()
        step = torch.cat([text[order], new[: len(order)]], dim=1)
        got = feed(model, ours, step, start=20)
        want = feed(model, read(order), step, start=20)
        assert_within(got, want, bound(want))


@pytest.mark.parametrize("name", LATENT)
def test_a_latent_is_stored_once_and_smaller_than_keys_and_values(name: str) -> None:
    model = shared(name)
    layers = [layer for layer in inspect_model(model).layers if layer.is_full]
    config = model.config
    for layer in layers:
        assert layer.is_latent
        assert (layer.kv_heads, layer.stored_value_dim) == (1, 0)
        assert layer.key_dim == config.kv_lora_rank + config.qk_rope_head_dim
        assert layer.group == config.num_attention_heads
    ours = BudgetCache(model, "keydiff", 12, recent=4)
    feed(model, ours, ids(1, 20))
    slots = sum(
        bank.arena.keys.nbytes + bank.arena.values.nbytes for x in ours.shared.layers for bank in x.banks
    )
    assert slots == len(layers) * 13 * layers[0].key_dim * 4  # a slot more for the newcomer; fp32


@pytest.mark.parametrize("layer", [0, 1])
@pytest.mark.parametrize("name", LATENT)
def test_a_call_cut_short_before_a_latent_is_read_leaves_nothing_to_the_next(name: str, layer: int) -> None:
    """The cache's layer has taken the token, and attention has not come."""
    model, text, other = build(name), ids(1, 20), ids(1, 20, seed=9)
    want = model(text).logits
    module: Any = [part for part in model.modules() if expands_latents(part)][layer]
    expand = module.expand_kv

    def interrupted(*given: Any) -> Any:
        raise KeyboardInterrupt

    for length in (4, 20):  # the second as long as the calls that come after it
        ours = BudgetCache(model, "keydiff", 12, chunk=8, recent=4)
        module.expand_kv = interrupted
        with pytest.raises(KeyboardInterrupt):
            feed(model, ours, other[:, :length])
        module.expand_kv = expand
        assert_within(model(text).logits, want, bound(want))
    module.expand_kv = interrupted
    with pytest.raises(KeyboardInterrupt):
        feed(model, BudgetCache(model, "keydiff", 12, chunk=8, recent=4), other)
    module.expand_kv = expand
    assert_within(feed(model, full_cache(model), text), want, bound(want))


@pytest.mark.parametrize("store", ["int8", "fp8"])
@pytest.mark.parametrize("name", ["deepseek_v3", "gemma4_text", "gpt_oss"])
def test_slots_in_8_bits_hold_their_bound_and_stay_near(name: str, store: str) -> None:
    model, text = shared(name), ids(1, 30)
    want = feed(model, full_cache(model), text, cuts=[28, 29])
    ours = BudgetCache(model, "keydiff", 40, chunk=8, recent=4, store=store)
    got = feed(model, ours, text, cuts=[28, 29], after=ours.check_integrity)
    assert float((got - want).norm() / want.norm()) < 0.25
    assert not torch.equal(got, want)


@pytest.mark.parametrize("store", ["k8v4", "int4"])
@pytest.mark.parametrize("name", ["deepseek_v3", "gemma4_text", "gpt_oss", "falcon_h1"])
def test_slots_in_4_bits_give_what_transformers_cache_of_the_same_codes_gives(name: str, store: str) -> None:
    """In float64, so that no code falls to the other side of a half."""
    model, text = build(name).double(), ids(1, 30)
    model.set_experts_implementation("eager")  # grouped products have no float64
    if store == "k8v4" and name in LATENT:
        with pytest.raises(ModelError, match=r"one latent for keys and values.*choose store='int8'"):
            BudgetCache(model, "keydiff", 40, store=store)
        return
    want = feed(model, CodedCache(model, store), text, cuts=[28, 29])
    ours = BudgetCache(model, "keydiff", 40, chunk=8, recent=4, store=store)
    got = feed(model, ours, text, cuts=[28, 29], after=ours.check_integrity)
    assert_within(got, want, bound(want), name)


def test_rows_with_sinks_are_softmax_with_one_more_logit() -> None:
    """Against plain loops in float64."""
    rng = torch.Generator().manual_seed(1)
    keys, values = (torch.randn(1, 2, 5, 8, generator=rng) for _ in range(2))
    queries, sinks = torch.randn(1, 2, 3, 2, 8, generator=rng), torch.randn(2, 3, generator=rng)
    view = View(
        parts=((keys, values),),
        positions=torch.arange(5).expand(1, 2, 5),
        valid=None,
        protected=torch.zeros(1, 2, 5, dtype=torch.bool),
        seen=torch.tensor([5]),
        capacity=4,
        layer=0,
        layers=1,
        scaling=0.5,
        queries=queries,
        query_positions=torch.tensor([[3, 4]]),
        sink_logits=sinks,
    )
    want = torch.zeros(1, 2, 3, 2, 5, dtype=torch.float64)
    for h in range(2):
        for g in range(3):
            for r, at in enumerate((3, 4)):
                z = [
                    0.5 * float(queries[0, h, g, r].double() @ keys[0, h, j].double()) for j in range(at + 1)
                ]
                powers = torch.tensor([*z, float(sinks[h, g])], dtype=torch.float64).exp()
                want[0, h, g, r, : at + 1] = powers[:-1] / powers.sum()
    assert_within(view.rows(), want, gamma(200, torch.float32))
    assert_within(view.row_sums(), want.sum(3), gamma(200, torch.float32))


def test_recurrent_layers_that_begin_anew_are_read_in_one_call_and_answered_rightly() -> None:
    """Jamba's recurrent layers lose their state in a second call of several tokens."""
    from modicum.generation.inputs import Block
    from modicum.generation.interrupt import Interrupt
    from modicum.generation.reader import Reader

    model, text = build("jamba"), ids(1, 40)
    assert not inspect_model(model).continues
    assert inspect_model(shared("qwen3_next")).continues
    ours = BudgetCache(model, "keydiff", 64, chunk=8, recent=4)
    reader = Reader(model, ours, 1, 0)
    for part in (text[:, :33], text[:, 33:]):
        assert reader.take(Block(part, None), Interrupt(), lambda _: None)
    call: Any = model
    with torch.no_grad():
        want = call(text, use_cache=False).logits[:, -1]
    assert reader.transcript.logits is not None
    assert_within(reader.transcript.logits, want, bound(want))


@pytest.mark.parametrize("name", FAMILIES)
def test_a_refused_or_detached_model_is_as_it_was(name: str) -> None:
    model, text = build(name), ids(1, 12)
    want = feed(model, full_cache(model), text)
    before = model.config._attn_implementation
    with pytest.raises(ValueError, match="evict"):
        BudgetCache(model, "keydiff", 64, evict_every=0)
    assert model.config._attn_implementation == before
    BudgetCache(model, "keydiff", 64)
    assert torch.equal(feed(model, full_cache(model), text), want)


@pytest.mark.parametrize("name", SHARED)
def test_keys_that_other_layers_read_are_not_renumbered(name: str) -> None:
    with pytest.raises(ModelError, match="read other layers' keys"):
        BudgetCache(shared(name), budget=48, positions="renumbered")


def test_a_layer_that_is_read_again_keeps_nothing_between_calls() -> None:
    model = shared("gemma4_text")
    ours = BudgetCache(model, "keydiff", 12, chunk=8, n_sink=2, recent=4)
    feed(model, ours, ids(2, 30), cuts=[20, 28, 29])
    readers = [layer.reads for layer in ours.shared.layers if layer.reads is not None]
    assert readers
    assert all(not reads.reads for reads in readers)


@pytest.mark.parametrize("name", ["qwen3_next", "falcon_h1", "deepseek_v3", "gemma4_text"])
def test_pictures_and_counts_of_what_is_held_know_layers_without_heads(name: str) -> None:
    from modicum.cli.keep import draw
    from modicum.generation.result import held_range

    model = shared(name)
    ours = BudgetCache(model, "keydiff", 12, chunk=8, n_sink=2, recent=4)
    feed(model, ours, ids(1, 30))
    figure = draw(ours, "")
    with_heads = [layer for layer in ours.shape.layers if layer.kv_heads]
    assert len([axes for axes in figure.axes if axes.get_images()]) >= len(with_heads)
    low, high = held_range(ours, 0)
    assert 0 < low <= high <= 12
