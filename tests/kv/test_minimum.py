"""The minimum that a budget error states is accepted, and one less is not: every policy, both units."""

from __future__ import annotations

import re
from typing import Any

import pytest

from modicum import BudgetCache, BudgetError
from tests import zoo

POLICIES = [
    "keydiff",
    "manifoldkv",
    "knorm",
    "random",
    "streamingllm",
    "tova",
    "h2o",
    "snapkv",
    "ahakv(window=5)",
    "caote+tova",
    "razor",
    "auto",
    "razor(base=snapkv)",
    "razor(compensate=False)",
    "pyramidkv+snapkv(window=9)",
    "adakv+snapkv",
    "criticalkv+snapkv",
    "pyramidkv+adakv+h2o",
    "full",
]
SETTINGS: list[dict[str, int]] = [{}, {"n_sink": 2, "recent": 0}, {"recent": 5, "evict_every": 3}]


@pytest.mark.parametrize("name", ["llama", "gemma3"])
@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("settings", SETTINGS, ids=str)
@pytest.mark.parametrize("unit", ["", "B"])
def test_the_stated_minimum_is_the_minimum(name: str, policy: str, settings: Any, unit: str) -> None:
    model = zoo.shared(name)
    with pytest.raises(BudgetError) as caught:
        BudgetCache(model, policy, f"1{unit}", **settings)
    least = int(re.findall(r"at least (\d+)", str(caught.value))[-1])
    BudgetCache(model, policy, f"{least}{unit}", **settings)
    with pytest.raises(BudgetError, match=rf"at least {least}\b"):
        BudgetCache(model, policy, f"{least - 1}{unit}", **settings)


def test_a_budget_that_rules_no_layer_is_told() -> None:
    model = zoo.shared("mistral-window")
    with pytest.warns(UserWarning, match="every attention layer of MistralForCausalLM has a sliding window"):
        BudgetCache(model, "keydiff", 64)
    with pytest.raises(BudgetError, match=r"its sliding windows take .* at least \d+ bytes"):
        BudgetCache(model, "keydiff", "100B")
