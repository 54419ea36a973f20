"""The head probe: against full attention maps, on heads built by hand, and what it leaves behind."""

from __future__ import annotations

import json
import math
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from modicum.errors import InputError, ModelError, SnapshotError
from modicum.kv import heads as heads_module
from modicum.kv.attention_override import attention_override
from modicum.kv.heads import HeadScores, probe
from modicum.kv.inspection import inspect_model
from modicum.kv.observed_attention import observed_attention
from modicum.kv.policies.razor import RazorAttention
from tests.bounds import (
    FUNCTION,
    LAMBDA,
    assert_same_logits,
    assert_within,
    attention_bound,
    gamma,
    logit_bound,
    network_error,
)

TINY: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 48,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "initializer_range": 0.6,  # sharp enough for weights to differ
}


def llama(**changes: Any) -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**{**TINY, **changes}))


def qwen(**changes: Any) -> Qwen3ForCausalLM:
    torch.manual_seed(1)
    return Qwen3ForCausalLM(Qwen3Config(**{"bos_token_id": None, **TINY, **changes}))


def seen_ids(model: PreTrainedModel) -> tuple[list[Tensor], Any]:
    """A list that fills with the ids that the model is run on, and the hook's handle."""
    ids: list[Tensor] = []

    def note(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        ids.append(kwargs["input_ids"][0].cpu().clone())

    return ids, model.base_model.register_forward_pre_hook(note, with_kwargs=True)


def weights_bound(model: PreTrainedModel) -> float:
    """Of attention weights, and so of means of some: at most 1, and as inexact as what they are made of."""
    return 2 * LAMBDA * network_error(model, 27)


def by_full_maps(model: PreTrainedModel, runs: list[Tensor], k: int, bos: int) -> list[list[list[float]]]:
    """[echo, induction][layer][KV head] from eager attention's full maps, weight by weight."""
    model.set_attn_implementation("eager")
    group = model.config.num_attention_heads // model.config.num_key_value_heads
    layers, kv = model.config.num_hidden_layers, model.config.num_key_value_heads
    sums = torch.zeros(2, layers, model.config.num_attention_heads, dtype=torch.float64)
    number = 0
    for ids in runs:
        with torch.no_grad():
            maps = model(ids[None], output_attentions=True).attentions
        for i in range(bos + k, len(ids)):
            number += 1
            for layer, h in product(range(layers), range(sums.shape[2])):
                sums[0, layer, h] += float(maps[layer][0, h, i, i - k])
                sums[1, layer, h] += float(maps[layer][0, h, i, i - k + 1])
    means = sums / number
    return [
        [
            [max(float(x) for x in means[w, i, j * group : (j + 1) * group]) for j in range(kv)]
            for i in range(layers)
        ]
        for w in range(2)
    ]


@pytest.mark.parametrize(("make", "bos"), [(llama, 1), (qwen, 0)])
@pytest.mark.parametrize("tile", [2**26, 4 * 6 * 31 * 7])  # the second: a few queries at a time
def test_probe_reads_what_full_maps_hold(
    make: Any, bos: int, tile: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "modicum.kv.observed_attention._TILE_BYTES", tile
    )  # the second: a few queries at a time
    model = make()
    inspect_model(model)  # a call of its own, with one token
    ids, hook = seen_ids(model)
    got = probe(model, tokens=9, copies=3, seeds=(5, 6))
    hook.remove()
    assert [len(x) for x in ids] == [27 + bos] * 2
    echo, induction = by_full_maps(model, ids, 9, bos)
    for mine, want in ((got.echo, echo), (got.induction, induction)):
        assert_within(torch.tensor(mine), torch.tensor(want), weights_bound(model))
    assert got.heads == (2, 2, 2)
    assert (got.tokens, got.copies, got.seeds, got.skipped) == (9, 3, (5, 6), ())
    assert got.model_type == model.config.model_type


def test_the_probed_text_is_copies_of_ordinary_tokens_behind_bos() -> None:
    model = llama(bos_token_id=3, eos_token_id=[4, 5], pad_token_id=6)
    model.generation_config.eos_token_id = [4, 7]
    inspect_model(model)  # a call of its own, with one token
    ids, hook = seen_ids(model)
    probe(model, tokens=40, copies=2, seeds=(0, 1, 0), exclude=range(10, 90))
    hook.remove()
    for run in ids:
        assert run[0] == 3
        copies = run[1:].view(2, 40)
        assert torch.equal(copies[0], copies[1])
        assert set(copies[0].tolist()) <= {0, 1, 2, 8, 9, *range(90, 97)}
        assert len(set(copies[0].tolist())) > 6
    assert torch.equal(ids[0], ids[2])
    assert not torch.equal(ids[0], ids[1])


@pytest.mark.parametrize(("context", "length"), [(2048, 20), (80, 19), (81, 20), (12, 2)])
def test_copies_are_cut_to_the_context(context: int, length: int) -> None:
    model = llama(max_position_embeddings=context, bos_token_id=1)
    inspect_model(model)  # a call of its own, with one token
    ids, hook = seen_ids(model)
    assert probe(model, tokens=20, copies=4, seeds=(0,)).tokens == length
    hook.remove()
    assert len(ids[0]) == 4 * length + 1 <= context


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("original", ["sdpa", "eager"])
def test_the_model_is_as_before(original: str, training: bool) -> None:
    model = llama()
    model.set_attn_implementation(original)
    model.train(training)
    model.model.layers[1].eval()
    modes = [m.training for m in model.modules()]
    x = torch.arange(10)[None]
    with torch.no_grad():
        before = model(x).logits
        probe(model, tokens=5, copies=2, seeds=(0,))
        assert model.config._attn_implementation == original
        assert [m.training for m in model.modules()] == modes
        assert torch.equal(model(x).logits, before)
    assert all(p.grad is None for p in model.parameters())


def test_the_model_is_as_before_even_after_a_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    model = llama()
    x = torch.arange(10)[None]
    before = model(x).logits

    def fail(*_: Any) -> None:
        raise RuntimeError("in the middle")

    monkeypatch.setattr(heads_module._Reading, "observe", fail)
    with pytest.raises(RuntimeError, match="in the middle"):
        probe(model, tokens=5, copies=2)
    assert model.config._attn_implementation == "sdpa"
    assert torch.equal(model(x).logits, before)


def test_the_probe_computes_the_outputs_of_the_model() -> None:
    """Layer 2 reads what layers 0 and 1 put out: the function must be true attention."""
    model, x = qwen(), torch.arange(40)[None] % 90
    with torch.no_grad():
        want = model(x).logits
        calls: list[int] = []

        def counted(*args: Any, **how: Any) -> Any:
            calls.append(1)
            return observed_attention(*args, **how)

        with attention_override(model, counted, "probed"):
            found = model(x).logits
    assert len(calls) == TINY["num_hidden_layers"]
    assert_same_logits(model, found, want)


def test_layers_with_sliding_windows_are_skipped() -> None:
    torch.manual_seed(0)
    config = Qwen2Config(
        **{**TINY, "bos_token_id": None}, use_sliding_window=True, sliding_window=4, max_window_layers=1
    )
    model = Qwen2ForCausalLM(config)
    assert model.config.layer_types == ["full_attention", "sliding_attention", "sliding_attention"]
    inspect_model(model)  # a call of its own, with one token
    ids, hook = seen_ids(model)
    got = probe(model, tokens=6, copies=3, seeds=(0,))
    hook.remove()
    assert got.skipped == (1, 2)
    assert got.echo[1:] == got.induction[1:] == ((0.0, 0.0), (0.0, 0.0))
    echo, induction = by_full_maps(model, ids, 6, 0)
    assert_within(torch.tensor(got.echo[0]), torch.tensor(echo[0]), weights_bound(model))
    assert_within(torch.tensor(got.induction[0]), torch.tensor(induction[0]), weights_bound(model))
    assert not any(any(row) for row in RazorAttention(echo=1.0).retrieval(got)[1:])


# ------------------------------------------------------------------ the attention function by itself


class Layer(nn.Module):
    layer_idx = 0


def by_loops(q: Tensor, k: Tensor, v: Tensor, **how: Any) -> Tensor:
    """[n, Hq, Dv] by the definition: causal softmax, window, cap, learned sinks."""
    heads, n, dim = q.shape[1:]
    group, out = heads // k.shape[1], torch.zeros(n, heads, v.shape[-1], dtype=torch.float64)
    for h, i in product(range(heads), range(n)):
        first = max(0, i - how["sliding_window"] + 1) if how.get("sliding_window") else 0
        z = [
            float(q[0, h, i].double() @ k[0, h // group, j].double()) * dim**-0.5 for j in range(first, i + 1)
        ]
        if how.get("softcap"):
            z = [how["softcap"] * math.tanh(x / how["softcap"]) for x in z]
        total = sum(math.exp(x) for x in z)
        if how.get("s_aux") is not None:
            total += math.exp(float(how["s_aux"][h]))
        for j, x in enumerate(z):
            out[i, h] += math.exp(x) / total * v[0, h // group, first + j].double()
    return out


@pytest.mark.parametrize(
    "how", [{}, {"sliding_window": 3}, {"softcap": 0.7}, {"s_aux": torch.tensor([0.3, -1.0, 2.0, 0.0])}]
)
def test_attention_function_is_attention(how: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("modicum.kv.observed_attention._TILE_BYTES", 4 * 4 * 11 * 4)  # 4 queries at a time
    rng = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, h, 11, d, generator=rng) for h, d in ((4, 8), (2, 8), (2, 5)))
    out, weights = observed_attention(Layer(), q, k, v, **how)
    assert weights is None
    assert out.shape == (1, 11, 4, 5)
    single = torch.float32
    error = logit_bound(single, q, k, 8**-0.5, how.get("softcap"))
    bound = attention_bound(12, single, error, float(v.abs().max()))
    assert_within(out[0], by_loops(q, k, v, **how), bound)


@pytest.mark.parametrize("bos", [0, 1])
@pytest.mark.parametrize(
    ("offset", "echo", "induction"), [(0, 1.0, 0.0), (1, 0.0, 1.0), (2, 0.0, 0.0), (4, 0.0, 0.0)]
)
@pytest.mark.parametrize("tile", [2**26, 1])
def test_synthetic_attention_at_an_offset(
    bos: int, offset: int, echo: float, induction: float, tile: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Queries and keys that meet at i - K + offset only: the reading is 1 at its own offset, else 0."""
    monkeypatch.setattr("modicum.kv.observed_attention._TILE_BYTES", tile)
    k_copy, n = 5, bos + 20
    keys = torch.eye(n)
    queries = torch.stack([keys[max(0, i - k_copy + offset)] for i in range(n)]) * 100 * n**0.5
    # Two KV heads: the second looks nowhere in particular; within the first only one of two query heads does.
    q = torch.stack([torch.zeros(n, n), queries, torch.zeros(n, n), torch.zeros(n, n)])[None]
    k = torch.stack([keys, keys])[None]
    reading = heads_module._Reading(k_copy, bos + k_copy)
    observed_attention(Layer(), q, k, torch.randn(1, 2, n, 3), observer=reading)
    means = reading.sums[0] / 15  # [2, H, G]
    # One logit is 100 ahead of all others, or all are zero: only the weights themselves are rounded.
    share = gamma(2 * n + 4 * FUNCTION, torch.float32)
    assert means[:, 0, 1].tolist() == pytest.approx([echo, induction], abs=share)
    even = sum(1 / (i + 1) for i in range(bos + k_copy, n)) / 15
    assert means[:, 0, 0].tolist() == pytest.approx([even, even], rel=share)
    assert means[:, 1].flatten().tolist() == pytest.approx([even] * 4, rel=share)


# ------------------------------------------------------------------ heads built by hand

CODE = 24  # dimensions of a token's code in the residual stream, and those of a head that hardly rotate


def built() -> LlamaForCausalLM:
    """Two layers of two heads. (0, 0) looks at the previous token and hands on its code; (0, 1) looks at the
    same token; (1, 0) looks where the previous token is the same, an induction head; (1, 1) looks nowhere.

    A head's dimension is 64: 32 frequencies, fast ones first. Biases on all of them mark one step back; codes
    stand on the slow ones, which the rotation leaves alone. All codes are ±1, so the norm only scales.
    """
    config = LlamaConfig(
        vocab_size=600,
        hidden_size=2 * CODE,
        intermediate_size=8,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=64,
        attention_bias=True,
        max_position_embeddings=256,
        rope_parameters={"rope_type": "default", "rope_theta": 1e9},
        bos_token_id=0,
    )
    model = LlamaForCausalLM(config).eval()
    rng = torch.Generator().manual_seed(0)
    slow = torch.cat([torch.arange(20, 32), torch.arange(52, 64)])  # both halves of the 12 slowest pairs
    with torch.no_grad():
        for p in model.model.layers.parameters():
            p.zero_()
        for layer in model.model.layers:
            layer.input_layernorm.weight.fill_(1.0)
        first, second = (layer.self_attn for layer in model.model.layers)
        embed = model.model.embed_tokens.weight.zero_()
        embed[:, :CODE] = torch.randint(0, 2, (600, CODE), generator=rng).float() * 2 - 1
        # One step back: the query's bias is the key's, turned on by one position.
        angle = 1e9 ** (-torch.arange(32) / 32)
        first.k_proj.bias[:32] = 12.0
        first.q_proj.bias[:32] = 12.0 * angle.cos()
        first.q_proj.bias[32:64] = -12.0 * angle.sin()
        for i in range(CODE):
            first.v_proj.weight[i, i] = 1.0
            first.o_proj.weight[CODE + i, i] = 2.0**0.5 / 2  # what the norm had made of ±1
            first.q_proj.weight[64 + slow[i], i] = first.k_proj.weight[64 + slow[i], i] = 3.0
            second.q_proj.weight[slow[i], i] = second.k_proj.weight[slow[i], CODE + i] = 3.0
    return model


def test_hand_built_heads_are_told_apart() -> None:
    model = built()
    got = probe(model, tokens=16, copies=4, seeds=(1, 2))
    for run in (1, 2):  # no token twice in a copy, else even these heads would look at several
        draw = torch.randint(598, (16,), generator=torch.Generator().manual_seed(run))
        assert len(set(draw.tolist())) == 16
    # (0, 1): the same token in this copy and all earlier ones, in equal parts: 1/2, 1/3, 1/4.
    assert got.echo[0][1] == pytest.approx((1 / 2 + 1 / 3 + 1 / 4) / 3, abs=1e-3)
    assert got.induction[0][1] < 1e-3
    # (1, 0): the token after each earlier copy of this one: 1, 1/2, 1/3.
    assert got.induction[1][0] == pytest.approx((1 + 1 / 2 + 1 / 3) / 3, abs=1e-3)
    assert got.echo[1][0] < 1e-3
    assert max(got.echo[0][0], got.induction[0][0], got.echo[1][1], got.induction[1][1]) < 0.05
    policy = RazorAttention(echo=0.25, induction=0.25)
    assert policy.retrieval(got) == [[False, True], [True, False]]


# ------------------------------------------------------------------ refusals


@pytest.mark.parametrize(
    ("settings", "word"),
    [
        ({"copies": 1}, "copies"),
        ({"tokens": 1}, "tokens"),
        ({"seeds": ()}, "seed"),
        ({"exclude": range(97)}, "97 token ids"),
        ({"copies": 40}, "context of 64"),
    ],
)
def test_probe_refuses_bad_settings(settings: dict[str, Any], word: str) -> None:
    with pytest.raises(InputError, match=word):
        probe(llama(max_position_embeddings=64), **settings)


def test_probe_refuses_a_model_whose_attention_it_cannot_take_over(monkeypatch: pytest.MonkeyPatch) -> None:
    model = llama()
    monkeypatch.setattr(type(model), "_can_set_attn_implementation", classmethod(lambda cls: False))
    with pytest.raises(ModelError, match="LlamaForCausalLM"):
        probe(model, tokens=4, copies=2)
    assert model.config._attn_implementation == "sdpa"


def test_probe_reads_models_of_other_shapes() -> None:
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=50, n_positions=64, n_embd=24, n_layer=2, n_head=3))
    got = probe(model, seeds=(0,))
    assert got.heads == (3, 3)
    assert got.tokens == 16  # its BOS, 50256, is outside of this vocabulary
    assert all(0 < x < 1 for row in got.echo + got.induction for x in row)


# ------------------------------------------------------------------ saved scores


def table() -> HeadScores:
    return HeadScores(
        echo=((0.25, 1 / 3), (0.1, 0.0)),
        induction=((0.5, 0.125), (1e-9, 1.0)),
        skipped=(1,),
        model="tiny",
        model_type="llama",
        tokens=9,
        copies=3,
        seeds=(5, 6),
    )


def test_saved_scores_come_back_as_they_were(tmp_path: Path) -> None:
    path = tmp_path / "heads.json"
    table().save(path)
    assert HeadScores.load(path) == table()
    assert HeadScores.load(str(path)) == table()
    assert [p.name for p in tmp_path.iterdir()] == ["heads.json"]
    probed = probe(llama(), tokens=4, copies=2, seeds=(0,))
    probed.save(path)
    assert HeadScores.load(path) == probed


def test_scores_may_be_tensors_or_lists() -> None:
    echo = torch.rand(2, 3)
    made = HeadScores(echo=echo, induction=echo.tolist())  # type: ignore[arg-type]
    assert made.echo == made.induction
    assert isinstance(made.echo[0][0], float)


def test_every_truncation_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "heads.json"
    table().save(path)
    text = path.read_text()
    for cut in range(len(text.rstrip()) - 1):
        path.write_text(text[:cut])
        with pytest.raises(SnapshotError, match=r"heads\.json"):
            HeadScores.load(path)


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"format": "something else"}, "does not hold head scores"),
        ({"version": 2}, "update modicum"),
        ({"version": None}, "version"),
        ({"echo": [[1.0]]}, "shape"),
        ({"echo": [["much", 0.0], [0.0, 0.0]]}, "damaged"),
        ({"echo": [[math.nan, 0.0], [0.0, 0.0]]}, "finite"),
        ({"echo": 3}, "damaged"),
        ({"colour": "red"}, "damaged"),
    ],
)
def test_foreign_newer_and_damaged_files_are_refused(
    tmp_path: Path, change: dict[str, Any], word: str
) -> None:
    path = tmp_path / "heads.json"
    table().save(path)
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(SnapshotError, match=word):
        HeadScores.load(path)


@pytest.mark.parametrize("content", [b"", b"[]", b"3", b"\xff\xfe\x00", b"not json"])
def test_files_that_are_no_scores_are_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "heads.json"
    path.write_bytes(content)
    with pytest.raises(SnapshotError, match=r"heads\.json"):
        HeadScores.load(path)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(SnapshotError, match="nowhere"):
        HeadScores.load(tmp_path / "nowhere.json")


def test_scores_of_another_model_are_refused() -> None:
    table().check([2, 2])
    with pytest.raises(SnapshotError, match="tiny"):
        table().check([2, 2, 2])
    with pytest.raises(InputError, match="shape"):
        HeadScores(echo=((0.1,),), induction=((0.1, 0.2),))


def test_a_models_folder_does_not_enter_the_file() -> None:
    model = llama()
    for given, shown in (("/some/where/model", "model"), ("org/model", "org/model")):
        model.config._name_or_path = model.name_or_path = given
        assert probe(model, tokens=3, copies=2, seeds=(0,)).model == shown
