"""Texts: the sample text, which is read from Python's own help topics, and texts to calibrate on."""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import cache
from importlib.resources import files

from modicum.errors import InputError

_NUM_CHARS = 100_000
_EXCERPT_CHARS = 6_000  # more than 900 tokens
_FIRST_TOPIC = "objects"  # it reads well without the others
_MIN_WORDS = 9
_NOT_PROSE = re.compile(r"::=|>>>|->|==|https?:|[|{}=<>\\@]|^(?:Added|New|Changed|Deprecated|Removed) in ver")
_EMPHASIS = re.compile(r'(?<![\w*"])(\*\*?)([^*"]+)\1(?![\w*"])')
_FOOTNOTE = re.compile(r" ?\[\d+\]")
_PUNCTUATION = str.maketrans({"’": "'", "‘": "'", "“": '"', "”": '"', "–": "-", "—": "-", "…": "..."})


@cache
def sample_text() -> str:
    """A long English text: paragraphs of the Python language reference, as this Python ships it.

    The source is `pydoc_data.topics`; headings, grammar, code, tables and version notes are left out.
    Paragraphs are separated by empty lines. The text ends with the first paragraph that takes it past
    100,000 characters. The wording differs a little between versions of Python.

    Raises:
        InputError: this Python comes without `pydoc_data.topics`.
    """
    try:
        from pydoc_data.topics import topics
    except ImportError as error:
        raise InputError(
            "the sample text is Python's language reference, and this Python comes without it (module "
            "pydoc_data.topics): install the complete standard library, or give a text file of your own"
        ) from error
    names = sorted(topics, key=lambda name: (name != _FIRST_TOPIC, name))
    kept: dict[str, None] = {}  # a set that keeps the order: topics repeat each other's sections
    num_chars = 0
    for paragraph in (paragraph for name in names for paragraph in _paragraphs(topics[name])):
        if paragraph not in kept:
            kept[paragraph] = None
            num_chars += len(paragraph) + 2
        if num_chars > _NUM_CHARS:
            break
    return "\n\n".join(kept) + "\n"


@cache
def calibration_texts() -> tuple[str, ...]:
    """English texts of several kinds, each of about 900 tokens or more: four of our own (a story, letters,
    notes with numbers, talk) and four excerpts of `sample_text`, in turns.

    Raises:
        InputError: see `sample_text`.
    """
    folder = files("modicum") / "calibration_texts"
    own = sorted(
        (file for file in folder.iterdir() if file.name.endswith(".txt")), key=lambda file: file.name
    )
    sample = sample_text()
    texts: list[str] = []
    for i, file in enumerate(own):
        start = sample.find("\n\n", i * len(sample) // len(own)) + 2 if i else 0
        texts += [file.read_text(encoding="utf-8"), sample[start : start + _EXCERPT_CHARS]]
    return tuple(texts)


def _paragraphs(topic: str) -> Iterator[str]:
    """The paragraphs of a topic that are prose, each in one line and without markup."""
    for block in re.split(r"\n\s*\n", topic):
        joined = re.sub(r"(?<=\w)-\n\s*(?=\w)", "-", block)  # a line may end at a hyphen
        text = " ".join(joined.split()).removeprefix("* ")
        if text.count(" ") + 1 < _MIN_WORDS or _NOT_PROSE.search(text):
            continue
        text = _FOOTNOTE.sub("", _EMPHASIS.sub(r"\2", text))
        text = text.replace('"', "").translate(
            _PUNCTUATION
        )  # straight quotes mark code, curly ones are quotes
        if text[0].isupper() and text.endswith((".", ".)")):
            yield text
