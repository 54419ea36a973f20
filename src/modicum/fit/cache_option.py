"""CacheOption: slots and their form, what they take, and what error they bring."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

from transformers import PreTrainedModel

from modicum.fit.probe import Errors
from modicum.kv.budget import Budget
from modicum.kv.cache import BudgetCache
from modicum.kv.head_store import find_profile
from modicum.kv.plan import fewest, plan
from modicum.kv.store import Store

_STEPS = 8
"""Sizes to choose from for each halving of the slots."""
_FLOOR = 1e-7
"""Errors below are alike: nats."""


@dataclass(frozen=True)
class CacheOption:
    """One choice for the cache.

    Attributes:
        store: form of the slots.
        tokens: slots per KV head on average.
        context: tokens of the text.
    """

    store: str
    tokens: int
    context: int

    @property
    def share(self) -> float:
        """Of the text's tokens."""
        return self.tokens / self.context

    @property
    def name(self) -> str:
        """Such as "int8@0.125"."""
        return f"{self.store}@{self.share:.6g}"

    def at(self, context: int) -> CacheOption:
        """The same share of another text."""
        return replace(self, tokens=round(self.share * context), context=context)


class CacheSizes:
    """What a model's cache takes, for one policy, and which sizes may be chosen.

    A size is measured at the same share of a probe. A cache needs some slots for any text, so that a probe
    cannot show shares below `least` slots of its own tokens: such sizes are not offered.

    Args:
        model: whose head profile is known, where the policy reads one.
        policy: as `BudgetCache` takes it.
        length: tokens of the probes that caches are measured on.
        read: the fewest of them that are read into a cache, as the rest are question or tail.
    """

    def __init__(self, model: PreTrainedModel, policy: str, length: int, read: int) -> None:
        made = BudgetCache(model, policy, Budget(tokens=2**20), length=2**20)
        self.shape, self.policy = made.shape, made.policy
        self._profile = find_profile(model)
        self.least = fewest(self.policy, Budget(tokens=2**20))
        """Slots per KV head that a cache needs."""
        self.length = length
        self._measured = min(length, -(-self.least * length // read))
        """The fewest slots of a text of `length` tokens of which a probe has the same share."""

    def smallest(self, context: int) -> int:
        """The fewest slots per KV head that may be chosen for a text of so many tokens."""
        shown = -(-self._measured * context // self.length)
        return min(context, max(self.least, shown))

    def nbytes(self, option: CacheOption) -> int:
        """Bytes of one sequence between calls: keys, values, positions and what the policy keeps.

        The same as `BudgetCache(...).plan.nbytes`.
        """
        budget = Budget(tokens=option.tokens)
        found = plan(self.shape, self.policy, budget, self._profile, Store(option.store), option.context)
        return found.nbytes

    def full_nbytes(self, context: int) -> int:
        """Bytes of transformers' whole cache of so many tokens."""
        total = 0
        for layer in self.shape.layers:
            held = context if layer.window is None else min(context, layer.window - 1)
            width = layer.key_dim + layer.stored_value_dim
            total += held * layer.kv_heads * width * self.shape.dtype.itemsize + layer.state_nbytes
        return total

    def grid(self, stores: Sequence[str], context: int) -> list[CacheOption]:
        """Sizes to choose from: from all tokens down to the smallest, in equal ratios."""
        sizes, smallest = [], self.smallest(context)
        for step in range(64 * _STEPS):
            tokens = int(context * 2 ** (-step / _STEPS))
            if tokens <= smallest:
                break
            sizes.append(tokens)
        sizes.append(smallest)
        return [CacheOption(store, tokens, context) for store in stores for tokens in dict.fromkeys(sizes)]

    def measured(self, stores: Sequence[str]) -> list[CacheOption]:
        """Where errors are measured: at 1, 1/2, 1/4, … of a probe's tokens, and at the smallest size."""
        sizes, smallest, tokens = [], self.smallest(self.length), self.length
        while tokens > smallest:
            sizes.append(tokens)
            tokens //= 2
        sizes.append(smallest)
        return [CacheOption(store, tokens, self.length) for store in stores for tokens in sizes]


class CacheErrors:
    """Errors of any size of cache, by those that were measured.

    Between two measured shares the logarithm of the error is linear in the logarithm of the share; an error
    never falls as slots go. Below the least share measured it is the error there: `CacheSizes` offers none.
    """

    def __init__(self, measured: Mapping[CacheOption, Errors]) -> None:
        self._curves: dict[str, list[tuple[float, Errors]]] = {}
        for store in dict.fromkeys(option.store for option in measured):
            points = sorted(((o.share, e) for o, e in measured.items() if o.store == store), reverse=True)
            curve: list[tuple[float, Errors]] = []
            for share, errors in points:
                before = curve[-1][1] if curve else errors
                curve.append((share, _at_least(errors, before)))
            self._curves[store] = curve[::-1]

    def of(self, option: CacheOption) -> Errors:
        """The errors at a share of slots."""
        curve = self._curves[option.store]
        share = option.share
        if share <= curve[0][0]:
            return curve[0][1]
        for (low, below), (high, above) in pairwise(curve):
            if share <= high:
                t = math.log(share / low) / math.log(high / low)
                return Errors(
                    _between(below.text, above.text, t),
                    _between(below.answers, above.answers, t),
                    below.kept + t * (above.kept - below.kept),
                )
        return curve[-1][1]


def _at_least(errors: Errors, other: Errors) -> Errors:
    return Errors(
        max(errors.text, other.text, _FLOOR),
        max(errors.answers, other.answers, _FLOOR),
        min(errors.kept, other.kept),
    )


def _between(low: float, high: float, t: float) -> float:
    return math.exp((1 - t) * math.log(low) + t * math.log(high))
