"""Patterns hold exactly, and choose what a brute force would."""

from __future__ import annotations

import itertools
import re
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from modicum.errors import InputError
from modicum.weights.pattern import Blocks, Groups, Rows, Whole, parse_pattern
from modicum.weights.plan import plan
from tests.bounds import gamma


@given(data=st.data())
def test_masks_are_of_their_pattern(data: st.DataObject) -> None:
    kind = data.draw(st.sampled_from(["rows", "groups", "whole", "blocks"]))
    sparsity = data.draw(st.floats(0.01, 0.85))
    rows, width = 6, 24
    pattern = {
        "rows": Rows(sparsity),
        "groups": Groups(*data.draw(st.sampled_from([(2, 4), (1, 4), (4, 8), (3, 4)]))),
        "whole": Whole(sparsity),
        "blocks": Blocks(*data.draw(st.sampled_from([(2, 3), (1, 4), (6, 2)])), sparsity),
    }[kind]
    score = torch.randint(
        0, 5, (rows, width), generator=torch.Generator().manual_seed(data.draw(st.integers(0, 9)))
    ).float()
    mask = pattern.select(score)
    assert pattern.follows(mask)
    assert not pattern.follows(~mask) or float(mask.float().mean()) == 0.5
    if kind == "whole":
        assert float(score[mask].min()) >= float(score[~mask].max()) if bool((~mask).any()) else True
    if kind == "rows":
        for row, keep in zip(score, mask, strict=True):
            assert float(row[keep].min()) >= float(row[~keep].max()) if (~keep).any() else True


def test_the_best_of_all_masks_of_a_row() -> None:
    score = torch.randn(3, 8, generator=torch.Generator().manual_seed(1))
    mask = Rows(0.5).select(score)
    for row, keep in zip(score, mask, strict=True):
        assert float(row[keep].sum()) == pytest.approx(
            max(float(row[list(c)].sum()) for c in itertools.combinations(range(8), 4)),
            abs=2 * gamma(4, torch.float32) * float(row.abs().sum()),
        )


def test_among_equals_the_lower_column_goes() -> None:
    assert Rows(0.5).select(torch.ones(1, 4)).tolist() == [[False, False, True, True]]
    assert Groups(1, 4).select(torch.ones(1, 4)).tolist() == [[False, False, False, True]]


def test_shares_are_counted_as_meant() -> None:
    assert Rows(0.29).removed(100) == 29
    assert Rows(0.6).removed(7) == 4


@pytest.mark.parametrize("sparsity", [0, 1, -0.1, 1.5, float("nan"), True, "0.5"])
def test_a_sparsity_outside_its_range(sparsity: object) -> None:
    with pytest.raises(InputError, match="sparsity is"):
        Rows(sparsity)  # type: ignore[arg-type]


def test_patterns_by_their_names() -> None:
    assert parse_pattern("2:4", None) == Groups(2, 4)
    assert parse_pattern("16x4", 0.5) == Blocks(16, 4, 0.5)
    assert parse_pattern("1:3", 0.667) == Groups(1, 3)
    for text, sparsity, message in (
        ("2:4", 0.7, "not 0.7"),
        ("16x4", None, "need a sparsity"),
        ("half", None, "not known"),
        ("4:4", None, "0 < N < M"),
    ):
        with pytest.raises(InputError, match=message):
            parse_pattern(text, sparsity)


def test_a_pattern_that_weights_cannot_have() -> None:
    for pattern, shape, message in (
        (Groups(2, 4), (8, 10), "up: pattern 2:4 needs a number of inputs that 4 divides, not 10"),
        (Blocks(3, 4, 0.5), (8, 8), "up: blocks of 3x4 do not divide its 8x8 weights"),
        (Blocks(8, 8, 0.99), (8, 8), "removes no block of 8x8"),
        (Rows(0.01), (8, 50), "removes none of 50 weights"),
        (Rows(1 - 1e-9), (8, 50), "up: .* leaves none of 50 weights"),
        (Whole(0.001), (8, 50), "removes none of 400 weights"),
        (Blocks(4, 4, 1 - 1e-9), (8, 8), "up: .* leaves none of the 2 blocks"),
    ):
        with pytest.raises(InputError, match=message):
            pattern.check({"up": shape})
    Blocks(8, 4, 0.5).check({"up": (8, 8)})
    Rows(0.01).check({"up": (8, 50), "down": (8, 100)})  # one that loses some is enough


SHAPES = st.dictionaries(
    st.sampled_from(["q", "up", "down"]), st.tuples(st.integers(1, 64), st.integers(2, 64)), min_size=1
)
SETTINGS = st.fixed_dictionaries(
    {
        "pattern": st.one_of(
            st.none(),
            st.builds("{}:{}".format, st.integers(0, 20), st.integers(0, 20)),
            st.builds("{}x{}".format, st.integers(0, 20), st.integers(0, 20)),
            st.just("half"),
        ),
        "sparsity": st.none() | st.floats(1e-6, 1 - 1e-6) | st.sampled_from([0.0, 1.0, 60.0, 1e-12]),
        "scope": st.sampled_from(["row", "layer"]),
        "refine": st.sampled_from(["none", "dsnot", "swap"]),
        "layers": st.sampled_from(["uniform", "owl"]),
        "bias_correct": st.booleans(),
    }
)
REMEDY = re.compile(r"(pattern|scope|refine|layers|sparsity|bias_correct)=[\"']?([\w:.-]*\w)[\"']?")
READ: dict[str, Any] = {"sparsity": float, "bias_correct": lambda text: text == "True"}


def complaint(settings: dict[str, Any], shapes: dict[str, tuple[int, int]]) -> str | None:
    """What is said against settings for weights of these shapes, or None."""
    try:
        plan(**settings).pattern.check(shapes)
    except InputError as error:
        return str(error)
    return None


def remedies(settings: dict[str, Any], message: str) -> list[dict[str, Any]]:
    """The settings that a message advises, each among those that are kept. A sparsity "with" a pattern joins
    it, one that is "alone" or "without a pattern" takes its place, and so does a pattern "alone".
    """
    found: list[dict[str, Any]] = []
    advice = re.split(r": give |such as |is not known: ", message, maxsplit=1)[1]
    for match in REMEDY.finditer(advice):
        name, before, after = match[1], advice[: match.start()], advice[match.end() :]
        changed: dict[str, Any] = {name: READ.get(name, str)(match[2])}
        if before.rstrip().endswith("with"):
            found[-1] |= changed
            continue
        if after.startswith((" alone", " without a pattern")):
            changed |= {"pattern": None} if name == "sparsity" else {"sparsity": None}
        found.append({**settings, **changed})
    return found


def reason(message: str) -> str:
    """A message without its numbers and its advice."""
    return re.sub(r"[\d.e+-]+", "", message.split("give ")[0])


@given(settings=SETTINGS, shapes=SHAPES)
@settings(max_examples=400)
def test_every_setting_that_a_message_advises_is_accepted(
    settings: dict[str, Any], shapes: dict[str, tuple[int, int]]
) -> None:
    """Or refused for another reason, whose own advice helps: never twice for the same one."""
    seen: set[str] = set()
    while (message := complaint(settings, shapes)) is not None:
        assert reason(message) not in seen, message
        seen.add(reason(message))
        advised = remedies(settings, message)
        assert advised, message
        for other in advised:
            again = complaint(other, shapes)
            assert again is None or reason(again) != reason(message), (message, again)
        settings = advised[0]


def test_a_pattern_that_does_not_divide_is_answered_by_one_that_does() -> None:
    shapes = {"up": (24, 16), "down": (16, 24)}
    message = complaint({"pattern": "3:7"}, shapes)
    assert message is not None
    assert message.startswith("up: pattern 3:7 needs a number of inputs that 7 divides, not 16: give ")
    assert [(x["pattern"], x.get("sparsity")) for x in remedies({"pattern": "3:7"}, message)] == [
        ("3:8", None),
        (None, pytest.approx(4 / 7)),
    ]
