"""Probes: divergences from the reference, beside plain loops in float64."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

import modicum
from modicum.errors import InputError
from modicum.fit.probe import Errors, Probes, windows
from modicum.kv.budget import Budget
from modicum.kv.cache import BudgetCache
from tests.fit.fitting import tiny

LENGTH = 48


@pytest.fixture(scope="module")
def probes() -> tuple[Any, Any, Probes]:
    model, tokenizer = tiny()
    ids = tokenizer(modicum.sample_text()[:4000], add_special_tokens=False)["input_ids"]
    return model, tokenizer, Probes(model, tokenizer, windows(ids, 2, LENGTH), "", None)


def test_the_reference_has_no_error(probes: tuple[Any, Any, Probes]) -> None:
    model, _, made = probes
    errors = made.measure(model)
    # The reference is kept in 16 bits: log-probabilities of up to 16 have errors of up to 2**-8, and the mean
    # of log-probabilities' errors bounds the divergence.
    assert abs(errors.text) <= 2**-7
    assert (errors.answers, errors.kept) == (0.0, 1.0)


def test_a_divergence_is_that_of_plain_loops(probes: tuple[Any, Any, Probes]) -> None:
    model, _, made = probes
    changed, _ = tiny()
    with torch.no_grad():
        changed.model.layers[1].mlp.up_proj.weight.mul_(0.5)
    total, count = 0.0, 0
    for item in made.items:
        ids = torch.cat([item.context, item.tails[0].ids])[None]
        with torch.no_grad():
            p, q = (one(ids).logits[0].double().log_softmax(-1) for one in (model, changed))
        for place in range(len(item.context), ids.shape[1] - 1):
            for a, b in zip(p[place].tolist(), q[place].tolist(), strict=True):
                total += math.exp(a) * (a - b)
            count += 1
    assert total / count > 0.05
    assert made.measure(changed).text == pytest.approx(total / count, abs=2**-7)


def test_a_smaller_cache_has_an_error_and_a_whole_one_none(probes: tuple[Any, Any, Probes]) -> None:
    model, _, made = probes

    def caches(tokens: int) -> Any:
        budget = Budget(tokens=tokens, n_sink=1, recent=2)
        return lambda length: BudgetCache(model, "streamingllm", budget, length=length)

    assert abs(made.measure(model, caches(2 * LENGTH)).text) <= 2**-7
    assert made.measure(model, caches(4)).text > 2**-6


def test_windows_are_spread_over_the_text() -> None:
    assert windows(range(10), 3, 4).tolist() == [[0, 1, 2, 3], [3, 4, 5, 6], [6, 7, 8, 9]]
    assert windows(range(10), 1, 4).tolist() == [[0, 1, 2, 3]]
    with pytest.raises(InputError, match="the text has 3 tokens"):
        windows(range(3), 1, 4)


def test_a_task_that_asks_nothing_is_refused(probes: tuple[Any, Any, Probes]) -> None:
    model, tokenizer, _ = probes
    with pytest.raises(InputError, match="asks no questions"):
        Probes(model, tokenizer, torch.zeros(1, LENGTH, dtype=torch.int64), "text", None)


def test_a_loss_weighs_text_and_answers() -> None:
    assert Errors(0.2, 0.6, 1.0).loss(0.25) == pytest.approx(0.3)
    assert "nsr" not in Errors(0.2, 0.6, 1.0).to_dict()
    assert Errors(**Errors(0.2, 0.6, 1.0, 0.5).to_dict()) == Errors(0.2, 0.6, 1.0, 0.5)
