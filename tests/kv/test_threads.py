"""Requests in several threads on one model, beside threads that build caches of every kind."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

import modicum
from modicum import BudgetCache, ModelError
from modicum.kv.attention_override import attention_override
from modicum.kv.heads import probe
from tests import zoo
from tests.driver import full_cache

REQUESTS, THREADS = 200, 8
POLICIES: tuple[dict[str, Any], ...] = (
    {"policy": "keydiff"},
    {"policy": "auto"},
    {"policy": "razor"},
    {"policy": "snapkv(window=4)"},
    {"policy": "adakv+keydiff"},
    {"policy": "keydiff", "positions": "renumbered"},
    {"policy": "auto", "positions": "renumbered"},
)
SMALL = {"budget": 24, "chunk": 16, "n_sink": 2, "recent": 4}


@torch.no_grad()
def answer(model: PreTrainedModel, cache: Any, ids: Tensor, new: int = 6) -> list[int]:
    """Greedy tokens after `ids`, one call for each."""
    found: list[int] = []
    for _ in range(new):
        # Calls by position: the keyword for the cache differs between versions.
        logits = model(ids, None, None, cache).logits
        ids = logits[:, -1:].argmax(-1)
        found.append(int(ids))
    return found


def request(model: PreTrainedModel, number: int) -> list[int]:
    """The tokens of one request: every other one builds a budget cache, the rest use none of ours."""
    ids = zoo.tokens(1, 20 + number % 13, seed=number)
    if number % 2:
        return answer(model, full_cache(model), ids)
    return answer(model, BudgetCache(model, **POLICIES[number // 2 % len(POLICIES)], **SMALL), ids)


def counted(model: PreTrainedModel) -> list[int]:
    """A list that grows by the width of every call of the model's body with more than 100 tokens: a probe."""
    seen: list[int] = []

    def note(_: Any, args: Any, kwargs: dict[str, Any]) -> None:
        ids = kwargs.get("input_ids", args[0] if args else None)
        if ids is not None and ids.shape[1] > 100:
            seen.append(ids.shape[1])

    model.base_model.register_forward_pre_hook(note, with_kwargs=True)
    return seen


def test_requests_in_threads_beside_builders_give_what_they_give_alone() -> None:
    alone = zoo.build("llama")
    want = [request(alone, number) for number in range(REQUESTS)]
    assert len({tuple(tokens) for tokens in want}) > REQUESTS // 2
    model = zoo.build("llama")
    probes = counted(model)
    with ThreadPoolExecutor(THREADS) as pool:
        found = list(pool.map(lambda number: request(model, number), range(REQUESTS)))
    assert found == want
    assert len(probes) == 1  # one probe, of one seed


class Gate:
    """Stops a thread in the middle of a probe until the test lets it go on."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.inside, self.go_on = threading.Event(), threading.Event()
        self.thread: threading.Thread | None = None
        self.hook = model.base_model.layers[1].register_forward_pre_hook(self._stop)

    def _stop(self, *_: Any) -> None:
        if threading.current_thread() is self.thread:
            self.inside.set()
            assert self.go_on.wait(60)

    def run(self, work: Callable[[], Any]) -> list[Any]:
        """Start work in a thread, return when it is in the middle; the list gets its result."""
        result: list[Any] = []
        self.thread = threading.Thread(target=lambda: result.append(work()))
        self.thread.start()
        assert self.inside.wait(60)
        return result

    def finish(self) -> None:
        self.go_on.set()
        assert self.thread is not None
        self.thread.join(60)
        assert not self.thread.is_alive()
        self.hook.remove()


@pytest.mark.parametrize("attached", [False, True])
@pytest.mark.parametrize("kind", [{"policy": "razor"}, {"positions": "renumbered"}], ids=["heads", "rotary"])
def test_a_model_computes_as_ever_while_another_thread_looks_into_it(
    attached: bool, kind: dict[str, Any]
) -> None:
    model, ids = zoo.build("llama"), zoo.tokens(1, 30)
    want = request(zoo.build("llama"), 1)
    with torch.no_grad():
        logits = model(ids).logits
    BudgetCache(model, **SMALL)  # its layers are known from here on
    if not attached:
        modicum.detach(model)
    gate = Gate(model)
    built = gate.run(lambda: BudgetCache(model, **kind, **SMALL))
    try:
        with torch.no_grad():
            assert torch.equal(model(ids).logits, logits)
        assert request(model, 1) == want
        assert request(model, 0) == request(zoo.build("llama"), 0)  # builds a cache: nobody waits for a probe
    finally:
        gate.finish()
    assert isinstance(built[0], BudgetCache)


@pytest.mark.parametrize("meanwhile", ["nothing", "attach", "detach", "both"])
def test_a_probe_leaves_the_model_as_others_want_it(meanwhile: str) -> None:
    model = zoo.build("llama")
    want = probe(zoo.build("llama"), tokens=20, copies=2, seeds=(0,))
    gate = Gate(model)
    scores = gate.run(lambda: probe(model, tokens=20, copies=2, seeds=(0,)))
    try:
        if meanwhile in ("attach", "both"):
            modicum.attach(model)
        if meanwhile in ("detach", "both"):
            modicum.detach(model)  # which must not spoil the probe
    finally:
        gate.finish()
    assert scores == [want]
    assert model.config._attn_implementation == ("modicum_sdpa" if meanwhile == "attach" else "sdpa")


def test_threads_that_fail_leave_the_others_their_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    model, tries = zoo.build("llama"), []

    def fail(*_: Any, **__: Any) -> None:
        tries.append(1)
        raise ModelError("in the middle")

    monkeypatch.setattr("modicum.kv.head_store.probe", fail)
    with ThreadPoolExecutor(4) as pool:
        builds = [pool.submit(BudgetCache, model, "razor", **SMALL) for _ in range(4)]
    assert all(isinstance(build.exception(), ModelError) for build in builds)
    assert len(tries) == 4
    assert model.config._attn_implementation == "sdpa"
    monkeypatch.undo()
    BudgetCache(model, "razor", **SMALL)


def test_an_override_is_of_its_context_and_ends_with_it() -> None:
    model, ids = zoo.build("llama").train(), zoo.tokens(1, 10)
    model.model.layers[1].eval()
    modes = [m.training for m in model.modules()]

    def attention(module: Any, query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> Any:
        return torch.zeros_like(query).transpose(1, 2).contiguous(), None

    want = _without_grad(zoo.build("llama"), ids)

    def read_and_fail() -> None:
        with attention_override(model, attention, "read"):
            assert not model.training
            assert not torch.allclose(_without_grad(model, ids), want, atol=1e-3)
            with ThreadPoolExecutor(1) as pool:
                assert torch.equal(pool.submit(_without_grad, model, ids).result(), want)
            raise RuntimeError("in the middle")

    with pytest.raises(RuntimeError, match="in the middle"):
        read_and_fail()
    assert [m.training for m in model.modules()] == modes
    assert model.config._attn_implementation == "sdpa"
    assert torch.equal(_without_grad(model.eval(), ids), want)


def _without_grad(model: PreTrainedModel, ids: Tensor) -> Tensor:
    with torch.no_grad():
        return model(ids).logits


def test_what_the_user_compiled_is_read_too() -> None:
    model = zoo.build("llama")
    want = probe(model, tokens=10, copies=2, seeds=(0,))
    model.model.compile(backend="eager")
    with torch.no_grad():
        model(zoo.tokens(1, 21))
    assert probe(model, tokens=10, copies=2, seeds=(0,)) == want
