"""TokenRegression: the fit against plain normal equations, its file, its policy, and what is refused."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

import modicum
from modicum import BudgetCache, HeadProfile, InputError, ModelError, PolicyError, SnapshotError
from modicum.kv import calibration, head_store, token_regression
from modicum.kv.layer_shape import LayerShape
from modicum.kv.regression_sums import RegressionSums
from modicum.kv.rotary import turning_of
from modicum.kv.shape import Shape
from modicum.kv.token_regression import RIDGE, TokenRegression, TokenScorer, features
from modicum.texts import sample_text
from tests import zoo
from tests.bounds import assert_within, dot_bound, gamma
from tests.driver import budget_layers, feed
from tests.kv.profiles import give_profile, random_regression
from tests.kv.test_calibration import largest
from tests.tiny_model import TINY_MODEL


@pytest.fixture(autouse=True)
def cache_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("MODICUM_CACHE", str(tmp_path))
    return tmp_path


def seen_by_hooks(model: Any, piece: list[int]) -> tuple[list[Tensor], list[Tensor]]:
    """Per layer x [n, F] of the projections' outputs and y [n, H] of `largest`, but for four first tokens."""
    config, n = model.config, len(piece)
    heads, kept, hooks = config.num_key_value_heads, {}, []
    for i, layer in enumerate(model.model.layers):
        for name in ("k_proj", "v_proj"):

            def note(_: Any, __: Any, out: Tensor, at: tuple[int, str] = (i, name)) -> None:
                kept[at] = out[0, :n]

            hooks.append(getattr(layer.self_attn, name).register_forward_hook(note))
    with torch.no_grad():
        model(torch.tensor([piece + piece[1:]]))
    for hook in hooks:
        hook.remove()
    best = largest(model, piece)
    xs, ys = [], []
    for i in range(config.num_hidden_layers):
        xs.append(with_norms(torch.cat([kept[i, "k_proj"], kept[i, "v_proj"]], dim=1)[4:], 2 * heads))
        y = torch.zeros(n - 4, heads, dtype=torch.float64)
        for j in range(4, n):
            for head in range(heads):
                y[j - 4, head] = math.log(best[i, head, j] + 1e-6)
        ys.append(y)
    return xs, ys


def with_norms(x: Tensor, count: int) -> Tensor:
    """x [n, count·D] and the L2 norm of each of its `count` vectors a row."""
    vectors = x.reshape(len(x), count, -1)
    norms = [[math.sqrt(sum(float(a) ** 2 for a in vector)) for vector in row] for row in vectors]
    return torch.cat([x, torch.tensor(norms, dtype=x.dtype)], dim=1)


def test_the_fit_is_that_of_the_normal_equations() -> None:
    model, tokenizer = modicum.load(TINY_MODEL, dtype="float64")
    texts = [sample_text()[:150], sample_text()[500:640]]
    profile = modicum.calibrate(model, tokenizer, texts, tokens=40)
    found = profile.regression
    assert found is not None
    assert found.is_unrotated
    pieces = calibration._pieces(tokenizer, texts, 40, 8)
    seen = [seen_by_hooks(model, piece) for piece in pieces]
    for layer in range(model.config.num_hidden_layers):
        x = torch.cat([xs[layer] for xs, _ in seen])
        y = torch.cat([ys[layer] for _, ys in seen])
        x0, y0 = x - x.mean(0), y - y.mean(0)
        gram = x0.T @ x0
        gram += RIDGE * gram.diagonal().mean() * torch.eye(len(gram), dtype=torch.float64)
        weight = torch.linalg.solve(gram, x0.T @ y0)
        wanted = x @ weight + y.mean(0) - x.mean(0) @ weight
        got = x @ found.weights[layer].double() + found.intercepts[layer].double()
        # Weights are rounded to half precision: 2^-11 of each term, and of none below 2^-24.
        error = x0.abs() @ (weight.abs() * 2**-11 + 2**-24)
        assert bool(((got - wanted).abs() <= 1.01 * error + 1e-6).all())
        assert torch.allclose(got.mean(0), y.mean(0), atol=1e-6)  # the rounding moves no mean


def test_scores_of_a_cache_are_the_regression_of_projections_whatever_the_positions() -> None:
    """In a cache that starts a text, and one that comes to the same tokens later by way of padding."""
    model, ids = zoo.build("llama"), zoo.tokens(1, 30)
    regression = give_profile(model).regression
    assert regression is not None
    kept: dict[tuple[int, str], Tensor] = {}
    hooks = [
        getattr(layer.self_attn, name).register_forward_hook(
            lambda _, __, out, at=(i, name): kept.__setitem__(at, out[0])
        )
        for i, layer in enumerate(model.model.layers)
        for name in ("k_proj", "v_proj")
    ]
    cache = BudgetCache(model, "learned", 64)
    feed(model, cache, ids)
    for hook in hooks:
        hook.remove()
    for i, layer in budget_layers(cache):
        x = torch.cat([kept[i, "k_proj"], kept[i, "v_proj"]], dim=1).double()
        x = with_norms(x, 2 * model.config.num_key_value_heads)
        wanted = x @ regression.weights[i].double() + regression.intercepts[i].double()
        arena = layer.banks[0].arena
        order = arena.positions[0, 0, :30].argsort()
        size = float(x.abs().max() * regression.weights[i].abs().max())
        assert torch.allclose(arena.state[0, :, :30, 0][:, order].double(), wanted.T, atol=1e-5 * size)


def test_keys_are_turned_back_and_other_keys_are_taken_as_they_are() -> None:
    model = zoo.shared("llama")
    shape = Shape.of(model).layers[0]
    regression = random_regression(model)
    assert regression is not None
    rng = torch.Generator().manual_seed(0)
    keys, values = (torch.randn(2, shape.kv_heads, 5, shape.key_dim, generator=rng) for _ in range(2))
    plain = TokenScorer(regression, None).scores(0, keys, values, None)
    turning, at = turning_of(model), torch.arange(100, 105)[None]
    turned = turning.to(keys, at[:, None], 200)
    again = TokenScorer(regression, turning).scores(0, turned, values, at)
    assert torch.allclose(again, plain, atol=1e-3)
    assert not torch.allclose(TokenScorer(regression, None).scores(0, turned, values, at), plain, atol=1.0)
    wanted = features(keys, values)[1, 3] @ regression.weights[0].float() + regression.intercepts[0]
    assert torch.allclose(plain[1, :, 3], wanted, atol=1e-4)


@pytest.mark.parametrize("rows", [1, 3])
def test_layers_in_one_go_are_layers_one_by_one(rows: int) -> None:
    model = zoo.shared("llama")
    shape = Shape.of(model).layers[0]
    regression = random_regression(model)
    assert regression is not None
    layers = tuple(sorted(regression.weights))
    assert len(layers) > 1
    rng = torch.Generator().manual_seed(1)
    sizes = (len(layers), rows, shape.kv_heads, 1)
    keys, values = (torch.randn(*sizes, d, generator=rng) for d in (shape.key_dim, shape.value_dim))
    at = torch.arange(100, 100 + rows)[:, None]
    found = TokenScorer(regression, turning_of(model)).scores_of(layers, keys.unbind(), values.unbind(), at)
    assert found.shape == sizes
    for number, layer in enumerate(layers):
        alone = TokenScorer(regression, turning_of(model)).scores(layer, keys[number], values[number], at)
        weight = regression.weights[layer].double()
        # Turned back, a key is as long as it was; features are keys, values and their norms.
        size = 2 * (keys[number].norm() + values[number].norm()) * weight.norm(dim=0).max()
        turned = gamma(20, torch.float32) * size
        assert_within(
            found[number], alone.double(), 2 * dot_bound(len(weight), torch.float32, size, 1.0) + turned
        )


def test_a_profile_keeps_it_in_its_file_and_files_without_it_load(tmp_path: Path) -> None:
    model = zoo.build("gemma2")
    profile = give_profile(model)
    path = tmp_path / "p.safetensors"
    profile.save(path)
    found = HeadProfile.load(path)
    assert found.regression == profile.regression
    assert found.regression is not None
    assert found.regression.checksum == give_profile(model).regression.checksum  # type: ignore[union-attr]
    assert set(found.regression.weights) == set(Shape.of(model).full) == {1, 2}
    with safe_open(path, framework="pt") as file:
        header = json.loads(file.metadata()["modicum"])
    shares = load_file(path)["shares"]
    del header["regression"]
    old = tmp_path / "old.safetensors"
    save_file({"shares": shares}, old, metadata={"modicum": json.dumps(header | {"version": 1})})
    assert replace(HeadProfile.load(path), regression=None) == HeadProfile.load(old)
    broken = {name: x for name, x in load_file(path).items() if name != "regression.intercept.2"}
    header["regression"] = {"is_unrotated": True}
    save_file(broken, path, metadata={"modicum": json.dumps(header)})
    with pytest.raises(SnapshotError, match="is damaged"):
        HeadProfile.load(path)


def test_a_profile_in_a_file_brings_its_regression_along(tmp_path: Path) -> None:
    model, ids = zoo.build("llama"), zoo.tokens(1, 60)
    profile = give_profile(model)
    profile.save(tmp_path / "p.safetensors")
    fresh = zoo.build("llama")  # no profile is known for it
    policy = modicum.Calibrated(modicum.Learned(), profile=str(tmp_path / "p.safetensors"))
    cache = BudgetCache(fresh, policy, 24, n_sink=2, recent=4, chunk=8)
    feed(fresh, cache, ids)
    known = BudgetCache(model, "calibrated+learned", 24, n_sink=2, recent=4, chunk=8)
    feed(model, known, ids)
    assert all(torch.equal(cache.positions(i), known.positions(i)) for i in range(2))
    cache.save(tmp_path / "saved")
    assert BudgetCache.load(tmp_path / "saved", zoo.build("llama")).seen == 60


def test_equal_means_the_same_numbers() -> None:
    model = zoo.shared("llama")
    one, other = random_regression(model), random_regression(model, seed=1)
    assert one is not None
    assert one == random_regression(model)
    assert one != other
    assert one != replace(one, is_unrotated=False)
    assert one != "a regression"


# -- what is refused -----------------------------------------------------------------------------------


def test_without_a_calibration_it_says_what_to_run() -> None:
    model = zoo.build("llama")
    with pytest.raises(PolicyError, match=r"none of these weights: .*modicum calibrate MODEL"):
        BudgetCache(model, "learned", 64)
    head_store.use_profile(model, replace(give_profile(model), regression=None))
    for policy in ("learned", "adakv+learned", "calibrated+learned", "razor(learned)"):
        with pytest.raises(PolicyError, match=r"there is one without it: .*modicum calibrate MODEL"):
            BudgetCache(model, policy, 64)
    BudgetCache(model, "calibrated+keydiff", 64)


def test_a_regression_of_another_model_is_refused() -> None:
    model = zoo.build("llama")
    profile = give_profile(model)
    assert profile.regression is not None
    weights, intercepts = profile.regression.weights, profile.regression.intercepts
    short = TokenRegression({0: weights[0]}, {0: intercepts[0]}, True)
    head_store.use_profile(model, replace(profile, regression=short))
    with pytest.raises(ModelError, match="layer 1 of LlamaForCausalLM has no regression"):
        BudgetCache(model, "learned", 64)
    narrow = TokenRegression({i: w[1:] for i, w in weights.items()}, intercepts, True)
    head_store.use_profile(model, replace(profile, regression=narrow))
    with pytest.raises(ModelError, match=r"one of shape \(67, 2\) and not \(68, 2\)"):
        BudgetCache(model, "learned", 64)


@pytest.mark.parametrize(
    ("weights", "intercepts", "says"),
    [
        ({0: torch.zeros(4, 2)}, {}, "not every layer"),
        ({0: torch.zeros(4, 2)}, {0: torch.zeros(3)}, "layer 0 do not fit"),
        ({0: torch.full((4, 2), math.nan)}, {0: torch.zeros(2)}, "not finite"),
    ],
)
def test_tensors_that_do_not_fit_are_refused(weights: Any, intercepts: Any, says: str) -> None:
    with pytest.raises(InputError, match=says):
        TokenRegression(weights, intercepts, True)


def test_a_model_with_too_many_heads_gets_none(monkeypatch: pytest.MonkeyPatch) -> None:
    layers = [LayerShape(32, 1, 128, 128, None)] * 32
    assert RegressionSums(layers).solve(True) is None
    assert "too many KV heads" in token_regression.too_large(layers)
    assert token_regression.too_large([LayerShape(8, 4, 128, 128, None)] * 32) == ""
    monkeypatch.setattr(token_regression, "_MOST_NBYTES", 1000)
    model, tokenizer = modicum.load(TINY_MODEL)
    assert modicum.calibrate(model, tokenizer, tokens=40, most_texts=1).regression is None
    with pytest.raises(PolicyError, match="too many KV heads for one"):
        BudgetCache(model, "learned", 64)


def test_latents_are_refused_by_name() -> None:
    latent = LayerShape(1, 4, 24, 16, None, is_latent=True)
    assert RegressionSums([latent]).solve(True) is None
    regression = TokenRegression({}, {}, True)
    with pytest.raises(
        ModelError, match="layer 0 of Some has no regression of token scores: it keeps latents"
    ):
        regression.check([latent], "Some")


def test_a_saved_cache_is_refused_after_another_calibration(tmp_path: Path) -> None:
    model, ids = zoo.build("llama"), zoo.tokens(1, 50)
    give_profile(model)
    cache = BudgetCache(model, "learned", 24, n_sink=2, recent=4, chunk=8)
    feed(model, cache, ids)
    cache.save(tmp_path / "saved")
    give_profile(model, seed=5)
    with pytest.raises(SnapshotError, match="another calibration"):
        BudgetCache.load(tmp_path / "saved", model)
    give_profile(model)
    assert torch.equal(BudgetCache.load(tmp_path / "saved", model).positions(0), cache.positions(0))
