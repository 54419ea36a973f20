"""Models whose weights accelerate keeps in memory or on disk, and models without weights."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaForCausalLM, PreTrainedModel

import modicum
from modicum import BudgetCache, ModelError
from modicum.kv.heads import probe
from modicum.kv.offload import execution_device
from tests import zoo
from tests.driver import feed
from tests.generation.test_models import Letters

accelerate = pytest.importorskip("accelerate")

CPU = torch.device("cpu")


def mixed(model: PreTrainedModel, folder: Path) -> PreTrainedModel:
    """One layer in memory, one on disk, the rest in place."""
    places = {"model.embed_tokens": "cpu", "model.layers.0": "cpu", "model.layers.1": "disk"}
    places |= {"model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "disk"}
    return accelerate.dispatch_model(model, places, main_device="cpu", offload_dir=folder)


OFFLOADS: dict[str, Callable[[PreTrainedModel, Path], PreTrainedModel]] = {
    "memory": lambda model, _: accelerate.cpu_offload(model, execution_device=CPU),
    "disk": lambda model, folder: accelerate.disk_offload(model, folder, execution_device=CPU),
    "mixed": mixed,
}
POLICIES: dict[str, dict[str, Any]] = {
    "keydiff": {},
    "criticalkv+snapkv(window=4)": {},  # reads the output projection
    "razor": {},  # probes the model
    "tova": {"positions": "renumbered", "store": "int4"},
}
SMALL: dict[str, Any] = {"budget": 24, "chunk": 16, "n_sink": 2, "recent": 4}


@pytest.mark.parametrize("kind", OFFLOADS)
def test_an_offloaded_model_says_what_it_says_whole(kind: str, tmp_path: Path) -> None:
    whole, ids, text = zoo.build("llama"), zoo.tokens(1, 40), "words that go on for a while " * 3
    model = OFFLOADS[kind](zoo.build("llama"), tmp_path)
    assert any(p.is_meta for p in model.parameters())
    assert execution_device(model) == CPU
    for policy, more in POLICIES.items():
        want = feed(whole, BudgetCache(whole, policy, **SMALL, **more), ids, cuts=(30, 31, 32))
        cache = BudgetCache(model, policy, **SMALL, **more)
        assert torch.equal(feed(model, cache, ids, cuts=(30, 31, 32)), want), policy
    assert probe(model, tokens=8, copies=2, seeds=(0,)) == probe(whole, tokens=8, copies=2, seeds=(0,))
    settings: dict[str, Any] = {**SMALL, "max_new_tokens": 6}
    answer = modicum.generate(whole, Letters(), text, **settings)
    assert modicum.generate(model, Letters(), text, **settings).tokens == answer.tokens
    with pytest.raises(modicum.PolicyError, match="offloaded"):
        BudgetCache(model, **SMALL, compile=True)
    assert not BudgetCache(model, **SMALL, compile="auto").compiled


@pytest.mark.parametrize("kind", OFFLOADS)
def test_a_saved_cache_goes_to_an_offloaded_model_and_back(kind: str, tmp_path: Path) -> None:
    whole, ids = zoo.build("llama"), zoo.tokens(1, 40)
    model = OFFLOADS[kind](zoo.build("llama"), tmp_path / "weights")
    for source, target in ((whole, model), (model, whole)):
        cache = BudgetCache(source, **SMALL)
        feed(source, cache, ids[:, :30])
        cache.save(tmp_path / "cache")
        loaded = BudgetCache.load(tmp_path / "cache", target)
        assert torch.equal(feed(target, loaded, ids, start=30), feed(source, cache, ids, start=30))


def test_a_model_without_weights_is_refused() -> None:
    with torch.device("meta"):
        model = LlamaForCausalLM(zoo.build("llama").config)
    with pytest.raises(ModelError, match=r"without values: load them.*model\.embed_tokens\.weight"):
        BudgetCache(model, **SMALL)
    with pytest.raises(ModelError, match="without values"):
        probe(model)
