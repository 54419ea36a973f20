"""Digits: the recordings of the Free Spoken Digit Dataset, with speakers held out.

https://github.com/Jakobovski/free-spoken-digit-dataset, CC BY-SA 4.0: single English digits by a few
speakers, in files digit_speaker_index.wav of 8 kHz. Nothing of it is part of modicum.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from modicum.errors import InputError
from modicum.speech.audio import audio_info
from modicum.speech.manifest import Utterance

WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")

_NAME = re.compile(r"(\d)_([A-Za-z]+)_(\d+)\.(?:wav|flac)")


@dataclass(frozen=True)
class DigitSplit:
    """Utterances to train with and, by other speakers, to test with."""

    train: list[Utterance]
    test: list[Utterance]


def read_digits(folder: str | Path) -> list[Utterance]:
    """The utterances of the dataset, by digit, speaker and index; the text is the digit's word.

    Args:
        folder: of the dataset, or its folder recordings.

    Raises:
        InputError: there are no recordings, or one is unreadable.
    """
    folder = Path(folder)
    recordings = folder / "recordings" if (folder / "recordings").is_dir() else folder
    found = []
    for path in recordings.iterdir() if recordings.is_dir() else ():
        if match := _NAME.fullmatch(path.name):
            found.append((int(match[1]), match[2], int(match[3]), path))
    if not found:
        raise InputError(
            f"{folder} has no recordings such as 7_jackson_32.wav: give the folder of the Free Spoken Digit "
            "Dataset"
        )
    return [
        Utterance(path, WORDS[digit], speaker, audio_info(path).duration)
        for digit, speaker, _, path in sorted(found)
    ]


def split_speakers(utterances: Iterable[Utterance], held_out: Sequence[str] | int = 2) -> DigitSplit:
    """Divide utterances by speaker.

    Args:
        utterances: of several speakers.
        held_out: names of the speakers to test with, or how many: the last ones by name.

    Raises:
        InputError: a speaker is not among them, or none is left to train with.
    """
    rows = list(utterances)
    speakers = sorted({row.speaker for row in rows})
    if isinstance(held_out, int):
        if not 0 < held_out < len(speakers):
            raise InputError(
                f"{held_out} of {len(speakers)} speakers are to be held out: give 1 to {len(speakers) - 1}"
            )
        held_out = speakers[-held_out:]
    if missing := next((name for name in held_out if name not in speakers), None):
        raise InputError(f"there is no speaker {missing!r}: give some of {', '.join(speakers)}")
    if not held_out or set(held_out) == set(speakers):
        raise InputError(f"of {', '.join(speakers)} some must be held out and some not: give fewer, or one")
    return DigitSplit(
        [row for row in rows if row.speaker not in held_out], [row for row in rows if row.speaker in held_out]
    )
