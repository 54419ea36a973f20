"""Prefill and decode, measured in turns: transformers' cache, a policy, transformers' cache, the next."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from machine import copy_bandwidth
from subject import PRIME, Settings, Stored, as_text, budgeted, decode, one_shot, random_ids, without_a_past
from transformers import PreTrainedModel

import modicum

BARE = "chunks without a past"
_GROUP = 5  # policies measured after one look at the long full cache

Sample = dict[str, Any]
Tell = Callable[[str], None]
"""Called after each piece of work with what it was."""


def prefill_rounds(settings: Settings) -> list[tuple[str, ...]]:
    """Who is prefilled after each one-shot prefill: all policies once, then the first one alone."""
    groups = [tuple(group) for group in _groups(settings.policies)]
    return groups + [(PRIME,)] * max(0, settings.repeats // 3)


def decode_groups(settings: Settings) -> list[tuple[str, ...]]:
    """Who decodes after each block of the long full cache: the policy with targets every time."""
    others = [policy for policy in settings.policies if policy != PRIME]
    return [(PRIME, *group) for group in _groups(others)] or [(PRIME,)]


def prefills(
    model: PreTrainedModel, settings: Settings, tell: Tell
) -> tuple[list[Sample], Stored, dict[str, modicum.BudgetCache]]:
    """Samples of prefill seconds, the full cache, and each policy's cache of the same prompt."""
    ids = random_ids(settings.tokens, settings.seed)
    text = as_text(ids)
    warm = ids[:, : 2 * settings.chunk]
    one_shot(model, warm)
    budgeted(model, as_text(warm), PRIME, settings)
    samples: list[Sample] = []
    caches: dict[str, modicum.BudgetCache] = {}
    stored: Stored | None = None
    for group in prefill_rounds(settings):
        gc.collect()
        reference, full = one_shot(model, ids)
        tell("prefill: DynamicCache")
        stored = stored or Stored(full)
        del full
        bare = without_a_past(model, ids, settings.chunk)
        samples.append({"policy": BARE, "seconds": bare, "one_shot": reference})
        for policy in group:
            gc.collect()
            seconds, caches[policy] = budgeted(model, text, policy, settings)
            samples.append({"policy": policy, "seconds": seconds, "one_shot": reference})
            tell(f"prefill: {policy}")
    assert stored is not None
    return samples, stored, caches


def decodes(
    model: PreTrainedModel,
    settings: Settings,
    stored: Stored,
    caches: dict[str, modicum.BudgetCache],
    tell: Tell,
) -> tuple[list[Sample], list[float]]:
    """Samples of decode seconds per token, and of the copy bandwidth; the first round is a warm-up."""
    samples: list[Sample] = []
    copies: list[float] = []
    ids = random_ids(settings.block, settings.seed + 1)

    def full(length: int) -> float:
        # Half a block shorter, so that the length is right on average while it grows.
        cache = stored.cache(max(1, length - settings.block // 2))
        modicum.detach(model)
        seconds = decode(model, cache, ids)
        modicum.attach(model)
        return seconds

    for number in range(settings.repeats + 1):
        found: list[Sample] = []
        for group in decode_groups(settings):
            long = full(settings.tokens)
            for policy in group:
                short = full(settings.budget)
                seconds = decode(model, caches[policy], ids)
                found.append(
                    {"policy": policy, "round": number, "seconds": seconds, "full": long, "short": short}
                )
                tell(f"decode, round {number}: {policy}")
        if number:
            samples += found
            copies.append(copy_bandwidth())
    return samples, copies


def _groups(policies: Sequence[str]) -> Iterator[Sequence[str]]:
    return (policies[i : i + _GROUP] for i in range(0, len(policies), _GROUP))
