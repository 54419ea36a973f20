"""A model read through another attention function, for the calls of one context only."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, TypeVar
from weakref import WeakKeyDictionary

import torch
from transformers import PreTrainedModel

from modicum.kv.attention import overriding
from modicum.kv.registration import borrowed

T = TypeVar("T")

_locks: WeakKeyDictionary[PreTrainedModel, threading.RLock] = WeakKeyDictionary()
_guard = threading.Lock()


def model_lock(model: PreTrainedModel) -> threading.RLock:
    """The lock under which this model is read through another attention function."""
    with _guard:
        return _locks.setdefault(model, threading.RLock())


def once(known: WeakKeyDictionary[PreTrainedModel, T], model: PreTrainedModel, find: Callable[[], T]) -> T:
    """What is known of a model; found out by the first thread that asks, the others wait for it."""
    # Without the lock where it is known: so nobody waits for another thread's probe of something else.
    if model not in known:
        with model_lock(model):
            if model not in known:
                known[model] = find()
    return known[model]


@contextmanager
def attention_override(model: PreTrainedModel, function: Callable[..., Any], done: str) -> Iterator[None]:
    """Send the attention of this context's calls of the model to `function`, without a mask.

    Other threads' calls of the model compute what they did. A model in training mode is in evaluation mode
    meanwhile, for other threads too; so do not train it in another thread. Afterwards all is as it was.

    Args:
        model: a model whose attention goes through transformers' attention interface.
        function: as transformers calls attention functions.
        done: what is done to the model, for the error: "probed".

    Raises:
        ModelError: the model's attention cannot be changed so.
    """
    with model_lock(model), borrowed(model, done), overriding(function), uncompiled(model):
        training = [m for m in model.modules() if m.training]
        try:
            if training:
                model.train(False)
            yield
        finally:
            for module in training:
                module.training = True


def uncompiled(model: PreTrainedModel) -> AbstractContextManager[Any]:
    """What the user has compiled of a model runs uncompiled: its graphs do not hold the function."""
    for module in model.modules():
        forward = module.__dict__.get("forward")
        if getattr(module, "_compiled_call_impl", None) is not None or hasattr(
            forward, "_torchdynamo_orig_callable"
        ):
            stance: AbstractContextManager[Any] = torch.compiler.set_stance("force_eager")
            return stance
    return nullcontext()
