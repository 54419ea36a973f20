"""`modicum speech train`, `transcribe` and `evaluate`."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from functools import reduce
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner

from modicum.cli import app
from modicum.packages import import_package
from modicum.speech import Recognizer, load_audio, save_audio
from tests.speech.conftest import Tones

FILES = ["model.safetensors", "recognizer.json"]
QUICK = ("--size", "tiny", "--epochs", "6", "--batch-seconds", "8", "--no-spec-augment")


def command(*words: str | Path) -> tuple[int, str, str]:
    """Exit code, stdout, stderr."""
    result = CliRunner().invoke(app, ["speech", *map(str, words)])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code, result.stdout, result.stderr


@pytest.fixture(scope="module")
def trained(tones: Tones, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders a and b, of two seeds, and dfsmn."""
    folder = tmp_path_factory.mktemp("trained")
    for name, words in (("a", ["--seed", "1"]), ("b", ["--seed", "2"]), ("dfsmn", ["--model", "dfsmn"])):
        code, out, err = command("train", tones.folder, "--out", folder / name, *QUICK, *words)
        assert code == 0, err
        assert "64 utterances" in out
        assert err.strip() == f"use it as --model {folder / name}"
        assert sorted(path.name for path in (folder / name).iterdir()) == [
            "model.safetensors",
            "recognizer.json",
        ]
    return folder


def test_a_student_is_taught_and_a_table_shows_all(tones: Tones, trained: Path, tmp_path: Path) -> None:
    teachers = f"{trained / 'a'},{trained / 'dfsmn'}"
    code, out, err = command(
        *("train", tones.folder, "--out", tmp_path / "student", "--teacher", teachers, "--keep", "topk=3"),
        *(*QUICK, "--targets", tmp_path / "targets", "--features", tmp_path / "features", "--json"),
    )
    assert code == 0, err
    told = json.loads(out)
    assert told["targets"]["kept_classes"] == 3
    assert told["about"]["targets"]["rule"] == "topk=3"
    assert told["num_utterances"] == 64
    models = ("-m", teachers, "-m", trained / "a", "-m", tmp_path / "student")
    code, out, err = command("evaluate", tones.test_folder, *models, "--json")
    assert code == 0, err
    rows = json.loads(out)
    assert [len(row["model"]) for row in rows] == [2, 1, 1]
    for row in rows:
        rate = row["character_error_rate"]
        assert rate["low"] <= rate["value"] <= rate["high"]
    code, out, _ = command("evaluate", tones.test_folder, *models, "--beam", "3")
    assert code == 0
    assert "WER" in out
    assert "10 utterances" in out
    # What was kept serves a second student, and another teacher's targets are refused by name.
    kept = ("--targets", tmp_path / "targets", "--features", tmp_path / "features")
    again = ("train", tones.folder, "--out", tmp_path / "second", *QUICK, "--keep", "topk=3")
    code, _, err = command(*again, *kept, "--teacher", trained / "b")
    assert code == 2
    assert "holds targets with another teacher" in err
    code, _, err = command(*again, *kept, "--teacher", ",".join(teachers.split(",")[::-1]), "--seed", "3")
    assert code == 0, err


def test_frames_and_phones_are_learned(tones: Tones, tmp_path: Path) -> None:
    for words in (["--model", "frames"], ["--units", "phones"]):
        out = tmp_path / words[-1]
        code, _, err = command("train", tones.folder, "--out", out, *QUICK, *words)
        assert code == 0, err
        code, shown, err = command("evaluate", tones.test_folder, "--model", out)
        assert code == 0, err
        assert "PER" in shown
        assert ("frames right" in shown) == (words[-1] == "frames")


def test_copies_speeds_and_noise_are_made(tones: Tones, tmp_path: Path) -> None:
    words = ("--copies", "3", "--speeds", "1,0.9,1.1", "--noise", "5,20")
    code, out, err = command("train", tones.folder, "--out", tmp_path / "m", *QUICK, *words, "--json")
    assert code == 0, err
    assert json.loads(out)["audio_seconds"] > 2.9 * tones.corpus.seconds


def test_files_are_transcribed(tones: Tones, trained: Path, tmp_path: Path) -> None:
    files = [one.audio for one in tones.test.utterances[:3]]
    recognizer = Recognizer.load(trained / "a")
    expected = [recognizer.transcribe(path).text for path in files]
    code, out, err = command("transcribe", files[0], "--model", trained / "a")
    assert (code, out, err) == (0, f"{expected[0]}\n", "")
    code, out, _ = command("transcribe", *files, "--model", trained / "a", "--json")
    assert [row["text"] for row in json.loads(out)] == expected
    save_audio(tmp_path / "silent.wav", torch.zeros(4000), 16_000)
    code, out, err = command("transcribe", tmp_path / "silent.wav", files[1], "--model", trained / "a")
    assert code == 0
    assert out == f"{files[1]}\t{expected[1]}\n"
    assert "silent.wav is silent" in err
    code, _, err = command(
        "transcribe", tmp_path / "silent.wav", "no.wav", "-m", trained / "a", "--beam", "4"
    )
    assert code == 2
    assert "none of the 2 files could be transcribed" in err


def test_another_sample_rate_is_said_once(tones: Tones, trained: Path, tmp_path: Path) -> None:
    for name in ("a.wav", "b.wav"):
        save_audio(tmp_path / name, load_audio(tones.test.utterances[0].audio)[::2], 8000)
    code, _, err = command("transcribe", tmp_path / "a.wav", tmp_path / "b.wav", "--model", trained / "a")
    assert code == 0
    assert err.count("resampled to 16,000 Hz") == 1


def test_what_cannot_be_learned_from_is_named(tones: Tones, tmp_path: Path) -> None:
    save_audio(tmp_path / "silent.wav", torch.zeros(4000), 16_000)
    save_audio(tmp_path / "alone.wav", torch.ones(4000), 16_000)
    rows = [f"{one.audio.resolve()}\t{one.text}" for one in tones.utterances[:8]]
    rows += ["silent.wav\tab", "missing.wav\tab", "no tab here"]
    (tmp_path / "list.tsv").write_text("\n".join(rows), encoding="utf-8")
    code, out, err = command("train", tmp_path / "list.tsv", "--out", tmp_path / "m", *QUICK)
    assert code == 0, err
    assert "8 utterances" in out
    assert "missing.wav" in err
    assert "neither JSON nor file<TAB>text" in err
    assert "silent.wav is silent" in err


def test_ctrl_c_leaves_a_checkpoint_and_the_same_command_goes_on(tones: Tones, tmp_path: Path) -> None:
    def words(out: str) -> list[str]:
        long = [*QUICK, "--epochs", "24", "--out", str(tmp_path / out)]
        return ["speech", "train", str(tones.folder), *long]

    program = [sys.executable, "-m", "modicum", *words("stopped")]
    process = subprocess.Popen(program, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    state = tmp_path / "stopped" / "state" / "features" / "corpus.json"
    deadline = time.monotonic() + 120
    while not state.exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.02)
    time.sleep(0.3)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 130, err
    assert "interrupted" in err
    assert not (tmp_path / "stopped" / "recognizer.json").exists()
    assert command(*words("stopped")[1:])[0] == 0
    assert command(*words("whole")[1:])[0] == 0
    tensors = [load_file(tmp_path / name / "model.safetensors") for name in ("stopped", "whole")]
    assert all(torch.equal(tensors[0][name], tensors[1][name]) for name in tensors[1])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--model", "rnn"], "model is 'rnn'; choose one of conv, "),
        (["--size", "huge"], "size is 'huge'"),
        (["--units", "words"], "units are 'words'"),
        (["--epochs", "0"], "epochs is 0"),
        (["--rate", "0"], "--rate is 0"),
        (["--rate", "1e300"], "--rate is 1e+300"),
        (["--batch-seconds", "0"], "--batch-seconds is 0"),
        (["--batch-seconds", "1e307"], "--batch-seconds is 1e+307"),
        (["--features", "{out}/f"], "of the features is in "),
        (["--features", "{out}"], "of the features is in "),
        (["--teacher", "{a}", "--targets", "{out}/a/../t"], "of the targets is in "),
        (["--features", "{out}/../f", "--targets", "{out}/../f"], "is given for features and targets"),
        (["--hard-weight", "2"], "--hard-weight is 2"),
        (["--model", "wav2letter", "--streamable"], "the context of wav2letter models is not known"),
        (["--mels", "2"], "--mels is 2"),
        (["--copies", "0"], "there are 0 copies"),
        (["--speeds", "9"], "the speed is 9"),
        (["--speeds", "fast"], "speeds is 'fast': give numbers"),
        (["--noise", "3"], "give the lowest and the highest ratio"),
        (["--noise", "9,3"], "the lower one first"),
        (["--keep", "topk=x"], "'x' is not a whole number"),
        (["--bits", "4"], "in 4 bits is not known"),
        (["--tail", "some"], "tail is 'some'"),
        (["--temperature", "0"], "the temperature is 0"),
        (["--teacher", ","], "give folders of recognizers"),
        (["--teacher", "nowhere"], "nowhere holds no recognizer"),
        (["--teacher", "{a}", "--keep", "topk=40"], "topk=40 keeps more classes than the 29 there are"),
        (["--teacher", "{a}", "--model", "frames"], "is trained by ctc, the student (frames) by frames"),
    ],
)
def test_bad_input_is_one_line(
    words: list[str], message: str, tones: Tones, trained: Path, tmp_path: Path
) -> None:
    places = {"{a}": str(trained / "a"), "{out}": str(tmp_path / "out")}
    given = [reduce(lambda text, item: text.replace(*item), places.items(), word) for word in words]
    code, _, err = command("train", tones.folder, "--out", tmp_path / "out", *QUICK, *given)
    assert code == 2
    assert message in err
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_folders_and_manifests_that_cannot_be_used(tones: Tones, trained: Path, tmp_path: Path) -> None:
    mixed = f"{trained / 'a'},{tmp_path / 'gone'}"
    for words, message in (
        (["train", tmp_path / "none", "--out", tmp_path / "m"], "cannot read the manifest"),
        (["train", tones.folder, "--out", trained / "a"], "is not empty"),
        (["evaluate", tones.test_folder, "--model", tmp_path / "gone"], "holds no recognizer"),
        (["evaluate", tones.test_folder, "--model", mixed], "holds no recognizer"),
        (["evaluate", tones.test_folder, "--model", ","], "give folders of recognizers"),
        (["evaluate", tmp_path / "none", "--model", trained / "a"], "cannot read the manifest"),
        (["evaluate", tones.test_folder, "--model", trained / "a", "--beam", "-1"], "--beam is -1: give the"),
        (["transcribe", tmp_path / "no.wav", "--model", trained / "a"], "there is no audio file"),
        (["transcribe", tmp_path / "no.wav", "--model", tmp_path], "holds no recognizer"),
    ):
        code, out, err = command(*words)
        assert (code, out) == (2, ""), words
        assert err.startswith("error: ")
        assert message in err
        assert err.count("\n") == 1


@pytest.mark.skipif(sys.platform != "linux", reason="names of files are bytes on Linux")
def test_a_name_that_is_not_utf8_is_no_obstacle(tones: Tones, trained: Path, tmp_path: Path) -> None:
    strange = Path(os.fsdecode(os.fsencode(tmp_path) + b"/\xff.wav"))
    missing, whole = strange.with_stem("\udcfe"), tones.test.utterances[0].audio
    shutil.copy(whole, strange)
    expected = Recognizer.load(trained / "a").transcribe(whole).text
    files = [os.fsencode(path) for path in (strange, missing, whole)]
    for extra in ([], ["--json"]):
        program = [sys.executable, "-m", "modicum", "speech", "transcribe", "-m", str(trained / "a"), *extra]
        found = subprocess.run([*program, *files], capture_output=True, check=False)
        assert found.returncode == 0, found.stderr
        told = found.stdout.decode()
        if extra:
            pairs = [(row["audio"], row["text"]) for row in json.loads(told)]
        else:
            pairs = [tuple(line.split("\t")) for line in told.splitlines()]
        assert pairs == [(f"{tmp_path}/\ufffd.wav", expected), (str(whole), expected)]
        assert found.stderr.count(b"\n") == 1
        assert b"there is no audio file" in found.stderr


def test_a_folder_that_cannot_be_written_is_said(
    tones: Tones, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make = Path.mkdir

    def mkdir(self: Path, *words: Any, **named: Any) -> None:
        if self.is_relative_to(tmp_path / "m"):
            raise PermissionError(13, "Permission denied")
        make(self, *words, **named)

    monkeypatch.setattr(Path, "mkdir", mkdir)
    features = ("--features", tmp_path / "f")
    code, _, err = command("train", tones.folder, "--out", tmp_path / "m", *QUICK, *features)
    assert code == 2
    assert (
        err
        == f"error: cannot write to {tmp_path / 'm'}: Permission denied; give a folder that can be written\n"
    )
    assert not (tmp_path / "f").exists()


def test_too_many_channels_are_said(tones: Tones, tmp_path: Path) -> None:
    code, _, err = command("train", tones.folder, "--out", tmp_path / "m", *QUICK, "--mels", "128")
    assert code == 2
    assert err == "error: --mels is 128, too many for frames of 25 ms at 16,000 Hz: give fewer channels\n"


def test_a_huge_seed_is_a_seed(tones: Tones, tmp_path: Path) -> None:
    words = (*QUICK, "--epochs", "1", "--seed", "100000000000000000")
    code, _, err = command("train", tones.folder, "--out", tmp_path / "m", *words)
    assert code == 0, err


@pytest.mark.parametrize("is_hidden", [False, True])
def test_ctrl_c_while_a_package_loads_is_no_missing_package(
    is_hidden: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hidden = (
        "try:\n    raise KeyboardInterrupt\nexcept BaseException as error:\n    raise ImportError from error"
    )
    source = f"try:\n{textwrap.indent(hidden, '    ')}\nexcept ImportError:\n    raise OSError('broken')"
    (tmp_path / "slow_package.py").write_text(source if is_hidden else "raise KeyboardInterrupt")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(KeyboardInterrupt):
        import_package("slow_package", "speech")


def test_a_missing_package_says_what_to_install(
    tones: Tones, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "kaldi_native_fbank", None)
    code, _, err = command("train", tones.folder, "--out", tmp_path / "m", *QUICK)
    assert code == 2
    assert "pip install 'modicum[speech]'" in err
    assert err.count("\n") == 1
    assert not (tmp_path / "m" / "recognizer.json").exists()
