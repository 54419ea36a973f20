"""HeadProfile: shares turned into slots, and its file."""

from __future__ import annotations

import json
import math
from collections import Counter
from dataclasses import replace
from fractions import Fraction
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from modicum import BudgetError, HeadProfile, InputError, SnapshotError

PROFILE = HeadProfile(
    fractions=(0.125, 0.5),
    shares=(((0.5, 0.1), (0.0, 0.2)), ((0.9, 0.5), (0.1, 0.5))),
    weights="0123456789abcdef",
    model="tiny",
    model_type="llama",
    texts=2,
    tokens=100,
)


def by_loops(weights: list[float], total: int, least: int) -> list[Fraction]:
    """Shares of the total in proportion, none below the least, exactly: raise those below, then again."""
    fixed: set[int] = set()
    exact = [Fraction(w) for w in weights]
    while True:
        free = [i for i in range(len(weights)) if i not in fixed]
        if not free:
            return [Fraction(least)] * len(weights)
        left = total - least * len(fixed)
        scale = Fraction(left) / sum(exact[i] for i in free)
        below = [i for i in free if exact[i] * scale < least]
        if not below:
            return [Fraction(least) if i in fixed else exact[i] * scale for i in range(len(weights))]
        fixed.update(below)


@given(
    shares=st.lists(st.lists(st.floats(0, 1), min_size=2, max_size=2), min_size=1, max_size=6),
    tokens=st.integers(1, 400),
    least=st.integers(1, 40),
)
@settings(max_examples=200)
def test_slots_add_up_and_follow_the_shares(shares: list[list[float]], tokens: int, least: int) -> None:
    profile = HeadProfile((0.25,), (tuple(map(tuple, shares)),))
    if tokens < least:
        with pytest.raises(BudgetError, match=f"give at least {least}"):
            profile.capacities(tokens, 0.25, least)
        return
    slots = [n for row in profile.capacities(tokens, 0.25, least) for n in row]
    # What is left could not be shared out among all heads of any size.
    sizes = Counter(slots)
    assert 0 <= tokens * len(slots) - sum(slots) < max(sizes.values())
    assert min(slots) >= least
    assert len(sizes) <= 4
    weights = [max(x, 1e-6) for row in shares for x in row]
    wanted = by_loops(weights, tokens * len(slots), least)
    # Rounding to levels keeps the order.
    order = sorted(range(len(slots)), key=lambda i: wanted[i])
    assert all(slots[i] <= slots[j] for i, j in pairwise(order))


def test_shares_between_fractions_are_linear_in_the_logarithm() -> None:
    assert PROFILE.at(0.125) == PROFILE.at(0.01) == PROFILE.shares[0]
    assert PROFILE.at(0.5) == PROFILE.shares[1]
    assert PROFILE.at(1.0) == PROFILE.at(3.0) == ((1.0, 1.0), (1.0, 1.0))
    middle = PROFILE.at(0.25)
    assert middle[0][0] == pytest.approx((0.5 + 0.9) / 2)
    above = PROFILE.at(1 / math.sqrt(2))
    assert above[1][0] == pytest.approx((0.1 + 1.0) / 2)


def test_with_room_for_all_every_head_holds_as_many() -> None:
    assert PROFILE.capacities(10, 1.0, 3) == [[10, 10], [10, 10]]


def test_only_the_given_layers_share() -> None:
    profile = replace(PROFILE, skipped=(1,))
    assert profile.capacities(12, 0.125, 2) == [[20, 4], [12, 12]]
    assert PROFILE.capacities(12, 0.125, 2, []) == [[12, 12], [12, 12]]
    assert PROFILE.capacities(12, 0.125, 2, [0]) == [[20, 4], [12, 12]]


def test_a_saved_profile_comes_back(tmp_path: Path) -> None:
    PROFILE.save(tmp_path / "p.safetensors")
    found = HeadProfile.load(tmp_path / "p.safetensors")
    assert [p.name for p in tmp_path.iterdir()] == ["p.safetensors"]
    assert replace(found, shares=PROFILE.shares) == PROFILE
    for a, b in zip(found.shares, PROFILE.shares, strict=True):
        # Stored in float32.
        assert torch.tensor(a).equal(torch.tensor(b))


def test_files_that_are_no_profile_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "p.safetensors"
    with pytest.raises(SnapshotError, match="there is no head profile"):
        HeadProfile.load(path)
    path.write_bytes(b"\x10\0\0")
    with pytest.raises(SnapshotError, match="truncated"):
        HeadProfile.load(path)
    save_file({"shares": torch.zeros(1, 2)}, path)
    with pytest.raises(SnapshotError, match="does not hold a head profile"):
        HeadProfile.load(path)
    header = {"format": "modicum head profile", "version": 99}
    save_file({"shares": torch.zeros(1, 2)}, path, metadata={"modicum": json.dumps(header)})
    with pytest.raises(SnapshotError, match="version 99, this modicum reads up to 2"):
        HeadProfile.load(path)
    header = {"format": "modicum head profile", "version": 1, "fractions": [0.5], "heads": [3]}
    save_file({"shares": torch.zeros(1, 2)}, path, metadata={"modicum": json.dumps(header)})
    with pytest.raises(SnapshotError, match="is damaged"):
        HeadProfile.load(path)
    with pytest.raises(SnapshotError, match="cannot write"):
        PROFILE.save(tmp_path / "none" / "p.safetensors")


@pytest.mark.parametrize(
    ("fractions", "shares", "says"),
    [
        ((), (), "fractions"),
        ((0.5, 0.25), (((0.1,),), ((0.1,),)), "ascending"),
        ((1.0,), (((0.1,),),), "from 0 to 1"),
        ((0.5,), (((0.1,),), ((0.1,),)), "differ in shape"),
        ((0.25, 0.5), (((0.1,),), ((0.1, 0.2),)), "differ in shape"),
        ((0.5,), (((float("nan"),),),), "number from 0 to 1"),
        ((0.5,), (((1.5,),),), "number from 0 to 1"),
    ],
)
def test_bad_tables_are_refused(fractions: tuple[float, ...], shares: object, says: str) -> None:
    with pytest.raises(InputError, match=says):
        HeadProfile(fractions, shares)  # type: ignore[arg-type]


def test_a_profile_of_another_model_is_refused() -> None:
    PROFILE.check([2, 2], "0123456789abcdef")
    with pytest.raises(SnapshotError, match=r"\[2, 2\] KV heads per layer does not fit .*\[2, 4\]"):
        PROFILE.check([2, 4])
    with pytest.raises(SnapshotError, match="other weights"):
        PROFILE.check([2, 2], "f" * 16)
