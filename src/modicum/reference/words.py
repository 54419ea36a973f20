"""The adjectives and nouns that keys are made of: those of the `wonderwords` package, as in RULER."""

from __future__ import annotations

from functools import cache

from modicum.errors import InputError


@cache
def nouns() -> list[str]:
    """Single nouns, sorted."""
    return _words("nounlist.txt")


@cache
def adjectives() -> list[str]:
    """Single adjectives, sorted."""
    return _words("adjectivelist.txt")


def _words(name: str) -> list[str]:
    try:
        from importlib.resources import files

        text = files("wonderwords").joinpath("assets", name).read_text(encoding="utf-8")
    except ModuleNotFoundError as error:
        raise InputError("the word lists are missing: pip install wonderwords") from error
    return sorted({line.strip() for line in text.splitlines() if line.strip().isalpha()})
