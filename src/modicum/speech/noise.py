"""Noise: added to speech at a signal-to-noise ratio."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

import torch
from torch import Tensor

from modicum.errors import InputError
from modicum.speech.audio import AUDIO_SUFFIXES, SAMPLE_RATE, check_samples, is_silent, load_audio

NoiseKind = Literal["white", "coloured", "folder"]
"""Gaussian noise; Gaussian noise through a one-pole low-pass filter, AR(1); or recordings."""


@dataclass(frozen=True)
class NoiseSettings:
    """Settings of `AddNoise`.

    Attributes:
        snr: the lowest and the highest signal-to-noise ratio, in dB; each utterance draws one between.
        kind: see `NoiseKind`.
        coefficient: of AR(1), x_t = a·x_(t-1) + w_t: each utterance draws an a from 0 to this.
        folder: of noise recordings, for kind "folder".
        sample_rate: of the speech, for kind "folder".

    Raises:
        InputError: a number is out of range, or the folder has no audio.
    """

    snr: tuple[float, float] = (0.0, 20.0)
    kind: NoiseKind = "coloured"
    coefficient: float = 0.95
    folder: Path | None = None
    sample_rate: int = SAMPLE_RATE

    def __post_init__(self) -> None:
        low, high = self.snr
        if not -100 <= low <= high <= 100:
            raise InputError(
                f"the signal-to-noise ratio is from {low:g} to {high:g} dB: give two numbers within -100 and "
                "100, the lower one first"
            )
        if self.kind not in get_args(NoiseKind):
            raise InputError(f"noise is {self.kind!r}: choose one of {', '.join(get_args(NoiseKind))}")
        if not 0 <= self.coefficient < 1:
            raise InputError(f"the coefficient of AR(1) is {self.coefficient}: give 0 to below 1")
        if (self.kind == "folder") != (self.folder is not None):
            raise InputError('noise from recordings needs both kind="folder" and a folder: give both')


class AddNoise:
    """Adds noise to an utterance; the ratio is of mean squares over the whole of it."""

    def __init__(self, settings: NoiseSettings | None = None) -> None:
        self.settings = NoiseSettings() if settings is None else settings
        self._files: list[Path] = []
        if (folder := self.settings.folder) is not None:
            self._files = noise_files(folder)
            if not self._files:
                raise InputError(f"{folder} has no audio: give a folder with recordings of noise")

    def __call__(self, samples: Tensor, generator: torch.Generator) -> Tensor:
        """Samples [n] float32 with noise; silence stays silent.

        Raises:
            InputError: the samples are of another shape, or a noise recording is unreadable or silent.
        """
        check_samples(samples)
        low, high = self.settings.snr
        snr = low + (high - low) * _uniform(generator)
        return add_noise(samples, self._noise(len(samples), generator), snr)

    def _noise(self, num_samples: int, generator: torch.Generator) -> Tensor:
        if self.settings.kind == "folder":
            return self._recorded(num_samples, generator)
        white = torch.randn(num_samples, generator=generator, dtype=torch.float64)
        if self.settings.kind == "white":
            return white
        return autoregressive(white, self.settings.coefficient * _uniform(generator))

    def _recorded(self, num_samples: int, generator: torch.Generator) -> Tensor:
        """A stretch of a recording, repeated if it is too short."""
        path = self._files[int(torch.randint(len(self._files), (), generator=generator))]
        recorded = load_audio(path, self.settings.sample_rate)
        if is_silent(recorded):
            raise InputError(f"the noise in {path} is silent: leave it out")
        start = int(torch.randint(len(recorded), (), generator=generator))
        return recorded.roll(-start).repeat(math.ceil(num_samples / len(recorded)))[:num_samples]


def noise_files(folder: Path) -> list[Path]:
    """The recordings of a folder of noise, at any depth, in the order in which `AddNoise` counts them."""
    return sorted(x for x in folder.rglob("*") if x.suffix.lower() in AUDIO_SUFFIXES)


def add_noise(samples: Tensor, noise: Tensor, snr: float) -> Tensor:
    """Speech [n] plus noise [n] scaled so that Σ speech² / Σ noise² is 10^(snr / 10): [n] float32.

    Computed in float64. Noise of zeros is added as it is, and to silence nothing is added.

    Raises:
        InputError: they are not of one length.
    """
    if samples.shape != noise.shape:
        raise InputError(f"{len(noise):,} samples of noise are for {len(samples):,} of speech: give as many")
    speech, wide = samples.double(), noise.double()
    power = float(wide.square().sum())
    if not power:
        return samples.float()
    scale = math.sqrt(float(speech.square().sum()) / power * 10 ** (-snr / 10))
    return (speech + scale * wide).float()


def autoregressive(white: Tensor, coefficient: float) -> Tensor:
    """AR(1): x_t = a·x_(t-1) + w_t of w [n], stationary from its start.

    Computed as 1 / (1 - a·z⁻¹) = Π_i (1 + a^(2^i)·z^(-2^i)), in log2(n) passes.
    """
    found = white.clone()
    found[:1] /= math.sqrt(1 - coefficient**2)
    shift, factor = 1, coefficient
    while shift < len(found) and factor:
        delayed = found[:-shift] * factor
        found[shift:] += delayed
        shift, factor = 2 * shift, factor * factor
    return found


def _uniform(generator: torch.Generator) -> float:
    return float(torch.rand((), generator=generator, dtype=torch.float64))
