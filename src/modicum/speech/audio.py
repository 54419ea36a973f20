"""Audio files: read as mono samples at the wanted rate, and written."""

from __future__ import annotations

import io
import os
import sys
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from modicum.errors import InputError
from modicum.packages import import_package
from modicum.speech.faults import is_full
from modicum.whole_file import write_whole

SAMPLE_RATE = 16_000
"""Samples per second of a model's input, unless it says otherwise."""

AUDIO_SUFFIXES = (".wav", ".flac", ".opus", ".ogg", ".mp3")
"""What a folder of audio is searched for."""

_STEPS = 32_768
"""Of a 16-bit sample, from 0 to 1."""


@dataclass(frozen=True)
class AudioInfo:
    """What a file's header says."""

    sample_rate: int
    """Samples per second."""
    num_samples: int
    """Of each channel."""
    num_channels: int

    @property
    def duration(self) -> float:
        """In seconds."""
        return self.num_samples / self.sample_rate


def audio_info(path: str | Path) -> AudioInfo:
    """The header of an audio file; the samples are not read.

    Raises:
        InputError: it is missing or no audio file.
    """
    soundfile = import_package("soundfile", "speech")
    try:
        info = soundfile.info(soundfile_name(path))
    except (OSError, RuntimeError) as error:
        raise unreadable(path, error) from error
    return AudioInfo(info.samplerate, info.frames, info.channels)


def load_audio(path: str | Path, sample_rate: int = SAMPLE_RATE) -> Tensor:
    """Read an audio file: wav, flac, opus or what else libsndfile reads.

    Channels are averaged. Samples of another rate are resampled by soxr (quality "HQ"), with a warning.

    Args:
        path: of the file.
        sample_rate: wanted, in samples per second.

    Returns:
        [samples] float32; files of whole numbers give -1 to 1.

    Raises:
        InputError: the file is missing, unreadable or empty, or holds samples that are not numbers.
    """
    soundfile = import_package("soundfile", "speech")
    try:
        samples, rate = soundfile.read(soundfile_name(path), dtype="float32", always_2d=True)
    except (OSError, RuntimeError) as error:
        raise unreadable(path, error) from error
    mono = samples.mean(1, dtype=np.float64).astype(np.float32)
    if not len(mono):
        raise InputError(f"{path} has no samples: give a file with sound, or leave it out")
    if not np.isfinite(mono).all():
        raise InputError(
            f"sample {int(np.isfinite(mono).argmin()):,} of {path} is not a number (inf or nan): write the "
            "file again, or leave it out"
        )
    if rate != sample_rate:
        warnings.warn(f"audio of {rate:,} Hz is resampled to {sample_rate:,} Hz", stacklevel=2)
    return resample(torch.from_numpy(mono), rate, sample_rate)


def save_audio(path: str | Path, samples: Tensor, sample_rate: int = SAMPLE_RATE) -> None:
    """Write mono samples in 16 bits; the suffix (.wav, .flac, .ogg) says the format.

    The file appears whole or not at all. Samples are rounded to nearest; those beyond -1 to 1 are clipped.

    Args:
        path: of the file; its folder must exist.
        samples: [samples] float, nominally -1 to 1.
        sample_rate: in samples per second.

    Raises:
        InputError: the samples are of another shape or not numbers, or the file cannot be written.
    """
    try:
        write_audio(path, samples, sample_rate)
    except OSError as error:
        remedy = "make room" if is_full(error) else "give a folder that can be written"
        raise InputError(f"cannot write {path}: {error.strerror or error}; {remedy}") from error


def write_audio(path: str | Path, samples: Tensor, sample_rate: int = SAMPLE_RATE) -> None:
    """`save_audio` for callers that tell themselves why a file could not be written.

    Raises:
        InputError: the samples are of another shape or not numbers, or the suffix is none of audio.
        OSError: the file cannot be written.
    """
    soundfile = import_package("soundfile", "speech")
    check_samples(samples)
    path = Path(path)
    kind = path.suffix[1:].upper()
    if kind not in soundfile.available_formats():
        raise InputError(f"{path} has the suffix {path.suffix!r}: give .wav, .flac or .ogg")
    # libsndfile rounds down in some formats and to nearest in others.
    steps = samples.detach().double().mul(_STEPS).round().clamp(-_STEPS, _STEPS - 1)
    quantized: Any = steps.to(torch.int16).cpu().numpy()
    data = io.BytesIO()  # libsndfile does not say why it could not write a file
    try:
        soundfile.write(data, quantized, sample_rate, format=kind)
    except RuntimeError as error:
        raise InputError(f"cannot write {path}: {error}; give .wav, .flac or .ogg") from error
    write_whole(path, data.getbuffer())


def resample(samples: Tensor, rate: int, wanted: int) -> Tensor:
    """Samples [n] of one rate at another: [about n · wanted / rate] float32.

    Raises:
        InputError: a rate is below 1.
    """
    for one in (rate, wanted):
        if one < 1:
            raise InputError(f"the sample rate is {one}: give samples per second, such as 16000")
    if rate == wanted:
        return samples.float()
    soxr = import_package("soxr", "speech")
    return torch.from_numpy(soxr.resample(samples.float().numpy(), rate, wanted, quality="HQ"))


def is_silent(samples: Tensor) -> bool:
    """Whether no sample is above one step of 16 bits."""
    return not len(samples) or float(samples.abs().max()) <= 1 / _STEPS


def check_samples(samples: Tensor) -> None:
    """Raise unless they are mono samples [n] with n of at least 1, all of them numbers.

    Raises:
        InputError: they are not.
    """
    if samples.dim() != 1 or not len(samples) or not samples.is_floating_point():
        raise InputError(
            f"samples are {tuple(samples.shape)} {samples.dtype}: give floating-point ones of shape [samples]"
        )
    if not bool(samples.isfinite().all()):
        raise InputError("samples hold numbers that are inf or nan: leave this recording out")


def soundfile_name(path: str | Path) -> str | bytes:
    """A file's name as soundfile takes it, which refuses names that are not UTF-8, unless they are bytes."""
    name = str(path)
    try:
        name.encode()
    except UnicodeEncodeError:
        return name if sys.platform == "win32" else os.fsencode(name)
    return name


def unreadable(path: str | Path, error: Exception) -> InputError:
    """What to say of a file that soundfile could not read."""
    if not Path(path).exists():
        return InputError(f"there is no audio file {path}: give the path of a wav, flac or opus file")
    return InputError(f"{path} cannot be read as audio ({error}): give a wav, flac or opus file")
