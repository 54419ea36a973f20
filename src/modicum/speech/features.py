"""Features: log mel filter-bank energies of speech, by kaldi-native-fbank."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
import torch
from torch import Tensor

from modicum.errors import InputError
from modicum.packages import import_package
from modicum.speech.audio import SAMPLE_RATE, check_samples

Normalization = Literal["utterance", "none"]
"""Of each mel channel: to mean 0 and variance 1 over the utterance's frames, or none."""

SHERPA_HIGH_FREQUENCY = -400.0
"""The mel filters of sherpa-onnx and icefall end so much below half the sample rate, in Hz."""

_LEAST_STANDARD_DEVIATION = 1e-3
"""Below it a channel is constant: in silence the division would make noise of rounding errors."""


@dataclass(frozen=True)
class FeatureSettings:
    """Settings of `Fbank`, with Kaldi's names and defaults where not said otherwise.

    Attributes:
        sample_rate: of the samples, per second.
        num_mels: mel channels.
        frame_length_ms: of the window, in milliseconds.
        frame_shift_ms: from frame to frame, in milliseconds.
        dither: standard deviation of noise that is added to samples; 0 (Kaldi has 1 of 32,768) makes features
            repeatable.
        normalization: see `Normalization`.
        high_frequency: the upper end of the mel filters, in Hz; 0 for half the sample rate, below 0 for so
            much less than that, as in Kaldi.

    Raises:
        InputError: a number is out of range.
    """

    sample_rate: int = SAMPLE_RATE
    num_mels: int = 40
    frame_length_ms: float = 25.0
    frame_shift_ms: float = 10.0
    dither: float = 0.0
    normalization: Normalization = "utterance"
    high_frequency: float = 0.0

    def __post_init__(self) -> None:
        if self.sample_rate < 1000:
            raise InputError(f"the sample rate is {self.sample_rate} Hz: give at least 1000")
        if not 4 <= self.num_mels <= 128:
            raise InputError(f"num_mels is {self.num_mels}: give 4 to 128 channels; 40 or 80 are usual")
        if not 1 <= self.frame_shift_ms <= self.frame_length_ms <= 1000:
            raise InputError(
                f"frames of {self.frame_length_ms:g} ms each {self.frame_shift_ms:g} ms: give a shift of at "
                "least 1 ms and at most the length, as 25 and 10"
            )
        if not 0 <= self.dither < 1:
            raise InputError(f"dither is {self.dither:g}: give 0, or a small part of 1")
        if not self.sample_rate / 4 <= self.highest_frequency <= self.sample_rate / 2:
            raise InputError(
                f"high_frequency is {self.high_frequency:g} Hz at {self.sample_rate} Hz: give "
                f"{self.sample_rate / 4:g} to {self.sample_rate / 2:g}, 0 for all, or less than 0"
            )
        if self.normalization not in get_args(Normalization):
            raise InputError(
                f"normalization is {self.normalization!r}: choose one of {', '.join(get_args(Normalization))}"
            )

    @property
    def highest_frequency(self) -> float:
        """Of the mel filters, in Hz."""
        half = self.sample_rate / 2
        return self.high_frequency if self.high_frequency > 0 else half + self.high_frequency

    @property
    def frame_shift(self) -> int:
        """In samples, rounded down as Kaldi does."""
        return int(self.sample_rate * self.frame_shift_ms / 1000)

    @property
    def frame_length(self) -> int:
        """In samples, rounded down as Kaldi does."""
        return int(self.sample_rate * self.frame_length_ms / 1000)

    @property
    def frames_per_second(self) -> float:
        """Frames of a second of audio."""
        return self.sample_rate / self.frame_shift


class Fbank:
    """Log mel energies, as Kaldi computes them.

    Frame t is centred at sample (t + 1/2) · shift; samples beyond the ends are mirrored (Kaldi's
    snip_edges=false, which lhotse and icefall use). So n samples give round(n / shift) frames. Each frame has
    its mean removed, pre-emphasis of 0.97, the "povey" window, a power spectrum of the next power of two, and
    mel filters from 20 Hz to half the sample rate.

    Raises:
        InputError: there are more mel channels than frames of this length can fill.
    """

    def __init__(self, settings: FeatureSettings | None = None) -> None:
        self.settings = FeatureSettings() if settings is None else settings
        self._knf = import_package("kaldi_native_fbank", "speech")
        self._options = self._knf.FbankOptions()
        frames, mels = self._options.frame_opts, self._options.mel_opts
        frames.samp_freq = self.settings.sample_rate
        frames.frame_length_ms = self.settings.frame_length_ms
        frames.frame_shift_ms = self.settings.frame_shift_ms
        frames.dither = self.settings.dither
        frames.snip_edges = False
        mels.num_bins, mels.high_freq = self.settings.num_mels, self.settings.high_frequency
        try:
            self._knf.OnlineFbank(self._options)
        except (ValueError, RuntimeError) as error:
            raise InputError(
                f"num_mels is {self.settings.num_mels}, too many for frames of "
                f"{self.settings.frame_length_ms:g} ms at {self.settings.sample_rate:,} Hz: give fewer "
                "channels"
            ) from error

    def __call__(self, samples: Tensor) -> Tensor:
        """Features of samples [n] in -1 to 1: [frames, num_mels] float32.

        Raises:
            InputError: the samples are of another shape, are not numbers, or are fewer than half a shift.
        """
        check_samples(samples)
        num_frames = self.num_frames(len(samples))
        if not num_frames:
            raise InputError(
                f"{len(samples)} samples make no frame of {self.settings.frame_shift}: leave this recording "
                "out"
            )
        online = self.online()
        online.accept_waveform(self.settings.sample_rate, samples.detach().float().cpu().numpy())
        online.input_finished()
        # Each frame's buffer belongs to the extractor.
        energies = np.stack([online.get_frame(index) for index in range(num_frames)])
        return self._normalized(torch.from_numpy(energies))

    def online(self) -> Any:
        """A new `kaldi_native_fbank.OnlineFbank`, for audio that arrives in pieces; not normalised."""
        return self._knf.OnlineFbank(self._options)

    def num_frames(self, num_samples: int) -> int:
        """Frames of so many samples: round(num_samples / shift), halves upwards."""
        shift = self.settings.frame_shift
        return math.floor((num_samples + shift // 2) / shift)

    def _normalized(self, energies: Tensor) -> Tensor:
        if self.settings.normalization == "none":
            return energies
        wide = energies.double()
        deviation = wide.std(0, correction=0)
        centred = wide - wide.mean(0)
        scaled = torch.where(
            deviation > _LEAST_STANDARD_DEVIATION,
            centred / deviation.clamp_min(_LEAST_STANDARD_DEVIATION),
            0.0,
        )
        return scaled.float()
