"""Words: the nouns, adjectives and verbs of the `wonderwords` package, as RULER takes them."""

from __future__ import annotations

import random
from functools import cache
from importlib.resources import files

from modicum.errors import InputError


@cache
def listed(name: str) -> tuple[str, ...]:
    """The words of "noun", "adjective" or "verb", in the package's order.

    Raises:
        InputError: the package is not installed.
    """
    try:
        text = files("wonderwords").joinpath("assets", f"{name}list.txt").read_text(encoding="utf-8")
    except ModuleNotFoundError as error:
        raise InputError("the word lists of RULER's tasks are missing: pip install wonderwords") from error
    return tuple(line.strip() for line in text.splitlines() if line.strip())


@cache
def every() -> tuple[str, ...]:
    """All of them once, sorted."""
    return tuple(sorted({*listed("noun"), *listed("adjective"), *listed("verb")}))


def pair(rng: random.Random) -> str:
    """An adjective and a noun joined by "-", any pair as likely as another."""
    return f"{rng.choice(listed('adjective'))}-{rng.choice(listed('noun'))}"
