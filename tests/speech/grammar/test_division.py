"""Division: nobody who is measured with was searched with, and a share is held out of both lists."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from modicum.speech.grammar import Recording
from modicum.speech.grammar.division import Division, divide

SPEAKERS = [f"s{index}" for index in range(10)]


def of(folder: str, size: int, text: str = "go", num_speakers: int = 0) -> list[Recording]:
    return [
        Recording(
            Path(f"/{folder}/{index}.wav"),
            text.format(index),
            speaker=SPEAKERS[index % num_speakers] if num_speakers else "",
        )
        for index in range(size)
    ]


def parts(
    found: Division, commands: list[Recording], others: list[Recording]
) -> tuple[list[Recording], list[Recording]]:
    """What is searched with and what is held out, of both lists."""
    return (
        [*(commands[row] for row in found.seen), *(others[row] for row in found.seen_others)],
        [*(commands[row] for row in found.kept), *(others[row] for row in found.kept_others)],
    )


RECORDINGS = st.lists(
    st.builds(
        Recording,
        st.sampled_from([Path(f"/{index}.wav") for index in range(30)]),
        st.sampled_from(["go", "stop"]),
        speaker=st.sampled_from(["", *SPEAKERS]),
    ),
    max_size=20,
)


@settings(max_examples=40)
@given(RECORDINGS, RECORDINGS, st.floats(0, 0.99), st.integers(0, 5))
def test_no_speaker_and_no_file_is_in_both_parts(
    commands: list[Recording], others: list[Recording], held_out: float, seed: int
) -> None:
    found = divide(commands, others, held_out, seed)
    assert sorted([*found.seen, *found.kept]) == list(range(len(commands)))
    assert sorted([*found.seen_others, *found.kept_others]) == list(range(len(others)))
    seen, kept = parts(found, commands, others)
    assert {one.speaker for one in seen} & {one.speaker for one in kept} <= {""}
    assert {one.audio for one in seen}.isdisjoint(one.audio for one in kept)
    assert found.are_speakers_known == all(one.speaker for one in commands + others)
    again = divide(commands, others, held_out, seed)
    assert np.array_equal(again.kept, found.kept)
    assert np.array_equal(again.kept_others, found.kept_others)


@pytest.mark.parametrize("num", [4, 8, 10])
@pytest.mark.parametrize("seed", range(4))
def test_the_share_is_of_the_speakers_of_both_lists_together(num: int, seed: int) -> None:
    commands, others = of("c", 100, num_speakers=10), of("o", 100, num_speakers=num)
    found = divide(commands, others, 0.3, seed)
    assert len({commands[row].speaker for row in found.kept}) == 3
    assert len({others[row].speaker for row in found.kept_others}) in (num * 3 // 10, num * 3 // 10 + 1)
    # Speakers of one list only: as many of each.
    strangers = [replace(one, speaker=f"o{one.speaker}") for one in others]
    found = divide(commands, strangers, 0.5, seed)
    assert len({commands[row].speaker for row in found.kept}) == 5
    assert len({strangers[row].speaker for row in found.kept_others}) == num // 2


def test_other_speech_without_speakers_is_divided_whatever_its_texts() -> None:
    commands = of("c", 100, num_speakers=10)
    for text in ("", "x", "sentence {}"):
        assert len(divide(commands, of("o", 200, text), 0.3, 0).kept_others) == 60


def test_one_row_without_a_speaker_does_not_undo_the_division_of_the_others() -> None:
    commands, others = of("c", 100, num_speakers=10), of("o", 100, "sentence {}", num_speakers=10)
    commands[0], others[0] = replace(commands[0], speaker=""), replace(others[0], speaker="")
    found = divide(commands, others, 0.3, 0)
    assert not found.are_speakers_known
    seen, kept = parts(found, commands, others)
    assert len({one.speaker for one in kept} - {""}) == 3
    assert {one.speaker for one in seen} & {one.speaker for one in kept} <= {""}


def test_commands_without_speakers_are_divided_alike() -> None:
    commands = [*of("go", 10), *of("stop", 20, "stop")]
    found = divide(commands, of("o", 10), 0.5, 0)
    assert [sum(commands[row].text == text for row in found.kept) for text in ("go", "stop")] == [5, 10]
    nothing = divide(commands, of("o", 10), 0.0, 0)
    assert (len(nothing.kept), len(nothing.kept_others)) == (0, 0)
