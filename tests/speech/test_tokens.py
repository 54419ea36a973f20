"""Tokens: texts come back, frames have the class of the phone at their centre."""

import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from modicum.errors import InputError
from modicum.speech.manifest import PhoneInterval
from modicum.speech.tokens import ENGLISH, SILENCE, TokenSet

PHONES = st.sampled_from(["a", "oʊ", "tʃ", "s"])


@st.composite
def spoken(draw):
    """Phones in the order of time, with and without gaps, in frames of 10 ms."""
    at, phones = 0.0, []
    for phone in draw(st.lists(PHONES, min_size=1, max_size=6)):
        at += draw(st.sampled_from([0.0, 0.02, 0.055, 0.1]))
        length = draw(st.floats(0.005, 0.2))
        phones.append(PhoneInterval(phone, at, at + length))
        at += length
    return phones


@given(st.text(st.sampled_from(ENGLISH), min_size=1))
def test_a_text_comes_back(text):
    tokens = TokenSet.of_texts([])
    classes = tokens.encode(text)
    assert tokens.decode(classes) == " ".join(text.split())
    assert all(0 < one < tokens.num_classes for one in classes)


def test_other_letters_are_added_in_order():
    tokens = TokenSet.of_texts(["Über", "naïve Ü"])
    assert tokens.symbols == (*ENGLISH, "ï", "ü")
    assert tokens.decode(tokens.encode("NAÏVE  Ü’s")) == "naïve ü's"
    assert tokens.num_classes == len(ENGLISH) + 3


@given(spoken())
def test_phones_come_back(phones):
    tokens = TokenSet.of_phones([phones])
    text = " ".join(interval.phone for interval in phones)
    assert tokens.decode(tokens.encode(text)) == text
    assert tokens.encode(f"{SILENCE} {text}") == tokens.encode(text)


@given(spoken(), st.integers(1, 80))
def test_each_frame_has_the_class_at_its_centre(phones, num_frames):
    tokens = TokenSet.of_phones([phones], thirds=True)
    shift = 0.01
    labels = tokens.frame_labels(phones, num_frames, shift).tolist()
    assert len(labels) == num_frames
    for frame, label in enumerate(labels):
        centre = (frame + 0.5) * shift
        at = [x for x in phones if x.start <= centre < x.end]
        if not at:
            assert tokens.symbols[label // 3] == SILENCE
            continue
        (interval,) = at
        assert tokens.symbols[label // 3] == interval.phone
        share = 3 * (centre - interval.start) / (interval.end - interval.start)
        # A centre on the border between two thirds may belong to either by rounding.
        assert label % 3 in {min(2, math.floor(share - 1e-9)), min(2, math.floor(share + 1e-9))}


@given(spoken())
def test_long_phones_are_read_from_their_frames(phones):
    long = [PhoneInterval(x.phone, 10 * x.start, 10 * x.end) for x in phones]
    tokens = TokenSet.of_phones([long], thirds=True)
    labels = tokens.frame_labels(long, 2000, 0.01)
    # Each third has a frame, so that a phone said twice is told from one said once.
    assert tokens.decode(labels.tolist()) == " ".join(x.phone for x in long)


def test_silence_has_thirds_of_its_own_stretch():
    tokens = TokenSet.of_phones([[PhoneInterval("a", 0.06, 0.09)]], thirds=True)
    labels = tokens.frame_labels([PhoneInterval("a", 0.06, 0.09)], 12, 0.01).tolist()
    assert labels == [0, 0, 1, 1, 2, 2, 3, 4, 5, 0, 1, 2]
    assert tokens.decode(labels) == "a"
    assert tokens.num_classes == 6


@pytest.mark.parametrize("kind", ["graphemes", "phones", "thirds"])
def test_a_token_set_comes_back_from_json(kind):
    symbols = ("a", "b") if kind == "graphemes" else (SILENCE, "oʊ")
    tokens = TokenSet(kind, symbols)
    assert TokenSet.from_json(json.loads(json.dumps(tokens.to_json()))) == tokens


def test_bad_sets_and_texts_are_refused():
    for kind, symbols, message in (
        ("words", ("a",), "choose one of graphemes, phones, thirds"),
        ("phones", (), "has no symbols"),
        ("phones", ("a", "a"), "'a' is twice"),
        ("graphemes", ("ab",), "'ab' is no symbol"),
        ("phones", ("a b",), "'a b' is no symbol"),
        ("thirds", ("a",), "give SIL first"),
    ):
        with pytest.raises(InputError, match=message):
            TokenSet(kind, symbols)
    with pytest.raises(InputError, match="no utterance has phones"):
        TokenSet.of_phones([[]])
    tokens = TokenSet("graphemes", ENGLISH)
    with pytest.raises(InputError, match="'é' in 'café' is not among the 28 graphemes"):
        tokens.encode("café")
    with pytest.raises(InputError, match="class 29 is not among the 29"):
        tokens.decode([29])
    with pytest.raises(InputError, match="labelled by thirds"):
        tokens.frame_labels([], 3, 0.01)
    thirds = TokenSet("thirds", (SILENCE, "a"))
    with pytest.raises(InputError, match="has no thirds"):
        thirds.encode("a")
    with pytest.raises(InputError, match="phone b is not among"):
        thirds.frame_labels([PhoneInterval("b", 0.0, 0.1)], 3, 0.01)
    with pytest.raises(InputError, match="in the order of time"):
        thirds.frame_labels([PhoneInterval("a", 0.05, 0.1), PhoneInterval("a", 0.0, 0.05)], 10, 0.01)
    with pytest.raises(InputError, match="is no token set"):
        TokenSet.from_json({"kind": "phones"})
