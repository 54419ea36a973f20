"""Calibration: what it measures, against plain loops over full attention maps; and what it refuses."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import modicum
from modicum import BudgetCache, InputError, ModelError, PolicyError, SnapshotError
from modicum.kv import calibration, head_store
from modicum.kv.fingerprint import weights_digest
from modicum.texts import sample_text
from tests import zoo
from tests.driver import check_limits, feed
from tests.generation.test_models import Letters
from tests.kv.profiles import give_profile, random_profile
from tests.tiny_model import TINY_MODEL


@pytest.fixture(autouse=True)
def cache_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("MODICUM_CACHE", str(tmp_path))
    return tmp_path


@pytest.fixture
def tiny() -> tuple[Any, Any]:
    return modicum.load(TINY_MODEL, dtype="float64")


def largest(model: Any, piece: list[int]) -> dict[tuple[int, int, int], float]:
    """(layer, KV head, token j) -> score, from whole attention maps: the largest a_ij · ‖W v_j‖ / ‖h_i‖ over
    the queries i of the second reading in the head's group, W of the query head, h_i the input of the layer.
    """
    model.set_attn_implementation("eager")
    config, n = model.config, len(piece)
    group = config.num_attention_heads // config.num_key_value_heads
    size = config.hidden_size // config.num_attention_heads
    values: list[torch.Tensor] = []
    hooks = [
        layer.self_attn.v_proj.register_forward_hook(lambda _, __, out: values.append(out[0]))
        for layer in model.model.layers
    ]
    with torch.no_grad():
        told = model(torch.tensor([piece + piece[1:]]), output_attentions=True, output_hidden_states=True)
    for hook in hooks:
        hook.remove()
    best = {}
    for layer, maps in enumerate(told.attentions):
        output = model.model.layers[layer].self_attn.o_proj.weight.detach()
        stream = told.hidden_states[layer][0].norm(dim=-1).tolist()
        for head in range(config.num_key_value_heads):
            parts = [output[:, h * size : (h + 1) * size] for h in range(head * group, (head + 1) * group)]
            for token in range(4, n):
                value = values[layer][token, head * size : (head + 1) * size]
                norms = [float((part @ value).norm()) for part in parts]
                best[layer, head, token] = max(
                    float(maps[0, head * group + g, query, token]) * norms[g] / stream[query]
                    for g in range(group)
                    for query in range(n, 2 * n - 1)
                )
    return best


def by_loops(model: Any, pieces: list[list[int]], fraction: float) -> list[list[float]]:
    """Shares by the scores of `largest`."""
    layers, heads = model.config.num_hidden_layers, model.config.num_key_value_heads
    sums = [[0.0] * heads for _ in range(layers)]
    for piece in pieces:
        n, best = len(piece), largest(model, piece)
        ordered = sorted(best.values())
        threshold = ordered[min(len(ordered) - 1, int((1 - fraction) * len(ordered)))]
        for (layer, head, _), score in best.items():
            sums[layer][head] += (score >= threshold) / (n - 4) / len(pieces)
    return sums


def test_shares_are_those_of_the_attention_maps(tiny: tuple[Any, Any]) -> None:
    model, tokenizer = tiny
    texts = [sample_text()[:150], sample_text()[500:640]]
    profile = modicum.calibrate(model, tokenizer, texts, tokens=40, fractions=(0.1, 0.5))
    pieces = calibration._pieces(tokenizer, texts, 40, 8)
    assert profile.texts == len(pieces) > 2
    assert profile.tokens == sum(map(len, pieces))
    for f, fraction in enumerate((0.1, 0.5)):
        # In float64, in which no two scores of so few are near each other.
        wanted = by_loops(model, pieces, fraction)
        for found, row in zip(profile.shares[f], wanted, strict=True):
            assert found == pytest.approx(row, abs=1e-9)
        mean = sum(map(sum, profile.shares[f])) / sum(profile.heads)
        assert mean == pytest.approx(fraction, abs=1 / 30)


def test_a_profile_is_kept_and_found_by_the_weights(tiny: tuple[Any, Any], cache_folder: Path) -> None:
    model, tokenizer = tiny
    with pytest.raises(PolicyError, match=r"needs a head profile.*modicum calibrate"):
        BudgetCache(model, "calibrated+keydiff", 64)
    profile = modicum.calibrate(model, tokenizer, tokens=60, most_texts=2)
    files = list(cache_folder.rglob("*.safetensors"))
    assert [file.name for file in files] == [f"{profile.weights}.safetensors"]
    assert BudgetCache(model, "calibrated+keydiff", 64).plan.tokens == 64
    again = modicum.load(TINY_MODEL)[0]  # float32
    found = head_store.find_profile(again)
    assert found is not None
    assert found.weights == weights_digest(again) == profile.weights
    with torch.no_grad():
        again.model.layers[0].self_attn.q_proj.weight.mul_(1.5)
    assert head_store.find_profile(again) is None
    with pytest.raises(SnapshotError, match="other weights"):
        BudgetCache(again, modicum.Calibrated(modicum.KeyDiff(), profile=str(files[0])), 64)
    files[0].write_bytes(b"damaged")
    assert head_store.find_profile(modicum.load(TINY_MODEL)[0]) is None


def test_an_interrupted_calibration_goes_on(
    tiny: tuple[Any, Any], cache_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, tokenizer = tiny
    whole = modicum.calibrate(model, tokenizer, tokens=40, most_texts=4)
    read, true = [], calibration._scores

    def scores(model: Any, piece: list[int], *more: Any) -> Any:
        if len(read) == 2:
            read.append(piece)
            raise KeyboardInterrupt
        read.append(piece)
        return true(model, piece, *more)

    monkeypatch.setattr(calibration, "_scores", scores)
    with pytest.raises(KeyboardInterrupt):
        modicum.calibrate(model, tokenizer, tokens=40, most_texts=4)
    told: list[tuple[int, int]] = []
    again = modicum.calibrate(model, tokenizer, tokens=40, most_texts=4, progress=lambda *at: told.append(at))
    assert len(read) == 3 + 2
    assert told[0] == (2, 4)
    assert told[-1] == (4, 4)
    assert again == whole
    assert len(list(cache_folder.rglob("*.safetensors"))) == 1


@pytest.mark.parametrize(
    ("texts", "says"),
    [
        (["too short"], "too short: give at least one of 32 tokens"),
        ([], "a list of texts"),
        ("a text", "a list of texts"),
        ([b"bytes"], "text 0 is not text"),
        (["a" * 500, "\0" * 500], "text 1 is not text"),
    ],
)
def test_bad_texts_are_refused(tiny: tuple[Any, Any], texts: Any, says: str) -> None:
    with pytest.raises(InputError, match=says):
        modicum.calibrate(*tiny, texts)


def test_pieces_too_short_are_refused(tiny: tuple[Any, Any]) -> None:
    with pytest.raises(InputError, match="pieces of 10 tokens are too short"):
        modicum.calibrate(*tiny, tokens=10)


def test_a_weight_that_is_no_number_names_its_layer(tiny: tuple[Any, Any]) -> None:
    model, tokenizer = tiny
    with torch.no_grad():
        model.model.layers[2].self_attn.q_proj.weight[0, 0] = float("nan")
    with pytest.raises(ModelError, match="layer 2 has attention weights that are no numbers"):
        modicum.calibrate(model, tokenizer, tokens=40, most_texts=1)
    assert model.config._attn_implementation == "sdpa"


@pytest.mark.parametrize("name", ["gemma2", "gemma3", "qwen2-window", "gpt-neox"])
def test_other_families(name: str) -> None:
    model = zoo.build(name)
    profile = modicum.calibrate(model, Letters(), [sample_text()[:400]], tokens=40, most_texts=2)
    cache = BudgetCache(model, "calibrated+keydiff", 24, n_sink=2, recent=4, chunk=8, length=64)
    assert profile.skipped == tuple(i for i, s in enumerate(cache.shape.layers) if not s.is_full)
    feed(model, cache, zoo.tokens(2, 60), cuts=(40, 41, 42))
    check_limits(cache)


# -- the policy -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("policy", "says"),
    [
        ("calibrated", "give it a base"),
        ("calibrated+adakv+keydiff", "divides the budget over heads"),
        ("calibrated+razor", "divides the budget over heads"),
        ("calibrated+pyramidkv+snapkv", "divides the budget over layers"),
        ("calibrated+full", "never evicts"),
        ("caote+calibrated+snapkv", "write it first"),
        ("calibrated(keydiff, fraction=2)", "from 0 to 1"),
        ("calibrated(keydiff, profile=3)", "path of a profile"),
        ("calibrated(keydiff, otherwise=3)", "it is a policy"),
        ("calibrated(keydiff, otherwise=razor(keydiff))", "divides the budget over heads"),
        ("calibrated(keydiff, otherwise=calibrated(keydiff))", "divides the budget over heads"),
    ],
)
def test_what_does_not_go_together_is_refused(policy: str, says: str) -> None:
    with pytest.raises(PolicyError, match=says):
        modicum.parse_policy(policy)


def test_slots_follow_the_length_of_the_text() -> None:
    """The profile is read at budget / length, at the setting, or at 1/8."""
    model = zoo.build("llama")
    profile = give_profile(model)
    full = range(len(profile.heads))

    def slots(policy: str = "calibrated+keydiff", **more: Any) -> list[list[int]]:
        return BudgetCache(model, policy, 40, n_sink=2, recent=4, **more).plan.capacities

    assert slots() == slots(length=320) == profile.capacities(40, 0.125, 6, full)
    assert slots(length=80) == profile.capacities(40, 0.5, 6, full) != slots()
    assert slots("calibrated(keydiff, fraction=0.5)", length=320) == slots(length=80)
    assert slots(length=40) == [[40] * n for n in profile.heads]


def test_a_share_of_the_text_is_a_budget() -> None:
    model = zoo.build("llama")
    cache = BudgetCache(model, "keydiff", "12.5%", length=800)
    assert cache.budget.tokens == cache.plan.tokens == 100
    assert BudgetCache(model, "keydiff", "1%", length=800).plan.tokens == 4 + 32
    with pytest.raises(modicum.BudgetError, match=r"0\.125 of the text needs the text's length"):
        BudgetCache(model, "keydiff", "12.5%")
    with pytest.raises(modicum.BudgetError, match="from '1%' to '100%'"):
        BudgetCache(model, "keydiff", "120%", length=10)
    text = "some words that go on for a while " * 8
    answer = modicum.generate(model, Letters(), text, budget="50%", max_new_tokens=3)
    assert answer.cache.budget.tokens == len(text) // 2


def test_bytes_bound_calibrated_heads_too() -> None:
    model = zoo.build("llama")
    give_profile(model)
    plain = BudgetCache(model, "keydiff", "64KiB", n_sink=2, recent=4)
    cache = BudgetCache(model, "calibrated+keydiff", "64KiB", n_sink=2, recent=4, chunk=16)
    assert len({n for row in cache.plan.capacities for n in row}) > 2
    feed(model, cache, zoo.tokens(1, 300), cuts=(100, 200, 298, 299))
    assert plain.plan.nbytes - plain.plan.nbytes // plain.plan.tokens < cache.plan.nbytes <= 64 * 1024
    check_limits(cache)


def test_otherwise_stands_in_where_a_calibration_has_not_what_is_needed(tmp_path: Path) -> None:
    """As the policy where there is no profile; as the base where there is one without a regression."""
    model, ids = zoo.build("llama"), zoo.tokens(1, 60)

    def chosen(text: str) -> str:
        cache = BudgetCache(model, text, 20, n_sink=2, recent=4, chunk=16)
        feed(model, cache, ids)
        cache.save(tmp_path / "saved")
        assert str(BudgetCache.load(tmp_path / "saved", model).policy) == str(cache.policy)
        return str(cache.policy)

    assert chosen("calibrated(learned, otherwise=knorm)") == "knorm"
    assert chosen("calibrated(keydiff, otherwise=knorm)") == "knorm"
    assert chosen("auto") == "keydiff(metric='l2')"
    profile = give_profile(model)
    assert chosen("calibrated(learned, otherwise=knorm)") == "calibrated(learned)"
    assert chosen("auto(fraction=0.5)") == "calibrated(learned, fraction=0.5)"
    head_store.use_profile(model, replace(profile, regression=None))
    assert chosen("calibrated(learned, otherwise=snapkv(window=4))") == "calibrated(snapkv(window=4))"
    assert chosen("calibrated(keydiff, otherwise=knorm)") == "calibrated(keydiff)"
    profile.save(tmp_path / "own")
    whole = modicum.Calibrated(modicum.Learned(), profile=str(tmp_path / "own"), otherwise=modicum.Knorm())
    assert isinstance(BudgetCache(model, whole, 20, n_sink=2, recent=4).policy, modicum.Calibrated)


def test_a_saved_cache_keeps_its_slots_whatever_the_profile_is_by_now(tmp_path: Path) -> None:
    model, ids = zoo.build("llama"), zoo.tokens(1, 90)
    give_profile(model)
    for budget in (20, "32KiB"):
        cache = BudgetCache(model, "calibrated+keydiff", budget, n_sink=2, recent=4, chunk=16, length=80)
        feed(model, cache, ids[:, :80])
        cache.save(tmp_path / "saved")
        head_store.use_profile(model, random_profile(model, seed=9))
        loaded = BudgetCache.load(tmp_path / "saved", model)
        assert loaded.plan == cache.plan
        assert torch.equal(feed(model, loaded, ids, start=80), feed(model, cache, ids, start=80))
        give_profile(model)
