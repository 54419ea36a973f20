"""Plan: a budget turned into slots for every layer and KV head, and into bytes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from modicum.errors import BudgetError, PolicyError, SnapshotError
from modicum.kv.budget import Budget, format_size
from modicum.kv.head_profile import HeadProfile
from modicum.kv.heads import HeadScores
from modicum.kv.layer_shape import LayerShape
from modicum.kv.policies.calibrated import Calibrated
from modicum.kv.policies.razor import RazorAttention
from modicum.kv.policy import Policy
from modicum.kv.shape import Shape
from modicum.kv.store import PLAIN, Store

_POSITION = 4  # bytes of an int32
_FLOAT = 4
_DOUBLE = 8


Heads = HeadScores | HeadProfile | list[list[int]] | None


@dataclass(frozen=True)
class Plan:
    """Slots per budgeted layer and KV head, which heads only stream, and what one sequence costs."""

    capacities: list[list[int]]
    streaming: list[list[bool]]
    nbytes: int

    @property
    def tokens(self) -> int:
        """Slots per KV head on average, rounded down."""
        heads = sum(len(layer) for layer in self.capacities)
        return sum(sum(layer) for layer in self.capacities) // heads if heads else 0


def plan(
    shape: Shape,
    policy: Policy,
    budget: Budget,
    heads: Heads = None,
    store: Store = PLAIN,
    length: int | None = None,
) -> Plan:
    """Work out the slots.

    A budget in bytes gives the most tokens whose plan fits: all layers, newcomers' slots, positions,
    policy state.

    Args:
        heads: what was measured of the model's heads, for policies that need it; or calibrated heads' slots
            [layers][KV heads] as a saved cache has them.
        length: tokens of the text to be read, if known.

    Raises:
        BudgetError: the budget is smaller than what the policy needs; names the minimum for this model.
    """
    if budget.tokens is not None:
        _check_tokens(policy, budget, budget.tokens)
        return _slots(shape, policy, budget, budget.tokens, heads, store, length)
    assert budget.nbytes is not None
    least = fewest(policy, budget)

    def cost(tokens: int) -> Plan:
        return _slots(shape, policy, budget, tokens, heads, store, length)

    smallest = cost(least)
    if smallest.nbytes > budget.nbytes:
        what = f"the {least} tokens per KV head that must stay" if shape.full else "its sliding windows"
        raise BudgetError(
            f"a budget of {format_size(budget.nbytes)} is too small for this model and policy: {what} take "
            f"{format_size(smallest.nbytes)}; give at least {smallest.nbytes} bytes"
        )
    if not shape.full or isinstance(heads, list):
        return smallest
    low, high = least, least + 1
    while cost(high).nbytes <= budget.nbytes:
        low, high = high, high * 2
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if cost(middle).nbytes <= budget.nbytes else (low, middle)
    return cost(low)


def budget_for(policy: Policy, value: Any, **settings: int) -> Budget:
    """`Budget.of`, checked for the policy first, so that an error names the least that the policy accepts.

    Raises:
        BudgetError: a budget that cannot be kept.
    """
    text = isinstance(value, str) and value.strip().isdecimal()
    if text or (isinstance(value, int) and not isinstance(value, bool)):
        tokens = int(value)
        if tokens >= 1:
            _check_tokens(policy, Budget(nbytes=1, **settings), tokens)
    return Budget.of(value, **settings)


def _check_tokens(policy: Policy, budget: Budget, tokens: int) -> None:
    if policy.window > tokens:
        raise BudgetError(
            f"{policy} needs its window of {policy.window} tokens, the budget is {tokens}: give a larger "
            f"budget, at least {fewest(policy, budget)} tokens, or a smaller window"
        )
    budget.check_tokens(
        tokens, policy.window, "", virtual=fewest(policy, budget) > budget.least(policy.window)
    )


def fewest(policy: Policy, budget: Budget) -> int:
    """Slots that a head needs at least: what must stay, and RazorAttention's virtual token."""
    return budget.least(policy.window) + bool(getattr(policy, "compensate", False))


def _window(policy: Policy, budget: Budget) -> int:
    return max(policy.window, budget.recent)


def _slots(
    shape: Shape,
    policy: Policy,
    budget: Budget,
    tokens: int,
    heads: Heads,
    store: Store,
    length: int | None,
) -> Plan:
    full = [shape.layers[i] for i in shape.full]
    least = budget.least(_window(policy, budget))
    if isinstance(policy, RazorAttention):
        if not isinstance(heads, HeadScores):
            raise PolicyError("RazorAttention needs head scores: run modicum.kv.heads.probe(model) first")
        heads.check([layer.kv_heads for layer in shape.layers])
        # Tables of all layers, of which those with a window hold none of these slots; the slack of
        # evict_every must not come out of the recent tokens.
        slots = policy.head_budgets(heads, tokens, budget.n_sink, least - budget.n_sink)
        capacities = [slots[i] for i in shape.full]
        found = policy.retrieval(heads)
        retrieval = [found[i] for i in shape.full]
        # Without retrieval heads (or with nothing else) every head is served by the fallback scorer.
        flat = [kind for layer in retrieval for kind in layer]
        mixed = any(flat) and not all(flat)
        streaming = [[mixed and not kind for kind in layer] for layer in retrieval]
    elif isinstance(policy, Calibrated):
        if isinstance(heads, list):
            capacities = heads
            _check_slots(capacities, full, least)
        elif isinstance(heads, HeadProfile):
            heads.check([layer.kv_heads for layer in shape.layers])
            slots = policy.head_budgets(heads, tokens, least, length, shape.full)
            capacities = [slots[i] for i in shape.full]
        else:
            raise PolicyError(f"{policy} needs a head profile: run modicum.calibrate(model, tokenizer) first")
        streaming = [[False] * layer.kv_heads for layer in full]
    else:
        budgets = policy.layer_budgets(tokens, len(full), least) if full else []
        capacities = [[b] * layer.kv_heads for b, layer in zip(budgets, full, strict=True)]
        streaming = [[False] * layer.kv_heads for layer in full]
    itemsize = shape.dtype.itemsize
    compensates = bool(getattr(policy, "compensate", False))
    total = 0
    for layer, caps, kinds in zip(full, capacities, streaming, strict=True):
        total += _layer_bytes(layer, caps, kinds, policy, itemsize, compensates, store)
    for layer in shape.layers:
        total += layer.state_nbytes
        if layer.window is not None:
            total += layer.kv_heads * max(layer.window - 1, 0) * (layer.key_dim + layer.value_dim) * itemsize
    return Plan(capacities, streaming, total)


def _check_slots(capacities: list[list[int]], layers: list[LayerShape], least: int) -> None:
    if [len(row) for row in capacities] != [layer.kv_heads for layer in layers]:
        raise SnapshotError("the saved slots per head are of a model with other heads")
    if any(not isinstance(n, int) or n < least for row in capacities for n in row):
        raise SnapshotError(f"the saved slots per head are damaged: none may be below {least}")


def _layer_bytes(
    layer: LayerShape,
    capacities: list[int],
    streaming: list[bool],
    policy: Policy,
    itemsize: int,
    compensates: bool,
    store: Store,
) -> int:
    width = layer.key_dim + layer.value_dim
    store = store.of_layer(layer)
    vectors = store.keys.nbytes(layer.key_dim, itemsize)
    vectors += store.values.nbytes(layer.stored_value_dim, itemsize)
    state = policy.state_width(layer.group)
    sums = policy.sum_width(layer.key_dim, layer.value_dim) + policy.tally_width(layer.group, layer.key_dim)
    total = 0
    for capacity, streams in zip(capacities, streaming, strict=True):
        slots = capacity + 1  # the newcomer's
        if streams and compensates:
            slots -= 1
            total += (width + 1) * _FLOAT
        total += slots * (vectors + _POSITION + (0 if streams else state * _FLOAT))
        total += 0 if streams else sums * _DOUBLE
    total += policy.kept_queries * (layer.kv_heads * layer.group * layer.key_dim * itemsize + _POSITION)
    return total
