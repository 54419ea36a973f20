"""Turning: keys go back to before the rotary embedding, and on to any rank, as the model would turn them."""

from __future__ import annotations

import gc
import random
import warnings
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    CohereConfig,
    CohereForCausalLM,
    FalconConfig,
    FalconForCausalLM,
    GlmConfig,
    GlmForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PhiConfig,
    PhiForCausalLM,
    PreTrainedModel,
)

from modicum import BudgetCache, generate, stream
from modicum.errors import InputError, ModelError
from modicum.kv.rotary import turning_of
from modicum.kv.turning import Turning, fresh_ranks, held_ranks, query_ranks
from tests import zoo
from tests.bounds import assert_same_logits, assert_within, gamma, logits_bound
from tests.driver import check_limits, feed, full_cache
from tests.generation.test_models import Letters

SMALL: dict[str, Any] = {
    "vocab_size": zoo.VOCAB,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,
    "pad_token_id": 0,
    "bos_token_id": None,
    "eos_token_id": None,
}
KINDS: dict[str, dict[str, Any]] = {
    "default": {"rope_type": "default", "rope_theta": 10000.0},
    "linear": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 3.0},
    "llama3": {
        "rope_type": "llama3",
        "rope_theta": 10000.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 32,
    },
    "yarn": {
        "rope_type": "yarn",
        "rope_theta": 10000.0,
        "factor": 4.0,
        "original_max_position_embeddings": 16,
    },
}


def llama(kind: dict[str, Any], dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    with torch.random.fork_rng():
        torch.manual_seed(3)
        return LlamaForCausalLM(LlamaConfig(**SMALL, rope_parameters=kind)).to(dtype).eval()


def made(name: str) -> PreTrainedModel:
    """Models that turn their keys in other ways than Llama: pairs side by side, or a part of each head."""
    with torch.random.fork_rng():
        torch.manual_seed(3)
        return {
            "cohere": lambda: CohereForCausalLM(CohereConfig(**SMALL)),
            "glm": lambda: GlmForCausalLM(GlmConfig(**SMALL, head_dim=16, partial_rotary_factor=0.5)),
            "phi": lambda: PhiForCausalLM(PhiConfig(**SMALL, partial_rotary_factor=0.5)),
        }[name]().eval()


def rotary(model: PreTrainedModel) -> Any:
    return model.model.rotary_emb


def turned(model: PreTrainedModel, plain: Tensor, position: int) -> Tensor:
    """By the definition, a pair of dimensions at a time (as Llama pairs them: i with i + d/2), in float64."""
    speed, scale = rotary(model).inv_freq.double(), rotary(model).attention_scaling
    out, half = plain.double().clone(), plain.shape[-1] // 2
    for i in range(half):
        angle = position * speed[i]
        a, b = plain[..., i].double(), plain[..., half + i].double()
        out[..., i] = scale * (a * angle.cos() - b * angle.sin())
        out[..., half + i] = scale * (b * angle.cos() + a * angle.sin())
    return out


def angle_bound(model: PreTrainedModel, plain: Tensor, *positions: int) -> float:
    """Error of a key turned by these positions in fp32, one after the other.

    An angle is position × frequency, both of which are rounded, and so is their product; frequencies are at
    most 1. Cosine and sine are rounded, and a turned number is the sum of two products.
    """
    scale = max(1.0, rotary(model).attention_scaling) ** len(positions)
    share = sum(gamma(2 * p + 2 + 3 * 4, torch.float32) for p in positions)
    # The larger of a pair is at most √2 times the largest number.
    return share * scale * 2**0.5 * float(plain.abs().max())


@pytest.mark.parametrize("kind", KINDS)
def test_there_and_back_is_the_definition(kind: str) -> None:
    model = llama(KINDS[kind])
    turner = turning_of(model)
    rng = torch.Generator().manual_seed(1)
    plain = torch.randn(2, 3, 5, 16, generator=rng)
    at = torch.tensor([[0, 3, 63, 200, 1000], [7, 1, 2, 90, 5]])
    for row in range(2):
        for i in range(5):
            key = turned(model, plain[row : row + 1, :, i : i + 1], int(at[row, i])).float()
            back = turner.back(key, at[row : row + 1, i : i + 1])
            position = int(at[row, i])
            bound = angle_bound(model, plain, position)
            assert_within(back, plain[row : row + 1, :, i : i + 1], bound)
            for rank in (0, 1, 40):
                there = turner.to(back, torch.tensor([[[rank]]]), 41)
                expected = turned(model, plain[row : row + 1, :, i : i + 1], rank).float()
                assert_within(there, expected, angle_bound(model, plain, position, rank))
    ranks = torch.randint(0, 30, (2, 3, 5), generator=rng)
    whole = turner.to(plain, ranks, 30)
    for row in range(2):
        for head in range(3):
            for i in range(5):
                expected = turned(model, plain[row, head, i], int(ranks[row, head, i])).float()
                assert_within(whole[row, head, i], expected, angle_bound(model, plain, 30))


@pytest.mark.parametrize("kind", KINDS)
def test_when_all_fits_every_kind_gives_the_full_caches_logits(kind: str) -> None:
    """Also beyond the positions of training: ranks are the positions then."""
    model, ids = llama(KINDS[kind]), zoo.tokens(2, 90)
    cache = BudgetCache(model, "snapkv(window=4)", 96, chunk=16, n_sink=2, recent=4, positions="renumbered")
    expected = feed(model, full_cache(model), ids)
    assert_same_logits(model, feed(model, cache, ids, cuts=range(70, 90)), expected, turned=True)


@pytest.mark.parametrize("name", ["cohere", "glm", "phi"])
def test_pairs_side_by_side_and_parts_of_heads(name: str) -> None:
    model, ids = made(name), zoo.tokens(2, 60)
    expected = feed(model, full_cache(model), ids)
    cache = BudgetCache(model, "keydiff", 64, chunk=16, n_sink=2, recent=4, positions="renumbered")
    assert_same_logits(model, feed(model, cache, ids, cuts=range(50, 60)), expected, turned=True)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_loses_a_rounding_or_two(dtype: torch.dtype) -> None:
    model = llama(KINDS["yarn"], dtype)
    turner = turning_of(model)
    plain = torch.randn(1, 2, 40, 16, generator=torch.Generator().manual_seed(1)).to(dtype)
    at = torch.arange(1000, 1040)[None]
    there = turner.to(plain, at[None], 1040)
    # Turned in fp32, and rounded once there and once back; positions are the same both ways.
    scale = max(1.0, rotary(model).attention_scaling)
    size = scale * 2**0.5 * plain.float().abs().amax(-1, keepdim=True)
    bound = gamma(2, dtype) * size + 2 * angle_bound(model, plain.float(), 0)
    assert_within(turner.back(there, at).float(), plain.float(), bound)


def test_ranks_are_counts() -> None:
    rng = random.Random(2)
    positions = torch.tensor([[rng.sample(range(100), 9) for _ in range(2)] for _ in range(3)])
    valid = torch.arange(9) < torch.tensor([9, 4, 6])[:, None, None]
    valid = valid.expand(3, 2, 9)
    at = torch.tensor([[5, 50, 99], [0, 20, 60], [7, 80, 33]])
    held, asked = held_ranks(positions, valid), query_ranks(at, positions, valid)
    for row in range(3):
        for head in range(2):
            line = [int(p) for p, v in zip(positions[row, head], valid[row, head], strict=True) if v]
            for i, position in enumerate(line):
                assert int(held[row, head, i]) == sum(other < position for other in line)
            assert sorted(held[row, head].tolist()) == list(range(9))
            for i in range(3):
                count = sum(position <= int(at[row, i]) for position in line)
                assert int(asked[row, head, i]) == max(count - 1, 0)
    pads = torch.tensor([[True, True, True], [False, False, True]])
    assert fresh_ranks([4, 7], 3, pads, positions.device).tolist() == [[4, 5, 6], [7, 7, 7]]
    assert fresh_ranks([4, 4], 3, None, positions.device).tolist() == [[4, 5, 6]]


@pytest.mark.parametrize("policy", ["streamingllm", "keydiff", "h2o", "auto", "adakv+snapkv(window=4)"])
def test_no_rank_goes_beyond_what_is_held_and_a_chunk(policy: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Over a stream ten times as long as the model's positions."""
    model, ids = llama(KINDS["default"]), zoo.tokens(2, 640)
    most: list[int] = []
    true = Turning.to

    def to(self: Turning, x: Tensor, ranks: Tensor, bound: int) -> Tensor:
        most.append(int(ranks.max()))
        assert most[-1] < bound
        return true(self, x, ranks, bound)

    cache = BudgetCache(model, policy, 24, chunk=16, n_sink=2, recent=4, positions="renumbered")
    monkeypatch.setattr(Turning, "to", to)
    logits = feed(model, cache, ids, cuts=range(600, 640), after=lambda: check_limits(cache))
    assert bool(torch.isfinite(logits).all())
    assert max(most) < cache.most_slots + 16
    assert max(most) >= 24
    assert cache.seen == 640


def test_the_newest_of_a_stream_answer_as_a_short_one_does() -> None:
    """With sinks and recent tokens only, one layer's logits hang on what is held and its order alone."""
    with torch.random.fork_rng():
        torch.manual_seed(3)
        model = LlamaForCausalLM(LlamaConfig(**{**SMALL, "num_hidden_layers": 1})).eval()
    ids = zoo.tokens(1, 300)
    long, short = (
        BudgetCache(model, "streamingllm", 24, chunk=8, n_sink=4, recent=8, positions="renumbered")
        for _ in range(2)
    )
    logits = feed(model, long, ids, cuts=range(280, 300))
    again = torch.cat([ids[:, :4], ids[:, -21:]], 1)
    expected = feed(model, short, again, cuts=range(8, 25))
    assert_same_logits(model, logits[:, -1], expected[:, -1], 300, turned=True)
    plain = BudgetCache(model, "streamingllm", 24, chunk=8, n_sink=4, recent=8)
    other = feed(model, plain, ids, cuts=range(280, 300))
    bound = logits_bound(model, expected[:, -1], 300, turned=True)
    assert float((other[:, -1] - expected[:, -1]).abs().max()) > 2 * bound


def test_nothing_more_is_held(tmp_path: Path) -> None:
    model, ids = llama(KINDS["llama3"]), zoo.tokens(2, 100)
    held = {}
    for positions in ("original", "renumbered"):
        cache = BudgetCache(model, "auto", "40KiB", chunk=16, n_sink=2, recent=4, positions=positions)
        feed(model, cache, ids, cuts=range(90, 100))
        check_limits(cache)
        held[positions] = cache.nbytes, cache.budget_nbytes
        assert (f"positions={positions}" in repr(cache)) == (positions == "renumbered")
        cache.save(tmp_path / positions)
        assert BudgetCache.load(tmp_path / positions, model).numbering == positions
    assert held["original"] == held["renumbered"]


REFUSED: dict[str, tuple[Any, str]] = {
    "gpt2": (
        lambda: GPT2LMHeadModel(GPT2Config(n_layer=1, n_head=2, n_embd=32, vocab_size=99, n_positions=64)),
        "GPT2LMHeadModel has no rotary embedding",
    ),
    "falcon with ALiBi": (
        lambda: FalconForCausalLM(
            FalconConfig(
                vocab_size=99, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, alibi=True
            )
        ),
        "FalconForCausalLM",
    ),
    "dynamic": (
        lambda: llama({"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}),
        "'dynamic', whose frequencies change with the length",
    ),
    "longrope": (
        lambda: llama(
            {
                "rope_type": "longrope",
                "rope_theta": 10000.0,
                "short_factor": [1.0] * 8,
                "long_factor": [2.0] * 8,
                "original_max_position_embeddings": 32,
                "factor": 2.0,
            }
        ),
        "'longrope', whose frequencies change with the length",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_models_that_cannot_be_renumbered_are_refused_by_name(name: str) -> None:
    build, why = REFUSED[name]
    model = build().eval()
    before = model.config._attn_implementation
    with pytest.raises(ModelError, match=why):
        BudgetCache(model, budget=48, positions="renumbered")
    assert model.config._attn_implementation == before


@pytest.mark.parametrize("name", [name for name in REFUSED if "falcon" not in name])  # by no policy served
def test_a_policy_that_reads_queries_before_rotation_refuses_them_too(name: str) -> None:
    build, why = REFUSED[name]
    model = build().eval()
    with pytest.raises(ModelError, match=why) as caught:
        BudgetCache(model, "caote+triattention(window=4)", budget=48)
    assert "before it: use another policy" in str(caught.value)
    BudgetCache(model, "compactor", budget=48)


def test_a_rotary_embedding_that_does_something_else_is_refused() -> None:
    """What the model is seen to do decides, not what its modules are called."""
    fast = llama(KINDS["default"])
    true = rotary(fast).forward
    rotary(fast).forward = lambda x, position_ids: true(x, position_ids * 2)
    noisy = llama(KINDS["default"])
    layer = noisy.model.layers[1].self_attn
    layer.k_proj.register_forward_hook(lambda m, args, out: out + 0.01 * torch.rand_like(out))
    still = llama(KINDS["default"])
    rotary(still).forward = lambda x, position_ids: true(x, position_ids * 0)
    for model in (fast, noisy, still):
        with pytest.raises(ModelError, match="could not be done again"):
            BudgetCache(model, budget=48, positions="renumbered")


def test_a_word_that_is_no_numbering_is_refused() -> None:
    with pytest.raises(InputError, match="positions is 'new': choose one of original, renumbered"):
        BudgetCache(zoo.shared("llama"), budget=48, positions="new")


def test_generation_past_the_models_positions_warns_only_where_it_goes_there() -> None:
    model, letters = llama(KINDS["default"]), Letters()
    settings: dict[str, Any] = {"budget": 24, "chunk": 8, "n_sink": 2, "recent": 4, "max_new_tokens": 20}
    text = "a stream of words that goes on and on " * 3
    with pytest.warns(UserWarning, match="trained on positions up to 64"):
        generate(model, letters, text, **settings)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        answer = generate(model, letters, text, positions="renumbered", **settings)
        assert "".join(stream(model, letters, text, positions="renumbered", **settings)) == answer.text
    assert answer.cache.numbering == "renumbered"
    answer.cache.check_integrity()


def test_a_model_is_looked_at_once_and_let_go() -> None:
    model = llama(KINDS["default"])
    calls: list[int] = []
    model.register_forward_hook(lambda *_: calls.append(1))
    for _ in range(3):
        BudgetCache(model, budget=48, positions="renumbered")
    assert len(calls) == 4  # once: one token to learn its layers, and one at each of three positions
    known = weakref.ref(model)
    del model
    gc.collect()
    assert known() is None
