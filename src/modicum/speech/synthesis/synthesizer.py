"""Synthesizer: speech with the times of its phones, by espeak-ng."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor

import modicum
from modicum.errors import InputError
from modicum.speech.manifest import PhoneInterval
from modicum.speech.synthesis.voice import Voice

_MICROSECONDS = 6
"""Digits of a time in seconds."""

_INSTALL = "install it, on Debian and Ubuntu with apt install espeak-ng"


@dataclass(frozen=True)
class Speech:
    """A spoken text."""

    samples: Tensor
    """[samples] float32 in -1 to 1."""
    sample_rate: int
    phones: tuple[PhoneInterval, ...]
    """In the order of time, without silence."""

    @property
    def duration(self) -> float:
        """In seconds."""
        return len(self.samples) / self.sample_rate


class Synthesizer:
    """Speaks texts; the same text, voice, rate and pitch give the same samples, whatever was spoken before.

    Use it in a `with` statement: espeak-ng runs in a process of its own, one for each text (see `worker`).

    Attributes:
        sample_rate: of the speech, per second.
        variants: voice variants that are installed.

    Raises:
        InputError: espeak-ng is not installed, or this system cannot fork.
    """

    sample_rate: int
    variants: tuple[str, ...]

    def __enter__(self) -> Self:
        if not hasattr(os, "fork"):
            raise InputError("synthetic speech needs a system that can fork, such as Linux: make it there")
        source = str(Path(modicum.__file__).parent.parent)
        paths = [source, *filter(None, [os.environ.get("PYTHONPATH")])]
        self._process = subprocess.Popen(
            [sys.executable, "-m", "modicum.speech.synthesis.worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=os.environ | {"PYTHONPATH": os.pathsep.join(paths)},
            start_new_session=True,  # Ctrl-C is for this process, which ends the worker
        )
        try:
            about, _ = self._reply()
        except InputError as error:
            self._stop()
            raise InputError(f"synthetic speech needs espeak-ng: {error}; {_INSTALL}") from error
        self.sample_rate, self.variants = about["sample_rate"], tuple(about["variants"])
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop()

    def speak(self, text: str, voice: Voice) -> Speech:
        """Speak a text.

        Raises:
            InputError: the text is empty or nothing that can be spoken, or there is no such voice.
        """
        if not text.strip():
            raise InputError("there is no text to speak: give at least a word")
        request = {"text": text, "voice": voice.name, "rate": voice.rate, "pitch": voice.pitch}
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(request).encode() + b"\n")
        self._process.stdin.flush()
        reply, data = self._reply()
        samples = torch.from_numpy(np.frombuffer(data, dtype=np.int16).astype(np.float32) / 32_768)
        phones = tuple(phone_intervals(reply["events"], len(samples), self.sample_rate))
        if not phones:
            raise InputError(f"espeak-ng makes no phone of {text!r}: give words")
        return Speech(samples, self.sample_rate, phones)

    def _reply(self) -> tuple[dict[str, Any], bytes]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise InputError("the process of espeak-ng has ended")
        header: dict[str, Any] = json.loads(line)
        data = self._process.stdout.read(header["nbytes"])
        if "error" in header:
            raise InputError(header["error"])
        return header, data

    def _stop(self) -> None:
        for stream in (self._process.stdin, self._process.stdout):
            if stream is not None:
                stream.close()
        self._process.terminate()
        self._process.wait()


def phone_intervals(
    events: Iterable[tuple[str, int]], num_samples: int, sample_rate: int
) -> Iterator[PhoneInterval]:
    """The phones of the library's events: each lasts until the next event.

    Args:
        events: names, empty for none, and the samples at which they start, not decreasing.
        num_samples: of the speech, where the last one ends.
        sample_rate: per second.
    """
    for (name, start), (_, end) in pairwise([*events, ("", num_samples)]):
        if name.strip() and end > start:
            yield PhoneInterval(
                name.strip(),
                round(start / sample_rate, _MICROSECONDS),
                round(end / sample_rate, _MICROSECONDS),
            )
