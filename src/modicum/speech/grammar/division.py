"""Division: which recordings a search sees, and which are held out to measure with."""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from modicum.speech.grammar.recordings import Recording

_Owner = tuple[int, str]
"""A speaker (0, name), or a file (1, path) whose speaker is not known."""

_SPEAKER, _FILE = 0, 1


@dataclass(frozen=True)
class Division:
    """Rows of recordings of commands and of other speech, each [n] int64, ascending.

    Attributes:
        seen: of commands, to search with.
        seen_others: of other speech, to search with.
        kept: of commands, held out.
        kept_others: of other speech, held out.
        are_speakers_known: whether every recording of both lists names a speaker.
    """

    seen: np.ndarray
    seen_others: np.ndarray
    kept: np.ndarray
    kept_others: np.ndarray
    are_speakers_known: bool


def divide(
    commands: Sequence[Recording], others: Sequence[Recording], held_out: float, seed: int
) -> Division:
    """Divide the recordings of commands and of other speech together.

    No named speaker and no file is in both parts, whichever list it is in: the speakers that are held out are
    drawn once from those of both lists. Recordings without a speaker are divided by file: those of each
    command alike, and other speech without regard to its texts.

    Args:
        commands: recordings with a command as their text.
        others: recordings of other speech.
        held_out: share of the speakers, or of the files, that is held out.
        seed: of the draw.
    """
    owners = _owners([*commands, *others])
    own, foreign = owners[: len(commands)], owners[len(commands) :]
    speakers = [
        {name for name in names if name[0] == _SPEAKER}
        for names in (set(own) - set(foreign), set(own) & set(foreign), set(foreign) - set(own))
    ]
    texts: dict[str, set[_Owner]] = {}
    text_of: dict[_Owner, str] = {}
    for name, one in zip(own, commands, strict=True):
        if name[0] == _FILE:
            texts.setdefault(text_of.setdefault(name, one.text), set()).add(name)
    files = {name for name in foreign if name[0] == _FILE} - set(text_of)
    taken = _draw_speakers(speakers, held_out, seed)
    taken |= _draw_files([texts[text] for text in sorted(texts)], held_out, seed)
    taken |= _draw_files([files], held_out, seed)
    return Division(
        seen=_rows(own, taken, False),
        seen_others=_rows(foreign, taken, False),
        kept=_rows(own, taken, True),
        kept_others=_rows(foreign, taken, True),
        are_speakers_known=all(one.speaker for one in (*commands, *others)),
    )


def _owners(recordings: Sequence[Recording]) -> list[_Owner]:
    """Of each recording: those with one owner share a speaker or a file, directly or through others."""
    parents: dict[_Owner, _Owner] = {}

    def root(name: _Owner) -> _Owner:
        parents.setdefault(name, name)
        while parents[name] != name:
            parents[name] = name = parents[parents[name]]
        return name

    for one in recordings:
        file = root((_FILE, str(one.audio)))
        speaker = root((_SPEAKER, one.speaker)) if one.speaker else file
        parents[max(file, speaker)] = min(file, speaker)
    return [root((_FILE, str(one.audio))) for one in recordings]


def _draw_speakers(groups: Iterable[set[_Owner]], held_out: float, seed: int) -> set[_Owner]:
    """Those held out of commands' speakers, of speakers of both lists, and of other speech's speakers.

    The share is rounded for the groups up to each one together: rounded for each alone, many small groups
    would have nothing held out.
    """
    chance = random.Random(seed)
    taken: set[_Owner] = set()
    total = 0
    for group in groups:
        order = sorted(group)
        chance.shuffle(order)
        total += len(order)
        taken |= set(order[: round(held_out * total) - len(taken)])
    return taken


def _draw_files(groups: Iterable[set[_Owner]], held_out: float, seed: int) -> set[_Owner]:
    """The share of each group."""
    chance = random.Random(seed)
    taken: set[_Owner] = set()
    for group in groups:
        order = sorted(group)
        chance.shuffle(order)
        taken |= set(order[: round(held_out * len(order))])
    return taken


def _rows(owners: Sequence[_Owner], taken: set[_Owner], is_held_out: bool) -> np.ndarray:
    rows = [row for row, name in enumerate(owners) if (name in taken) == is_held_out]
    return np.array(rows, dtype=np.int64)
