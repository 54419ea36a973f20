"""Voices: accents of English and variants of espeak-ng, and which of them are held out for testing."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

from modicum.errors import InputError

ACCENTS = (
    "en-us",
    "en",
    "en-gb-scotland",
    "en-gb-x-rp",
    "en-gb-x-gbcwmd",
    "en-gb-x-gbclan",
    "en-029",
    "en-us-nyc",
)
"""Languages of espeak-ng: American, British, Scottish, Received Pronunciation, West Midlands, Lancaster,
Caribbean, New York."""

_UNLIKE_PEOPLE = ("robo", "robot", "demonic", "whisper", "croak", "storm", "klatt", "fast", "tweaky", "kauko")
"""Parts of the names of variants that are no voice of a person."""

_SEED = 20_190_626
"""Of the order of variants; with another one other voices would be held out."""


@dataclass(frozen=True)
class Voice:
    """An accent, a variant, and the pitch and speed around which it speaks."""

    accent: str
    variant: str
    pitch: int = 50
    """0 to 99."""
    rate: int = 165
    """Words per minute."""

    @property
    def name(self) -> str:
        """As espeak-ng takes it: "en-us+f1"."""
        return f"{self.accent}+{self.variant}" if self.variant else self.accent


@dataclass(frozen=True)
class VoiceSplit:
    """Voices to train with and others to test with; no variant is in both."""

    train: tuple[Voice, ...]
    held_out: tuple[Voice, ...]


def split_voices(variants: Sequence[str], num_train: int | None, num_held_out: int) -> VoiceSplit:
    """Divide the installed variants into voices.

    Every voice has a variant of its own, and an accent, a pitch and a rate. Which variants are held out
    depends on their names and number only, not on num_train.

    Args:
        variants: as `Synthesizer.variants` gives them.
        num_train: voices to train with; None for all that are not held out.
        num_held_out: voices to test with.

    Raises:
        InputError: there are not so many.
    """
    usable = sorted(x for x in variants if " " not in x and not _is_unlike_people(x))
    random.Random(_SEED).shuffle(usable)
    wanted = max(1, num_train or 1) + num_held_out
    if num_held_out < 0 or (num_train is not None and num_train < 1) or wanted > len(usable):
        raise InputError(
            f"{1 if num_train is None else num_train} voices and {num_held_out} held out are asked for, and "
            f"espeak-ng has {len(usable)} in all: ask for at least one, and for no more than that"
        )
    voices = [_voice(index, variant) for index, variant in enumerate(usable)]
    rest = voices[num_held_out:]
    return VoiceSplit(tuple(rest[:num_train]), tuple(voices[:num_held_out]))


def _voice(index: int, variant: str) -> Voice:
    chance = random.Random(f"{_SEED} {variant}")
    return Voice(ACCENTS[index % len(ACCENTS)], variant, chance.randint(30, 70), chance.randint(140, 190))


def _is_unlike_people(variant: str) -> bool:
    return any(part in variant.lower() for part in _UNLIKE_PEOPLE)
