"""Folder: synthetic speech for training and, by other voices, for testing, with manifests."""

from __future__ import annotations

import json
import os
import random
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from modicum.errors import InputError
from modicum.speech.audio import SAMPLE_RATE, resample, write_audio
from modicum.speech.faults import is_full, listed
from modicum.speech.manifest import MANIFEST, Utterance, manifest_line
from modicum.speech.noise import AddNoise, NoiseSettings
from modicum.speech.synthesis.sentences import DOMAINS, check_domains, sentence
from modicum.speech.synthesis.synthesizer import Synthesizer
from modicum.speech.synthesis.voice import Voice, split_voices
from modicum.whole_file import write_json, write_whole

FILE = "synthesis.json"
_FORMAT = 1
_PART = f"{MANIFEST}.part"
_PITCH, _RATE = 8, 15
"""An utterance's pitch and rate are off from its voice's by so much at most."""

_REMEDY = "install the voices again that it was begun with, or give another folder"

Progress = Callable[[str, int, int], object]
"""Called with what is made, seconds of speech done, and in all."""


@dataclass(frozen=True)
class SynthesisSettings:
    """What is spoken, by whom.

    Attributes:
        hours: of speech to train with.
        test_hours: of speech by held-out voices; 0 for none.
        num_voices: to train with; None for all that are not held out.
        held_out_voices: to test with.
        domains: of the sentences: see `DOMAINS`.
        noise_snr: lowest and highest signal-to-noise ratio of coloured noise, in dB; None for clean speech.
        suffix: ".flac" or ".wav".
        sample_rate: of the files, per second.
        seed: of sentences, voices and noise.

    Raises:
        InputError: a value is out of range.
    """

    hours: float = 1.0
    test_hours: float = 0.1
    num_voices: int | None = None
    held_out_voices: int = 8
    domains: tuple[str, ...] = tuple(DOMAINS)
    noise_snr: tuple[float, float] | None = None
    suffix: str = ".flac"
    sample_rate: int = SAMPLE_RATE
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 < self.hours <= 1000:
            raise InputError(f"hours is {self.hours}: give more than 0 and at most 1000")
        if not 0 <= self.test_hours <= 1000:
            raise InputError(f"test_hours is {self.test_hours}: give 0 to 1000")
        if (self.test_hours > 0) != (self.held_out_voices > 0):
            raise InputError(
                f"there are {self.test_hours:g} hours by {self.held_out_voices} held-out voices: give both, "
                "or 0 for both"
            )
        if self.suffix not in (".flac", ".wav"):
            raise InputError(f"the suffix is {self.suffix!r}: give .flac or .wav")
        if not 8000 <= self.sample_rate <= 48_000:
            raise InputError(f"the sample rate is {self.sample_rate}: give 8000 to 48000")
        check_domains(self.domains)
        if self.noise_snr is not None:
            NoiseSettings(snr=self.noise_snr)


@dataclass(frozen=True)
class SplitReport:
    """What one manifest holds."""

    manifest: Path
    num_utterances: int
    seconds: float
    voices: tuple[str, ...]
    """That speak in it, sorted."""

    def to_dict(self) -> dict[str, Any]:
        """As JSON takes it."""
        return asdict(self) | {"manifest": str(self.manifest)}


def synthesize(
    out: str | Path, settings: SynthesisSettings | None = None, progress: Progress | None = None
) -> dict[str, SplitReport]:
    """Write speech to `out`/train and, by held-out voices, to `out`/test, each with a manifest.jsonl.

    Each manifest names text, voice, duration and the times of the phones. A run that was stopped goes on with
    the next utterance if it is started again, and gives the same files. A manifest appears when its speech is
    whole. Audio that is missing from a finished folder is made again.

    Args:
        out: a new or empty folder, or one of the same settings.
        settings: what is spoken.
        progress: see `Progress`.

    Returns:
        Of "train" and, if it is there, "test".

    Raises:
        InputError: espeak-ng is not installed, there are too few voices, the folder holds something else or
            was begun with other voices of espeak-ng, or it cannot be written.
    """
    out, settings = Path(out), settings or SynthesisSettings()
    with Synthesizer() as synthesizer:
        voices = split_voices(synthesizer.variants, settings.num_voices, settings.held_out_voices)
        splits = [
            _Split(name, hours, own, out / name, settings)
            for name, hours, own in (
                ("train", settings.hours, voices.train),
                ("test", settings.test_hours, voices.held_out),
            )
            if hours
        ]
        _claim(out, settings, splits)
        reports = {}
        for split in splits:
            try:
                reports[split.name] = split.write(synthesizer, progress or (lambda *_: None))
            except OSError as error:
                remedy = "make room" if is_full(error) else "see that the folder can be written"
                raise InputError(
                    f"cannot write to {split.folder}: {error.strerror or error}; {remedy} and run the same "
                    "again, which goes on where it stopped"
                ) from error
        return reports


@dataclass(frozen=True)
class _Split:
    """The speech of one manifest."""

    name: str
    hours: float
    voices: Sequence[Voice]
    folder: Path
    settings: SynthesisSettings

    def write(self, synthesizer: Synthesizer, tell: Progress) -> SplitReport:
        """Write what is not there yet."""
        self.folder.mkdir(parents=True, exist_ok=True)
        whole, part = self.folder / MANIFEST, self.folder / _PART
        wanted = self.hours * 3600
        rows = self._rows()
        changed = self._repair(rows, synthesizer)
        seconds = sum(row["duration"] for row in rows)
        if changed or seconds < wanted or not whole.exists():
            write_whole(part, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
            with open(part, "a", encoding="utf-8") as file:
                while seconds < wanted:
                    tell(f"speech to {self.name} with", int(seconds), int(wanted))
                    utterance = self._utterance(len(rows), synthesizer)
                    line = manifest_line(utterance, self.folder)
                    file.write(line + "\n")
                    file.flush()
                    rows.append(json.loads(line))
                    seconds += utterance.duration
                os.fsync(file.fileno())
            os.replace(part, whole)
        tell(f"speech to {self.name} with", int(wanted), int(wanted))
        return SplitReport(whole, len(rows), seconds, tuple(sorted({row["speaker"] for row in rows})))

    def check_speakers(self) -> None:
        """Raise if a voice speaks in the folder that is none of this split's."""
        others = {str(row["speaker"]) for row in self._rows()} - {voice.name for voice in self.voices}
        if others:
            raise InputError(
                f"{self.folder} holds speech by {listed(sorted(others))}, and with the voices of espeak-ng "
                f"that are installed now these are none to {self.name} with: {_REMEDY}"
            )

    def _rows(self) -> list[dict[str, Any]]:
        """The rows of the manifest, whole or not, up to the first that is not as `write` makes it."""
        path = self.folder / MANIFEST
        if not path.exists():
            path = self.folder / _PART
        rows: list[dict[str, Any]] = []
        try:
            # Not splitlines, which also divides at what JSON leaves inside a line, as U+2028.
            lines = path.read_text(encoding="utf-8", errors="replace").split("\n")
        except FileNotFoundError:
            return rows
        for line in lines:
            try:
                row = json.loads(line)
                is_ours = row["audio"] == self._name(len(rows)) and row["duration"] > 0 and "speaker" in row
            except (ValueError, TypeError, KeyError, RecursionError):
                break
            if not is_ours:
                break
            rows.append(row)
        return rows

    def _repair(self, rows: list[dict[str, Any]], synthesizer: Synthesizer) -> bool:
        """Make audio that is missing, and its row; whether a row has changed."""
        changed = False
        for index, row in enumerate(rows):
            if not (self.folder / row["audio"]).is_file():
                made = json.loads(manifest_line(self._utterance(index, synthesizer), self.folder))
                changed, rows[index] = changed or made != row, made
        return changed

    def _name(self, index: int) -> str:
        return f"{index:06d}{self.settings.suffix}"

    def _utterance(self, index: int, synthesizer: Synthesizer) -> Utterance:
        """Make an utterance, which depends on nothing but its number, and its file."""
        key = f"{self.settings.seed} {self.name} {index}"
        chance = random.Random(f"voice {key}")
        voice = self.voices[chance.randrange(len(self.voices))]
        said = replace(
            voice,
            pitch=voice.pitch + chance.randint(-_PITCH, _PITCH),
            rate=voice.rate + chance.randint(-_RATE, _RATE),
        )
        text = sentence(self.settings.domains, f"text {key}")
        speech = synthesizer.speak(text, said)
        samples = resample(speech.samples, speech.sample_rate, self.settings.sample_rate)
        if self.settings.noise_snr is not None:
            noise = AddNoise(NoiseSettings(snr=self.settings.noise_snr))
            samples = noise(samples, torch.Generator().manual_seed(chance.getrandbits(62)))
            # Loud noise must not be clipped when it is written.
            samples = samples / max(1.0, float(samples.abs().max()))
        path = self.folder / self._name(index)
        write_audio(path, samples, self.settings.sample_rate)
        duration = round(len(samples) / self.settings.sample_rate, 6)
        return Utterance(path, text, voice.name, duration, speech.phones)


def _claim(out: Path, settings: SynthesisSettings, splits: Sequence[_Split]) -> None:
    """Make the folder one of these settings and voices, or check that it is.

    A folder of an earlier version does not hold its voices: those that speak in it are checked, and the
    present ones are kept from then on.
    """
    voices = {split.name: [voice.name for voice in split.voices] for split in splits}
    about = json.loads(json.dumps({"format": _FORMAT, "settings": asdict(settings), "voices": voices}))
    path = out / FILE
    try:
        out.mkdir(parents=True, exist_ok=True)
        if not path.exists():
            if other := next((x.name for x in out.iterdir() if not x.name.startswith(".")), None):
                raise InputError(f"{out} holds {other} and no synthetic speech: give a new or empty folder")
            write_json(path, about)
        known = _read_claim(path)
        _check_claim(out, known, about)
        if "voices" not in known:
            for split in splits:
                split.check_speakers()
            write_json(path, about)
    except OSError as error:
        remedy = "make room" if is_full(error) else "give a folder that can be written"
        raise InputError(f"cannot write to {out}: {error.strerror or error}; {remedy}") from error


def _read_claim(path: Path) -> dict[str, Any]:
    try:
        known = json.loads(path.read_text(encoding="utf-8"))
        return {**known, "settings": dict(known["settings"])}
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise InputError(f"{path} cannot be read ({error}): give a new or empty folder") from error


def _check_claim(out: Path, known: dict[str, Any], about: dict[str, Any]) -> None:
    """Raise if the folder was begun with other settings or voices."""
    old, new = known["settings"], about["settings"]
    if {**known, "voices": None} != {**about, "voices": None}:
        name = next((x for x in new if old.get(x) != new[x]), "format")
        raise InputError(
            f"{out} holds speech of another {name}, {old.get(name)} and not {new.get(name)}: repeat what it "
            "was begun with, or give another folder"
        )
    if known.get("voices", about["voices"]) != about["voices"]:
        raise InputError(
            f"{out} was begun with other voices of espeak-ng than are installed now, listed in {out / FILE}, "
            f"and those to test with would not be others than those to train with: {_REMEDY}"
        )
