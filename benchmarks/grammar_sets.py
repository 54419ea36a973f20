"""The command sets of benchmarks/grammar.py: words and digits by people, sentences by a synthesizer."""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from modicum.speech import Synthesizer, read_digits, save_audio
from modicum.speech.augment import resample
from modicum.speech.grammar import Recording, read_other_speech, read_recordings
from modicum.speech.noise import AddNoise, NoiseSettings
from modicum.speech.synthesis import Voice, sentence, split_voices

SETS = ("wake words", "digits", "synthetic")
SYNTHETIC = (
    "turn on the radio",
    "turn off the radio",
    "open the window",
    "close the window",
    "lock the door",
    "check the oven",
    "play the next song",
    "skip this song",
    "pause the video",
    "call my brother",
    "call my doctor",
    "volume up",
    "volume down",
    "set the alarm",
    "cancel the alarm",
)


@dataclass(frozen=True)
class Sizes:
    """How much is measured."""

    per_command: int = 300
    """Recordings of a command, at most."""
    others: int = 1500
    """Recordings of other speech, at most."""
    voices: int = 6
    """Of synthetic speech, to search with and as many to test with: those that the embedded recognizer has
    not learned from."""
    general: int = 600
    """Synthetic sentences to learn a dictionary from."""
    seeds: tuple[int, ...] = (0, 1, 2)
    timed: int = 20


QUICK = Sizes(30, 150, 3, 60, seeds=(0,), timed=3)


@dataclass(frozen=True)
class Trial:
    """One division of a command set."""

    commands: tuple[str, ...]
    general: list[Recording]
    """To learn the dictionary from."""
    search: list[Recording]
    test: list[Recording]
    search_others: list[Recording]
    test_others: list[Recording]


PARTS = ("general", "search", "test", "search_others", "test_others")
"""Of a trial."""


def wake_words(data: Path, work: Path, sizes: Sizes, seed: int) -> Trial:
    """Four of six words by people; other speech are the other two words, and pieces of orders of drinks."""
    chance = random.Random(seed)
    recordings = _some(read_recordings(data / "voice_commands" / "wake_words"), sizes.per_command)
    words = sorted({one.text for one in recordings})
    left_out = chance.sample(words, 2)
    commands = tuple(word for word in words if word not in left_out)
    own = [one for one in recordings if one.text in commands]
    foreign = [one for one in recordings if one.text in left_out]
    pieces = read_other_speech(data / "voice_commands" / "barista", 2.0)
    random.Random(0).shuffle(pieces)
    others = [*foreign[: sizes.others // 3], *pieces[: sizes.others - sizes.others // 3]]
    one, two = _halves(own, lambda r: r.text, chance)
    three, four = _halves(others, lambda r: "", chance)
    return Trial(commands, one, one, two, three, four)


def digits(data: Path, work: Path, sizes: Sizes, seed: int) -> Trial:
    """Ten digits by six speakers, three to search with; pieces of orders of drinks without digits."""
    chance = random.Random(seed)
    found = [Recording(u.audio, u.text, speaker=u.speaker) for u in read_digits(data / "fsdd")]
    speakers = sorted({one.speaker for one in found})
    chance.shuffle(speakers)
    recordings = _some(found, sizes.per_command)
    labels = json.loads((data / "voice_commands" / "barista" / "labels.json").read_text())
    with_digit = {name for name, slots in labels.items() if "eight" in slots.get("size", "").split()}
    pieces = [
        one
        for one in read_other_speech(data / "voice_commands" / "barista", 1.0)
        if one.audio.name not in with_digit
    ]
    random.Random(0).shuffle(pieces)
    three, four = _halves(pieces[: sizes.others], lambda r: "", chance)
    one = [r for r in recordings if r.speaker in speakers[:3]]
    two = [r for r in recordings if r.speaker not in speakers[:3]]
    return Trial(tuple(sorted({r.text for r in found})), one, one, two, three, four)


def synthetic(data: Path, work: Path, sizes: Sizes, seed: int) -> Trial:
    """Fifteen commands by espeak-ng, with voices of their own to test with; noise of 5 to 25 dB."""
    folder = work / "synthetic"
    with Synthesizer() as synthesizer:
        split = split_voices(synthesizer.variants, None, 2 * sizes.voices)
        # Of the held-out voices, on which the embedded recognizer was not trained, half to search with.
        voices = list(split.held_out)
        random.Random(seed).shuffle(voices)
        parts = (voices[: sizes.voices], voices[sizes.voices :])
        per_voice = max(1, sizes.per_command // (4 * sizes.voices))
        own = [
            [
                _spoken(synthesizer, folder, text, voice, n)
                for voice in part
                for text in SYNTHETIC
                for n in range(per_voice)
            ]
            for part in parts
        ]
        others = [
            [
                _spoken(synthesizer, folder, _short(f"{n} {side}"), part[n % len(part)], n, "")
                for n in range(sizes.others // 2)
            ]
            for side, part in enumerate(parts)
        ]
        general = [
            _spoken(
                synthesizer, folder, sentence(("commands",), f"general {n}"), parts[0][n % len(parts[0])], n
            )
            for n in range(sizes.general)
        ]
    return Trial(SYNTHETIC, [*general, *own[0]], own[0], own[1], others[0], others[1])


TRIALS: dict[str, Callable[[Path, Path, Sizes, int], Trial]] = dict(
    zip(SETS, (wake_words, digits, synthetic), strict=True)
)


def _short(seed: str) -> str:
    """Two to five words of a sentence that is no command."""
    chance = random.Random(seed)
    words = sentence(("statements", "digits"), seed).split()
    size = chance.randint(2, 5)
    start = chance.randrange(max(1, len(words) - size + 1))
    return " ".join(words[start : start + size])


def _spoken(
    synthesizer: Synthesizer, folder: Path, text: str, voice: Voice, number: int, label: str | None = None
) -> Recording:
    """A file of its own for text, voice and number; made once."""
    name = hashlib.sha256(f"{text} {voice} {number}".encode()).hexdigest()[:16]
    path = folder / f"{name}.flac"
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        chance = random.Random(name)
        said = replace(
            voice, pitch=min(99, max(0, voice.pitch + chance.randint(-15, 15))), rate=chance.randint(120, 210)
        )
        speech = synthesizer.speak(text, said)
        samples = resample(speech.samples, speech.sample_rate, 16_000)
        noise = AddNoise(NoiseSettings((5.0, 25.0)))
        samples = noise(samples, torch.Generator().manual_seed(chance.getrandbits(62)))
        save_audio(path, samples / max(1.0, float(samples.abs().max())))
    return Recording(path, text if label is None else label, speaker=voice.name)


def _some(recordings: Sequence[Recording], most: int) -> list[Recording]:
    """Of each text at most so many, the same ones in every run."""
    kept: list[Recording] = []
    for text in sorted({one.text for one in recordings}):
        own = [one for one in recordings if one.text == text]
        random.Random(f"some {text}").shuffle(own)
        kept += own[:most]
    return kept


def _halves(
    recordings: Sequence[Recording], group: Callable[[Recording], str], chance: random.Random
) -> tuple[list[Recording], list[Recording]]:
    """Two halves of each group; no file is in both."""
    first: list[Recording] = []
    second: list[Recording] = []
    for name in sorted({group(one) for one in recordings}):
        files = sorted({str(one.audio) for one in recordings if group(one) == name})
        chance.shuffle(files)
        early = set(files[: len(files) // 2])
        for one in recordings:
            if group(one) == name:
                (first if str(one.audio) in early else second).append(one)
    return first, second
