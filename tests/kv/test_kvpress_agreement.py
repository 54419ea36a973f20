"""What modicum keeps of a small random layer, beside what kvpress 0.5.5 kept of the same one.

The inputs and kvpress' choices are recorded in tests/data/kvpress_kept.json by benchmarks/agree_fixture.py.
Where a rule of ours differs on purpose, the press was recorded twice: as it is, and with that rule changed to
ours. docs/peers.md has the same comparison on whole models.
"""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import modicum
from modicum.kv.bank import Setting
from modicum.kv.layer import BudgetLayer
from modicum.kv.layer_shape import LayerShape
from modicum.kv.shared import Shared

RECORDED: dict[str, Any] = json.loads(
    (Path(__file__).parent.parent / "data" / "kvpress_kept.json").read_text(encoding="utf-8")
)
WINDOW: int = RECORDED["window"]
KEYS = torch.tensor(RECORDED["keys"])  # [H, n, D]
VALUES = torch.tensor(RECORDED["values"])
QUERIES = torch.tensor(RECORDED["queries"])  # [H·G, n, D]
HEADS, TOKENS, DIM = KEYS.shape
BUDGETS = [int(budget) for budget in RECORDED["kept"]["keydiff"]]
EDGES = {0, 1, TOKENS - WINDOW - 2, TOKENS - WINDOW - 1}
"""Tokens whose neighbourhood of five is cut off: at the start, and before the window."""


def kept(policy: str, budget: int, n_sink: int = 0) -> list[set[int]]:
    """Positions that each head holds after a one-shot prefill under our engine."""
    limits = modicum.Budget(tokens=budget, chunk=TOKENS, n_sink=n_sink, recent=0)
    shape = LayerShape(HEADS, len(QUERIES) // HEADS, DIM, DIM, None)
    setting = Setting(modicum.parse_policy(policy), limits, 0, 1)
    layer = BudgetLayer(setting, shape, [budget] * HEADS, [False] * HEADS, Shared(None))
    layer.update(KEYS[None], VALUES[None])
    module = SimpleNamespace(o_proj=SimpleNamespace(weight=torch.tensor(RECORDED["output"][0])))
    layer.attend(module, QUERIES[None], None, DIM**-0.5, None)  # type: ignore[arg-type]  # a stand-in
    return [set(at[at >= 0].tolist()) for at in layer.positions[0]]


def recorded(press: str, budget: int) -> list[set[int]]:
    return [set(head) for head in RECORDED["kept"][press][str(budget)]]


@pytest.mark.parametrize("budget", BUDGETS)
@pytest.mark.parametrize(
    ("policy", "press", "n_sink"),
    [
        ("keydiff", "keydiff", 0),
        ("knorm", "knorm", 0),
        ("tova", "tova", 0),
        ("streamingllm", "streamingllm", 4),
        (f"snapkv(window={WINDOW})", "snapkv-edges", 0),
        (f"adakv+snapkv(window={WINDOW})", "adakv+snapkv-edges", 0),
        (f"criticalkv+snapkv(window={WINDOW})", "criticalkv+snapkv-summed", 0),
        ("h2o", "observed-summed", 0),
        # Compactor's attention; its leverage is sketched at random there, so that it is nowhere the same
        (f"compactor(window={WINDOW}, block=16, blending=0)", "noncausal-windowed", 0),
    ],
)
def test_keeps_what_kvpress_keeps(policy: str, press: str, n_sink: int, budget: int) -> None:
    assert kept(policy, budget, n_sink) == recorded(press, budget)


@pytest.mark.parametrize("budget", BUDGETS)
@pytest.mark.parametrize("wrapper", ["", "adakv+"])
def test_snapkv_differs_from_kvpress_as_it_is_by_its_edges_only(wrapper: str, budget: int) -> None:
    ours = kept(f"{wrapper}snapkv(window={WINDOW})", budget)
    theirs = recorded(f"{wrapper}snapkv", budget)
    # kvpress averages zeros in at the edges, modicum does not: what only modicum keeps is one of those tokens
    assert set().union(*(a - b for a, b in zip(ours, theirs, strict=True))) <= EDGES


def test_the_edges_make_a_difference_somewhere() -> None:
    for press in ("snapkv", "adakv+snapkv"):
        assert RECORDED["kept"][press] != RECORDED["kept"][f"{press}-edges"]


@pytest.mark.parametrize("budget", BUDGETS)
def test_h2o_keeps_more_old_tokens_than_the_mean_over_queries(budget: int) -> None:
    ours, theirs = kept("h2o", budget), recorded("observed", budget)
    # kvpress divides by the queries that saw a token, which raises the later ones
    assert ours != theirs
    assert sum(map(sum, ours)) < sum(map(sum, theirs))


def pyramid(case: dict[str, Any]) -> list[int]:
    """Our layer budgets, with the β that gives the last layer as much as kvpress' β does.

    Theirs falls to budget/β with the window in it, ours to (budget - window)/β beside it.
    """
    beta = (case["budget"] - WINDOW) / (case["budget"] / case["beta"] - WINDOW)
    policy = modicum.parse_policy(f"pyramidkv(base=snapkv(window={WINDOW}), beta={beta})")
    return policy.layer_budgets(case["budget"], len(case["layers"]), WINDOW)


@pytest.mark.parametrize("case", RECORDED["pyramid"], ids=lambda case: f"budget {case['budget']}")
def test_pyramidkv_has_kvpress_layers_but_for_the_bound_by_the_prompt(case: dict[str, Any]) -> None:
    ours, theirs = pyramid(case), case["layers"]
    bounded = theirs[0] == TOKENS - WINDOW  # kvpress knows the prompt's length, modicum goes without
    assert (ours == theirs) != bounded
    assert sum(ours) == sum(theirs)


def test_the_prompt_bounds_one_of_the_recorded_pyramids() -> None:
    assert [case["layers"][0] == TOKENS - WINDOW for case in RECORDED["pyramid"]] == [False, False, True]
