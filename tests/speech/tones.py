"""Tones: a language of three letters, each a sine of its own pitch, that a tiny model learns in seconds."""

from __future__ import annotations

import math
from pathlib import Path

import torch

from modicum.speech import PhoneInterval, Utterance, save_audio, write_manifest

RATE = 16_000
PITCHES = {"a": 300.0, "b": 900.0, "c": 2200.0}
"""Of each letter, in Hz."""


def write_tones(folder: Path, num: int = 24, seed: int = 0) -> list[Utterance]:
    """Utterances of 2 to 5 letters with noise at about 20 dB, and manifest.jsonl in the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    generator = torch.Generator().manual_seed(seed)
    utterances = []
    for index in range(num):
        letters = ["abc"[one] for one in torch.randint(3, (2 + index % 4,), generator=generator).tolist()]
        samples, phones, at = [torch.zeros(RATE // 20)], [], RATE // 20
        for letter in letters:
            length = int(torch.randint(RATE // 10, RATE // 6, (1,), generator=generator))
            time = torch.arange(length) / RATE
            samples += [0.3 * torch.sin(2 * math.pi * PITCHES[letter] * time), torch.zeros(RATE // 20)]
            phones.append(PhoneInterval(letter, at / RATE, (at + length) / RATE))
            at += length + RATE // 20
        sound = torch.cat(samples)
        sound = sound + 0.02 * torch.randn(len(sound), generator=generator)
        path = folder / f"{index:03}.wav"
        save_audio(path, sound, RATE)
        utterances.append(Utterance(path, "".join(letters), "tone", len(sound) / RATE, tuple(phones)))
    write_manifest(folder / "manifest.jsonl", utterances)
    return utterances
