"""Digits: file names become utterances, and no speaker is on both sides."""

import os
from pathlib import Path

import pytest
import torch

from modicum.errors import InputError
from modicum.speech.audio import save_audio
from modicum.speech.digits import WORDS, read_digits, split_speakers

pytest.importorskip("soundfile")


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "recordings").mkdir()
    for digit in (0, 7):
        for speaker in ("ann", "bob", "cid"):
            for index in (2, 10):
                path = tmp_path / "recordings" / f"{digit}_{speaker}_{index}.wav"
                save_audio(path, torch.ones(400 * (digit + 1)) / 2, 8000)
    (tmp_path / "recordings" / "readme.txt").write_text("no audio", encoding="utf-8")
    return tmp_path


def test_names_say_digit_and_speaker(folder):
    found = read_digits(folder)
    assert found == read_digits(folder / "recordings")
    assert [(x.text, x.speaker, x.audio.name) for x in found[:3]] == [
        ("zero", "ann", "0_ann_2.wav"),
        ("zero", "ann", "0_ann_10.wav"),
        ("zero", "bob", "0_bob_2.wav"),
    ]
    assert {x.text: x.duration for x in found} == {"zero": 0.05, "seven": 0.4}


@pytest.mark.parametrize(("held_out", "names"), [(1, {"cid"}), (2, {"bob", "cid"}), (["ann"], {"ann"})])
def test_no_speaker_is_on_both_sides(folder, held_out, names):
    rows = read_digits(folder)
    split = split_speakers(rows, held_out)
    assert {x.speaker for x in split.test} == names
    assert not names & {x.speaker for x in split.train}
    assert sorted(map(str, split.train + split.test)) == sorted(map(str, rows))


def test_bad_folders_and_speakers_are_refused(folder, tmp_path):
    with pytest.raises(InputError, match="has no recordings such as"):
        read_digits(tmp_path / "missing")
    rows = read_digits(folder)
    for held_out, message in (
        (3, "3 of 3 speakers"),
        (0, "0 of 3 speakers"),
        (["eve"], "no speaker 'eve'"),
        ([], "some must be held out"),
        (["ann", "bob", "cid"], "some must be held out"),
    ):
        with pytest.raises(InputError, match=message):
            split_speakers(rows, held_out)


def test_the_dataset_is_read():
    data = os.environ.get("MODICUM_DATA")
    if not data or not (Path(data) / "fsdd").is_dir():
        pytest.skip("the Free Spoken Digit Dataset, as fsdd in the folder that MODICUM_DATA names")
    rows = read_digits(Path(data) / "fsdd")
    split = split_speakers(rows)
    speakers = {x.speaker for x in rows}
    assert len(rows) >= 2000
    assert {x.text for x in split.test} == set(WORDS)
    assert len({x.speaker for x in split.test}) == 2
    assert len({x.speaker for x in split.train}) == len(speakers) - 2
    assert all(0.1 < x.duration < 3 for x in rows)
