"""Budgets: reading them, and turning them into slots and bytes."""

from __future__ import annotations

from decimal import Decimal

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from modicum import BudgetError, parse_policy
from modicum.kv.budget import Budget, format_size, parse_size
from modicum.kv.heads import HeadScores
from modicum.kv.layer_shape import LayerShape
from modicum.kv.plan import Plan, plan
from modicum.kv.policies.razor import RazorAttention
from modicum.kv.shape import Shape

MANY = settings(max_examples=150, derandomize=True, deadline=None, database=None)
UNITS = {"B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
UNITS |= {"KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40, "k": 10**3, "M": 10**6, "Gi": 2**30}


# -- reading -----------------------------------------------------------------------------------------


@given(
    whole=st.integers(0, 4000),
    part=st.integers(0, 999),
    places=st.integers(0, 3),
    unit=st.sampled_from(list(UNITS)),
    data=st.data(),
)
@MANY
def test_sizes_are_read_with_their_unit(
    whole: int, part: int, places: int, unit: str, data: st.DataObject
) -> None:
    number = str(whole) if places == 0 else f"{whole}.{part:03d}"[: len(str(whole)) + 1 + places]
    size = int(Decimal(number) * UNITS[unit])
    assume(size >= 1)
    shown = data.draw(st.sampled_from([unit, unit.upper(), unit.lower()]))
    text = (
        data.draw(st.sampled_from(["", " "])) + number + data.draw(st.sampled_from(["", " ", "  "])) + shown
    )
    # A number with a fraction goes through a float: exact to its rounding.
    assert abs(parse_size(text) - size) <= size * 2**-52 + (places > 0)
    budget = Budget.of(text, chunk=7)
    assert (budget.tokens, budget.nbytes, budget.chunk) == (None, parse_size(text), 7)


@given(tokens=st.integers(1, 10**6), data=st.data())
@MANY
def test_tokens_are_read_as_number_or_text(tokens: int, data: st.DataObject) -> None:
    form = data.draw(st.sampled_from([tokens, str(tokens), f" {tokens} ", f"+{tokens}"]))
    budget = Budget.of(form, n_sink=0, recent=0)
    assert (budget.tokens, budget.nbytes) == (tokens, None)
    assert Budget.of(budget) is budget


@pytest.mark.parametrize(
    ("size", "shown"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1024, "1.0 KiB"),
        (1536, "1.5 KiB"),
        (64 * 2**20, "64.0 MiB"),
        (3 * 2**40, "3.0 TiB"),
    ],
)
def test_sizes_are_shown_for_people(size: int, shown: str) -> None:
    assert format_size(size) == shown
    if size:
        assert abs(parse_size(shown) - size) <= 0.05 * size


@given(st.integers(0, 9), st.integers(0, 9), st.integers(1, 9), st.integers(0, 12))
@MANY
def test_the_least_holds_sinks_recent_tokens_and_slack_and_never_nothing(
    n_sink: int, recent: int, evict_every: int, window: int
) -> None:
    budget = Budget(tokens=40, n_sink=n_sink, recent=recent, evict_every=evict_every)
    least = budget.least(window)
    assert least == max(1, n_sink + max(recent, window)) + evict_every - 1
    # At its emptiest, right after an eviction, a head holds what must stay, and at least one token.
    assert least - evict_every + 1 >= max(1, n_sink + recent, n_sink + window)
    budget.check_tokens(least, window, "")
    with pytest.raises(BudgetError, match=f"give at least {least}"):
        budget.check_tokens(least - 1, window, "")


# -- slots and bytes ---------------------------------------------------------------------------------

POLICIES = [
    "keydiff",
    "knorm",
    "h2o",
    "snapkv(window=4)",
    "criticalkv+h2o",
    "pyramidkv+snapkv(window=4)",
    "pyramidkv(beta=3)+keydiff",
    "adakv+tova",
    "razor",
    "razor(h2o, share=2)",
    "razor(compensate=False)",
]


@st.composite
def models(draw: st.DrawFn) -> tuple[Shape, HeadScores]:
    layers = []
    for _ in range(draw(st.integers(1, 5))):
        window = draw(st.sampled_from([None, None, 1, 16]))
        heads, group = draw(st.integers(1, 3)), draw(st.integers(1, 3))
        layers.append(
            LayerShape(heads, group, draw(st.sampled_from([4, 16])), draw(st.sampled_from([4, 16])), window)
        )
    dtype = draw(st.sampled_from([torch.float32, torch.bfloat16]))
    rows = [[draw(st.integers(0, 9)) / 9 for _ in range(layer.kv_heads)] for layer in layers]
    skipped = tuple(i for i, layer in enumerate(layers) if layer.window is not None)
    return Shape("any", tuple(layers), dtype, 0), HeadScores(rows, rows, skipped)  # type: ignore[arg-type]


def cost(shape: Shape, made: Plan, policy: str) -> int:
    """The bytes of a plan, tensor by tensor."""
    rule, size, total = parse_policy(policy), shape.dtype.itemsize, 0
    for i, layer in enumerate(shape.layers):
        both = layer.key_dim + layer.value_dim
        if layer.window is not None:
            total += layer.kv_heads * (layer.window - 1) * both * size
            continue
        rank = shape.full.index(i)
        for slots, streams in zip(made.capacities[rank], made.streaming[rank], strict=True):
            virtual = streams and getattr(rule, "compensate", False)
            tensors = [(slots + 1 - virtual, both, size), (slots + 1 - virtual, 1, 4)]
            tensors += [] if streams else [(slots + 1, rule.state_width(layer.group), 4)]
            tensors += [(1, both + 1, 4)] if virtual else []
            tensors += [] if streams else [(1, rule.sum_width(layer.key_dim, layer.value_dim), 8)]
            total += sum(a * b * c for a, b, c in tensors)
        total += (
            rule.query_rows * layer.kv_heads * layer.group * layer.key_dim * size
            if rule.query_rows > 0
            else 0
        )
        total += rule.query_rows * 4 if rule.query_rows > 0 else 0
    return total


@given(model=models(), policy=st.sampled_from(POLICIES), tokens=st.integers(20, 400), every=st.integers(1, 5))
@MANY
def test_slots_add_up_and_none_is_below_the_least(
    model: tuple[Shape, HeadScores], policy: str, tokens: int, every: int
) -> None:
    shape, scores = model
    rule, budget = parse_policy(policy), Budget(tokens=tokens, n_sink=2, recent=3, evict_every=every)
    made = plan(shape, rule, budget, scores)
    slots = [n for layer in made.capacities for n in layer]
    assert [len(layer) for layer in made.capacities] == [shape.layers[i].kv_heads for i in shape.full]
    assert [len(layer) for layer in made.streaming] == [shape.layers[i].kv_heads for i in shape.full]
    assert made.nbytes == cost(shape, made, policy)
    if not slots:
        return
    compensates = getattr(rule, "compensate", False)
    for layer, kinds in zip(made.capacities, made.streaming, strict=True):
        for n, streams in zip(layer, kinds, strict=True):
            assert n - (streams and compensates) >= budget.least(rule.window)
    if "pyramidkv" in policy:
        assert sum(layer[0] for layer in made.capacities) == tokens * len(made.capacities)
        assert (
            made.capacities == sorted(made.capacities, key=lambda layer: -layer[0])
            or len(made.capacities) < 2
        )
    elif isinstance(rule, RazorAttention):
        assert sum(slots) == tokens * len(slots)
        assert made.tokens == tokens
        kinds = [kind for layer in made.streaming for kind in layer]
        assert not all(kinds)
        if any(kinds):
            assert len({n for n, streams in zip(slots, kinds, strict=True) if streams}) == 1
    else:
        assert set(slots) == {tokens}


@given(model=models(), policy=st.sampled_from(POLICIES), data=st.data())
@MANY
def test_a_budget_in_bytes_gives_the_most_tokens_that_fit(
    model: tuple[Shape, HeadScores], policy: str, data: st.DataObject
) -> None:
    shape, scores = model
    rule, rest = parse_policy(policy), {"n_sink": 2, "recent": 3, "evict_every": data.draw(st.integers(1, 3))}
    least = Budget(tokens=40, **rest).least(rule.window) + bool(getattr(rule, "compensate", False))

    def of(tokens: int) -> int:
        return plan(shape, rule, Budget(tokens=tokens, **rest), scores).nbytes

    size = data.draw(st.integers(1, 4 * of(least) + 100_000))
    if size < of(least):
        with pytest.raises(BudgetError, match=f"give at least {of(least)} bytes"):
            plan(shape, rule, Budget(nbytes=size, **rest), scores)
        return
    made = plan(shape, rule, Budget(nbytes=size, **rest), scores)
    assert made.nbytes <= size
    if not shape.full:
        return
    low, high = least, least + size  # bisect by hand: more tokens never cost less
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if of(middle) <= size else (low, middle)
    assert made == plan(shape, rule, Budget(tokens=low, **rest), scores)
    assert of(low + 1) > size
