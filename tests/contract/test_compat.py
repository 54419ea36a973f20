"""The name of the cache's argument, for every way in which a model can be given."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from transformers import LlamaForCausalLM, PreTrainedModel

import modicum
from modicum.compat import cache_argument, cache_kwargs
from tests import zoo
from tests.driver import all_kept, feed
from tests.generation.test_models import Letters

RELEASE = tuple(int(part) for part in transformers.__version__.split(".")[:2])
NAME = "cache" if RELEASE >= (5, 24) else "past_key_values"
OTHER = "past_key_values" if NAME == "cache" else "cache"
SMALL = {"n_sink": 2, "recent": 4}


class Wrapped(nn.Module):
    """Passes everything on, and says nothing of what it takes."""

    def __init__(self, model: PreTrainedModel, place: str) -> None:
        super().__init__()
        setattr(self, place, model)
        self.place = place

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return getattr(self, self.place)(*args, **kwargs)


def renamed(name: str) -> PreTrainedModel:
    """A Llama whose own code calls the argument `name`, as a repository with remote code may."""

    class Llama(LlamaForCausalLM):  # type: ignore[misc]
        if name == "cache":

            def forward(self, input_ids: Tensor, *, cache: Any = None, **more: Any) -> Any:
                return super().forward(input_ids, **{NAME: cache}, **more)
        else:

            def forward(self, input_ids: Tensor, *, past_key_values: Any = None, **more: Any) -> Any:
                return super().forward(input_ids, **{NAME: past_key_values}, **more)

    model = zoo.build("llama")
    model.__class__ = Llama
    return model


def hooked(model: PreTrainedModel) -> PreTrainedModel:
    """With a forward of its own, as accelerate's hooks leave it."""
    inner = model.forward
    model.forward = functools.update_wrapper(lambda *args, **kwargs: inner(*args, **kwargs), inner)
    return model


@pytest.mark.parametrize("name", zoo.ALL)
def test_models_have_the_name_of_their_release(name: str) -> None:
    model = zoo.shared(name)
    assert cache_argument(model) == cache_argument(model.base_model) == cache_argument(model.generate) == NAME


@pytest.mark.parametrize(
    "wrap",
    [
        lambda model: Wrapped(model, "model"),
        lambda model: Wrapped(Wrapped(model, "model"), "base_model"),  # PEFT: its model, its tuner, the model
        lambda model: Wrapped(model, "_orig_mod"),
        nn.DataParallel,
        torch.compile,
        hooked,
    ],
    ids=["wrapped", "twice", "orig_mod", "DataParallel", "compiled", "hooked"],
)
@pytest.mark.parametrize("inner", ["own", "cache", "past_key_values"])
def test_a_wrapper_has_the_name_of_the_model_inside(wrap: Callable[[Any], Any], inner: str) -> None:
    model, wanted = (zoo.build("llama"), NAME) if inner == "own" else (renamed(inner), inner)
    assert cache_argument(wrap(model)) == wanted


def test_peft_models_have_the_name_of_the_model_inside() -> None:
    peft = pytest.importorskip("peft")
    for kind in ("CAUSAL_LM", None):
        config = peft.LoraConfig(target_modules=["q_proj"], task_type=kind)
        assert cache_argument(peft.get_peft_model(zoo.build("llama"), config)) == NAME


def test_nothing_known_or_both_known_is_the_name_of_the_release() -> None:
    class Bare(nn.Module):
        def forward(self, **kwargs: Any) -> None:
            """Takes anything."""

    class Both(nn.Module):
        def forward(self, past_key_values: Any = None, cache: Any = None) -> None:
            """Takes both."""

    marker = object()
    assert cache_kwargs(Bare(), marker) == cache_kwargs(Both(), marker) == {NAME: marker}
    assert cache_kwargs(lambda **kwargs: None, marker) == {NAME: marker}


@pytest.mark.parametrize("name", ["cache", "past_key_values"])
@pytest.mark.parametrize("compile", [False, pytest.param("auto", marks=pytest.mark.inductor)])
def test_a_model_with_either_name_in_its_own_code_is_served(name: str, compile: Any) -> None:
    text = "the quick brown fox jumps over the lazy dog"
    settings = {"policy": "keydiff", "budget": 24, "max_new_tokens": 6, "compile": compile, **SMALL}
    plain, other = (
        modicum.generate(m, Letters(), text, **settings) for m in (zoo.build("llama"), renamed(name))
    )
    assert plain.seen == other.seen
    assert plain.tokens == other.tokens


def test_the_driver_of_these_tests_feeds_either() -> None:
    kept = []
    for model in (zoo.build("llama"), renamed(OTHER)):
        cache = modicum.BudgetCache(model, "keydiff", 20, chunk=16, **SMALL)
        feed(model, cache, zoo.tokens(1, 30))
        kept.append(all_kept(cache))
    assert kept[0] == kept[1]
