"""Synthetic speech: repeatable, resumable, and its phones are where the sound is."""

import errno
import json
import os
import shutil
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from modicum.cli import app
from modicum.errors import InputError
from modicum.speech.audio import load_audio
from modicum.speech.manifest import PhoneInterval, read_manifest
from modicum.speech.synthesis import (
    DOMAINS,
    SynthesisSettings,
    Synthesizer,
    Voice,
    sentence,
    split_voices,
    synthesize,
)
from modicum.speech.synthesis.library import Library, LibraryError
from modicum.speech.synthesis.synthesizer import phone_intervals

pytest.importorskip("soundfile")
pytest.importorskip("soxr")

VARIANTS = [f"v{index}" for index in range(20)]
SMALL = SynthesisSettings(hours=12 / 3600, test_hours=5 / 3600, num_voices=4, held_out_voices=2)


def has_espeak():
    try:
        with Synthesizer():
            return True
    except InputError:
        return False


espeak = pytest.mark.skipif(not has_espeak(), reason="espeak-ng is not installed")


@pytest.fixture(scope="module")
def synthesizer():
    with Synthesizer() as one:
        yield one


# -- without espeak-ng --------------------------------------------------------------------------------------


def test_events_become_intervals():
    events = [("a", 100), ("b", 200), ("b", 200), ("", 300), ("oʊ", 350)]
    assert list(phone_intervals(events, 500, 1000)) == [
        PhoneInterval("a", 0.1, 0.2),
        PhoneInterval("b", 0.2, 0.3),
        PhoneInterval("oʊ", 0.35, 0.5),
    ]
    assert list(phone_intervals([], 500, 1000)) == []


@pytest.mark.parametrize("domain", DOMAINS)
def test_sentences_are_words_and_repeatable(domain):
    found = [sentence([domain], str(seed)) for seed in range(200)]
    assert found == [sentence([domain], str(seed)) for seed in range(200)]
    assert all(text == " ".join(text.split()) and text.replace(" ", "").isalpha() for text in found)
    assert all(text.islower() and 3 <= len(text.split()) <= 12 for text in found)
    assert len(set(found)) > 100


def test_no_variant_is_on_both_sides():
    split = split_voices(VARIANTS, 5, 8)
    assert len(split.train) == 5
    assert len(split.held_out) == 8
    variants = [voice.variant for voice in split.train + split.held_out]
    assert len(set(variants)) == 13
    assert len({voice.accent for voice in split.held_out}) == 8
    more = split_voices(VARIANTS, None, 8)
    assert more.held_out == split.held_out
    assert more.train[:5] == split.train
    assert len(more.train) == 12


def test_robots_are_left_out():
    split = split_voices([*VARIANTS, "robosoft3", "UniRobot", "whisperf", "Mr serious"], None, 0)
    assert {voice.variant for voice in split.train} == set(VARIANTS)


def test_bad_settings_are_refused():
    for make, message in (
        (lambda: SynthesisSettings(hours=0), "hours is 0"),
        (lambda: SynthesisSettings(test_hours=-1), "test_hours is -1"),
        (lambda: SynthesisSettings(held_out_voices=0), "give both, or 0 for both"),
        (lambda: SynthesisSettings(suffix=".mp3"), "give .flac or .wav"),
        (lambda: SynthesisSettings(sample_rate=1), "sample rate is 1"),
        (lambda: SynthesisSettings(domains=("poems",)), "domain 'poems' is not known"),
        (lambda: SynthesisSettings(domains=()), "there is no domain"),
        (lambda: SynthesisSettings(noise_snr=(3, 1)), "the lower one first"),
        (lambda: split_voices(VARIANTS, 15, 8), "espeak-ng has 20 in all"),
        (lambda: split_voices(VARIANTS, None, 20), "espeak-ng has 20 in all"),
        (lambda: split_voices(VARIANTS, 0, 2), "at least one"),
    ):
        with pytest.raises(InputError, match=message):
            make()


def test_a_missing_library_is_said(tmp_path, monkeypatch):
    monkeypatch.setattr("ctypes.util.find_library", lambda name: str(tmp_path / "libespeak-ng.so.1"))
    with pytest.raises(LibraryError, match="espeak-ng is not installed"):
        Library()


# -- with espeak-ng -----------------------------------------------------------------------------------------


@espeak
def test_the_same_text_gives_the_same_samples_whatever_was_before(synthesizer):
    voices = [Voice("en-us", "f1"), Voice("en", "m3", 40, 180), Voice("en-gb-scotland", "klatt2")]
    first = [synthesizer.speak("turn on the light", voice) for voice in voices]
    synthesizer.speak("seven eight nine", Voice("en-us", "m2"))
    for voice, before in zip(reversed(voices), reversed(first), strict=True):
        again = synthesizer.speak("turn on the light", voice)
        assert torch.equal(again.samples, before.samples)
        assert again.phones == before.phones
    assert not torch.equal(first[0].samples[:9000], first[1].samples[:9000])


@espeak
@pytest.mark.parametrize("text", ["zero one two", "the old farmer paints our yellow bridge", "open the door"])
def test_phones_are_in_order_and_cover_the_sound(synthesizer, text):
    speech = synthesizer.speak(text, Voice("en-us", "f1"))
    phones = speech.phones
    assert all(a.end <= b.start for a, b in pairwise(phones))
    assert phones[0].start >= 0
    assert phones[-1].end <= speech.duration
    assert len(phones) >= len(text.replace(" ", "")) / 2
    # Outside of all phones there is silence, but for the last one, which fades after its end.
    is_outside = torch.ones(len(speech.samples), dtype=torch.bool)
    for phone in phones:
        rate = speech.sample_rate
        is_outside[round(phone.start * rate) : round(phone.end * rate)] = False
    energy = speech.samples.double().square()
    assert float(energy[is_outside].sum() / energy.sum()) < 0.1
    # Each vowel is loud: the reverse, that phones are not just anywhere.
    loud = [x for x in phones if x.phone[0] in "aeioɪɛʌæɑɔəʊ" and x.end - x.start > 0.06]
    assert loud
    mean = float(energy.mean())
    for phone in loud:
        inside = energy[round(phone.start * rate) : round(phone.end * rate)]
        assert float(inside.mean()) > 0.2 * mean, phone


@espeak
def test_what_cannot_be_spoken_is_refused(synthesizer):
    with pytest.raises(InputError, match="no text to speak"):
        synthesizer.speak(" ", Voice("en-us", "f1"))
    with pytest.raises(InputError, match=r"no phone of '\.\.\.'"):
        synthesizer.speak("...", Voice("en-us", "f1"))
    with pytest.raises(InputError, match="no voice 'xx-yy"):
        synthesizer.speak("go", Voice("xx-yy", "f1"))
    assert synthesizer.speak("go", Voice("en-us", "f1")).phones[0].phone == "ɡ"


def contents(folder):
    return {str(x.relative_to(folder)): x.read_bytes() for x in sorted(folder.rglob("*")) if x.is_file()}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("speech") / "made"
    return folder, synthesize(folder, SMALL)


@espeak
def test_a_folder_has_audio_texts_and_phones(made):
    folder, reports = made
    for name, least, voices in (("train", 12, 4), ("test", 5, 2)):
        rows = read_manifest(folder / name)
        report = reports[name]
        assert report.num_utterances == len(rows)
        assert least <= report.seconds == pytest.approx(sum(x.duration for x in rows))
        assert report.voices == tuple(sorted({x.speaker for x in rows}))
        assert 1 < len(report.voices) <= voices
        for row in rows:
            assert len(load_audio(row.audio)) / 16_000 == pytest.approx(row.duration, abs=1e-6)
            assert 0 <= row.phones[0].start < row.phones[-1].end <= row.duration + 1 / 16_000
            assert row.text.replace(" ", "").isalpha()
    assert not set(reports["train"].voices) & set(reports["test"].voices)


@espeak
def test_a_stopped_run_goes_on_to_the_same_files(made, tmp_path):
    folder, reports = made
    calls = []

    def stop(what, done, total):
        calls.append(what)
        if len(calls) == 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        synthesize(tmp_path / "a", SMALL, stop)
    assert not (tmp_path / "a" / "train" / "manifest.jsonl").exists()
    part = tmp_path / "a" / "train" / "manifest.jsonl.part"
    assert len(part.read_text(encoding="utf-8").splitlines()) == 3
    # As a kill would leave it: half a line, and audio that is missing.
    with open(part, "a", encoding="utf-8") as file:
        file.write('{"audio": "000003.fl')
    (tmp_path / "a" / "train" / "000002.flac").unlink()
    assert synthesize(tmp_path / "a", SMALL).keys() == reports.keys()
    assert contents(tmp_path / "a") == contents(folder)
    before = {x: x.stat().st_mtime_ns for x in (tmp_path / "a").rglob("*")}
    synthesize(tmp_path / "a", SMALL)
    assert {x: x.stat().st_mtime_ns for x in (tmp_path / "a").rglob("*.flac")}.items() <= before.items()


@espeak
def test_missing_audio_of_a_finished_folder_is_made_again(made, tmp_path):
    folder, reports = made
    shutil.copytree(folder, tmp_path / "a")
    for name in ("train/000000.flac", "train/000002.flac", "test/000001.flac"):
        (tmp_path / "a" / name).unlink()
    found = synthesize(tmp_path / "a", SMALL)
    assert contents(tmp_path / "a") == contents(folder)
    for name, report in reports.items():
        assert found[name].to_dict() | {"manifest": ""} == report.to_dict() | {"manifest": ""}
    manifest = tmp_path / "a" / "train" / "manifest.jsonl"
    manifest.write_bytes(manifest.read_bytes()[:-100])
    synthesize(tmp_path / "a", SMALL)
    assert contents(tmp_path / "a") == contents(folder)


@espeak
def test_voices_that_do_not_speak_are_not_counted(tmp_path):
    few = SynthesisSettings(hours=1 / 3600, test_hours=0, held_out_voices=0)
    report = synthesize(tmp_path, few)["train"]
    assert report.num_utterances == len(report.voices) == 1


@espeak
def test_a_separator_in_a_text_does_not_end_a_row(tmp_path, monkeypatch):
    few = SynthesisSettings(hours=4 / 3600, test_hours=0, held_out_voices=0)
    monkeypatch.setattr("modicum.speech.synthesis.folder.sentence", lambda *_: "go on\u2028and\x85stop")
    first = synthesize(tmp_path, few)["train"]
    (tmp_path / "train" / "manifest.jsonl").rename(tmp_path / "train" / "manifest.jsonl.part")
    before = (tmp_path / "train" / "000000.flac").stat().st_mtime_ns
    assert synthesize(tmp_path, few)["train"] == first
    assert (tmp_path / "train" / "000000.flac").stat().st_mtime_ns == before


@espeak
def test_a_full_disk_is_told_from_a_folder_that_cannot_be_written(tmp_path, monkeypatch):
    for code, remedy in (
        (errno.ENOSPC, "make room and run the same again"),
        (errno.EACCES, "can be written"),
    ):
        folder = tmp_path / str(code)

        def fail(self, data, code=code, write=Path.write_bytes):
            if ".flac" not in self.name:
                return write(self, data)
            raise OSError(code, os.strerror(code))

        with monkeypatch.context() as patched:
            patched.setattr("pathlib.Path.write_bytes", fail)
            with pytest.raises(InputError, match=f"{os.strerror(code)}; .*{remedy}"):
                synthesize(folder, SMALL)
        assert not list(folder.rglob("*.flac*"))


@espeak
def test_another_folder_or_other_settings_are_refused(made, tmp_path):
    folder, _ = made
    with pytest.raises(InputError, match="speech of another hours"):
        synthesize(folder, SynthesisSettings(hours=2, num_voices=4, held_out_voices=2))
    (tmp_path / "letter.txt").write_text("mine", encoding="utf-8")
    with pytest.raises(InputError, match=r"^\S* holds letter.txt and no synthetic speech: [^;:]*$"):
        synthesize(tmp_path, SMALL)
    (tmp_path / "file").write_text("", encoding="utf-8")
    with pytest.raises(InputError, match="cannot write to"):
        synthesize(tmp_path / "file", SMALL)
    shutil.copytree(folder, tmp_path / "broken")
    for text in ("{", "[]", "3", '{"settings": 3}', "[" * 100_000):
        (tmp_path / "broken" / "synthesis.json").write_text(text, encoding="utf-8")
        with pytest.raises(InputError, match=r"^[^\n]*synthesis\.json cannot be read"):
            synthesize(tmp_path / "broken", SMALL)


class Installed(Synthesizer):
    """espeak-ng after a voice more was installed, which changes the order of all."""

    def __enter__(self):
        super().__enter__()
        self.variants = (*self.variants, "new")
        return self


@espeak
@pytest.mark.parametrize("is_old", [False, True])
def test_a_folder_keeps_its_voices(made, tmp_path, monkeypatch, is_old):
    folder, reports = made
    shutil.copytree(folder, tmp_path / "a")
    path = tmp_path / "a" / "synthesis.json"
    claim = json.loads(path.read_text(encoding="utf-8"))
    for name, num in (("train", 4), ("test", 2)):
        assert len(claim["voices"][name]) == num
        assert set(reports[name].voices) <= set(claim["voices"][name])
    if is_old:  # of a version that did not keep them
        del claim["voices"]
        path.write_text(json.dumps(claim), encoding="utf-8")
    (tmp_path / "a" / "train" / "000001.flac").unlink()
    before = contents(tmp_path / "a")
    with monkeypatch.context() as patched:
        patched.setattr("modicum.speech.synthesis.folder.Synthesizer", Installed)
        message = "holds speech by .* none to train with" if is_old else "other voices of espeak-ng"
        with pytest.raises(InputError, match=f"{message}.*: install the voices again"):
            synthesize(tmp_path / "a", SMALL)
    assert contents(tmp_path / "a") == before
    synthesize(tmp_path / "a", SMALL)
    assert contents(tmp_path / "a") == contents(folder)


@espeak
def test_the_command_makes_noisy_speech_and_tells_of_it(tmp_path):
    options = ["--hours", "0.002", "--test-hours", "0", "--held-out-voices", "0", "--noise", "0,10"]
    command = ["speech", "synth", "--out", str(tmp_path / "a"), *options, "--format", "wav"]
    result = CliRunner().invoke(app, [*command, "--json"])
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    assert report["train"]["seconds"] >= 7.2
    assert list(report) == ["train"]
    quiet = load_audio(tmp_path / "a" / "train" / "000000.wav")[-400:]
    assert float(quiet.abs().max()) > 1e-3, "the pause at the end has no noise"
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 0, result.output
    assert "train: " in result.stdout
    result = CliRunner().invoke(app, [*command[:4], "--noise", "loud"])
    assert result.exit_code == 2
    assert "noise is 'loud'" in result.stderr
