"""Alignment beside a recursive definition."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from modicum.speech.grammar.alignment import edit_path, edit_table, heard_words
from tests.speech.grammar.reference import edits

short = st.text("ab ", max_size=5)


@given(short, short)
def test_distances_are_the_least_cost_of_edits(said: str, heard: str) -> None:
    table = edit_table(said, heard)
    assert [[int(x) for x in row] for row in table] == [
        [edits(said[:i], heard[:j]) for j in range(len(heard) + 1)] for i in range(len(said) + 1)
    ]


@given(short, short)
def test_a_path_visits_all_in_order_at_the_least_cost(said: str, heard: str) -> None:
    path = edit_path(said, heard)
    assert [i for i, _ in path if i is not None] == list(range(len(said)))
    assert [j for _, j in path if j is not None] == list(range(len(heard)))
    cost = 0
    for i, j in path:
        if i is None or j is None:
            cost += 1
        elif said[i] != heard[j]:
            cost += 2 if " " in (said[i], heard[j]) else 1
    assert cost == edits(said, heard)


def words(said: str, heard: str) -> list[str]:
    return ["".join(part) for part in heard_words([list(w) for w in said.split()], heard, has_spaces=True)]


def test_words_get_what_was_heard_of_them() -> None:
    assert words("turn on the light", "turn on the light") == ["turn", "on", "the", "light"]
    assert words("set the alarm", "set the alom") == ["set", "the", "alom"]
    assert words("cancel it", "concel it") == ["concel", "it"]
    assert words("the light", "the") == ["the", ""]
    assert words("go", "") == [""]
    assert words("go", "let go") == ["let go"]
    assert words("view glass", "zer glas") == ["zer", "glas"]
    assert words("on off", "on offf") == ["on", "offf"]


@given(st.lists(st.text("ab", min_size=1, max_size=3), min_size=1, max_size=3), st.text("ab ", max_size=8))
def test_no_letter_is_lost_or_moved(said: list[str], heard: str) -> None:
    parts = heard_words([list(w) for w in said], heard, has_spaces=True)
    assert "".join(letter for part in parts for letter in part).replace(" ", "") == heard.replace(" ", "")


def test_phones_have_no_spaces_between_words() -> None:
    said = [["V", "Y", "UW"], ["G", "L", "AE", "S"]]
    assert heard_words(said, ["D", "Y", "UW", "G", "L", "AA", "S", "AH"], has_spaces=False) == [
        ["D", "Y", "UW"],
        ["G", "L", "AA", "S", "AH"],
    ]
