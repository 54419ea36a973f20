"""The sample text: prose of the language reference, whatever version of it this Python has."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator
from pydoc_data.topics import topics
from types import ModuleType

import pytest

import modicum
from modicum.errors import InputError
from modicum.texts import calibration_texts, sample_text


@pytest.fixture
def shipped(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, str]]:
    """The topics that this Python is made to ship: an empty dictionary, to be filled."""
    module = ModuleType("pydoc_data.topics")
    module.topics = {}  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "pydoc_data.topics", module)
    sample_text.cache_clear()
    yield module.topics
    sample_text.cache_clear()


def letters(text: str) -> str:
    return re.sub(r"[\W_]", "", text)


def test_is_about_100_kb_of_paragraphs_that_begin_and_end_as_sentences_do() -> None:
    text = modicum.sample_text()
    paragraphs = text.removesuffix("\n").split("\n\n")
    assert 100_000 < len(text) < 105_000
    assert len(set(paragraphs)) == len(paragraphs) > 300
    for paragraph in paragraphs:
        assert "\n" not in paragraph
        assert paragraph[0].isupper()
        assert paragraph.rstrip(")")[-1] == "."
    assert not re.search(r"::=|>>>|\*\*\w+\*\*|\*\*\*|===|\[\d+\]", text)


def test_every_paragraph_stands_in_a_topic() -> None:
    """Compared by letters and digits alone: the order of words is the topic's, no word is lost or new."""
    whole = "\0".join(letters(re.sub(r"\[\d+\]", "", topic)) for topic in topics.values())
    for paragraph in modicum.sample_text().split("\n\n"):
        assert letters(paragraph) in whole


def test_keeps_prose_without_its_markup_and_nothing_else(shipped: dict[str, str]) -> None:
    shipped["names"] = (
        "Names and what they are bound to in a program\n"
        "*********************************************\n\n"
        '   name_stmt ::= "name" identifier "is given here as a grammar would be".\n\n'
        'A *name* is **never** a value, it’s bound to one by "bind(x, *y)" at run-\ntime [1], as 2*3 is.\n\n'
        "   >>> A session of the interpreter is not prose, even if it ends so.\n\n"
        "+------+\n| Tables are not prose either, although they hold words enough. |\n+------+\n\n"
        "* The items of a list are “kept”, if they are\n  sentences, without their mark.\n\n"
        "Changed in version 3.2: Notes on versions of the language are left out here.\n\n"
        "Too short a line.\n"
    )
    shipped["objects"] = "This topic comes first, because the text should begin in a readable way.\n"
    shipped["zero"] = (
        'A *name* is **never** a value, it’s bound to one by "bind(x, *y)" at run-\ntime, as 2*3 is.\n'
    )
    assert sample_text() == (
        "This topic comes first, because the text should begin in a readable way.\n\n"
        "A name is never a value, it's bound to one by bind(x, *y) at run-time, as 2*3 is.\n\n"
        'The items of a list are "kept", if they are sentences, without their mark.\n'
    )


def test_a_python_without_its_topics_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pydoc_data.topics", None)
    sample_text.cache_clear()
    with pytest.raises(InputError, match=r"without it \(module pydoc_data.topics\).* text file of your own"):
        sample_text()


def test_needs_no_model_library() -> None:
    code = (
        "import sys, modicum; modicum.sample_text(); assert 'torch' not in sys.modules; "
        "import modicum.tasks; assert 'transformers' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_texts_to_calibrate_on_are_our_own_and_excerpts_of_the_sample_text_in_turns() -> None:
    texts = calibration_texts()
    assert len(set(texts)) == len(texts) == 8
    sample = modicum.sample_text()
    for own, excerpt in zip(texts[::2], texts[1::2], strict=True):
        assert own not in sample
        assert len(own) > 2_500
        start = sample.index(excerpt)
        assert start == 0 or sample[:start].endswith("\n\n")
        assert len(excerpt) == 6_000
