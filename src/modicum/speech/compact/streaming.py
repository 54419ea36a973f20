"""Streaming: recognition of audio that arrives in pieces, in bounded memory.

The model is run on chunks of features with the context on both sides that its outputs depend on, so each
output frame is what it is for the whole recording, but for rounding. Context is computed again with each
chunk: nothing but features is kept between chunks, at the price of more computation.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from modicum.errors import InputError, ModelError
from modicum.packages import import_lone_package, import_package
from modicum.speech.acoustic_model import AcousticModel, ModelSettings
from modicum.speech.audio import audio_info, soundfile_name, unreadable
from modicum.speech.compact.context import model_context
from modicum.speech.compact.sanm import SanmSettings
from modicum.speech.features import SHERPA_HIGH_FREQUENCY, Fbank, FeatureSettings
from modicum.speech.recognizer import Recognizer
from modicum.speech.tokens import BLANK


@dataclass
class _Chunks:
    """Logits of features that arrive in pieces."""

    model: AcousticModel
    chunk: int
    """Output frames that are computed together."""

    def __post_init__(self) -> None:
        self._context = model_context(self.model.settings)
        self._features = torch.empty(0, self.model.num_features)
        self._start = 0  # the feature frame that is the first of those kept, a multiple of the subsampling
        self._next = 0  # the next output frame

    @property
    def num_kept(self) -> int:
        """Feature frames that are kept."""
        return len(self._features)

    def add(self, features: Tensor, is_last: bool) -> Tensor:
        """Logits [frames, C], none or more, that features [T, F] have made computable.

        The model is run on one chunk after another, so its memory does not depend on T, and the logits do
        not depend on how the features are divided.
        """
        self._features = torch.cat([self._features, features])
        made = [torch.empty(0, self.model.num_classes)]
        while num_frames := self._num_ready(is_last):
            made.append(self._run(num_frames))
        return torch.cat(made)

    def _num_ready(self, is_last: bool) -> int:
        """Output frames to compute next: a chunk, or what is left at the end; 0 for none."""
        stride = self.model.subsampling
        end = self._start + len(self._features)
        # Output o needs the features up to o·stride + right.
        if (end - 1 - self._context.right) // stride + 1 - self._next >= self.chunk:
            return self.chunk
        return -(-end // stride) - self._next if is_last else 0

    def _run(self, num_frames: int) -> Tensor:
        """Logits [num_frames, C] of the next output frames."""
        stride, first = self.model.subsampling, self._start // self.model.subsampling
        ready = self._next + num_frames
        window = self._features[: (ready - 1) * stride + self._context.right + 1 - self._start]
        with torch.no_grad():
            logits: Tensor = self.model(window[None], torch.tensor([len(window)]))[0]
        made = logits[self._next - first : ready - first]
        self._next = ready
        start = max(self._start, (ready * stride - self._context.left) // stride * stride)
        self._features = self._features[start - self._start :]
        self._start = start
        return made


class StreamingRecognizer:
    """Recognises one stream of audio by greedy CTC decoding.

    Memory does not grow with the audio, but for the text itself.

    Args:
        recognizer: a CTC model of limited context, whose features are not normalised over the utterance.
        chunk_seconds: of audio that is computed together. Text lags behind by up to this, and by the model's
            right context.

    Raises:
        ModelError: the model cannot be streamed.
        InputError: the chunk is shorter than a frame.
    """

    def __init__(self, recognizer: Recognizer, chunk_seconds: float = 0.32) -> None:
        if recognizer.model.criterion != "ctc":
            raise ModelError("only CTC models are streamed: give a conv, dfsmn or sanm model")
        if recognizer.features.normalization != "none":
            raise ModelError(
                "this model's features are normalised over the whole utterance, so it cannot be streamed: "
                'train one on FeatureSettings(normalization="none")'
            )
        chunk = int(chunk_seconds * recognizer.frame_rate)
        if chunk < 1:
            raise InputError(
                f"a chunk has {chunk_seconds} seconds: give at least {1 / recognizer.frame_rate:g}, one frame"
            )
        self.recognizer = recognizer
        self._chunks = _Chunks(recognizer.model, chunk)
        self._chunk_samples = max(1, int(chunk_seconds * recognizer.features.sample_rate))
        self._online = Fbank(recognizer.features).online()
        self._num_samples = self._num_frames = 0
        self._last = BLANK
        self._is_finished = False
        self._text: list[str] = []

    @property
    def text(self) -> str:
        """What was recognised so far."""
        return "".join(self._text)

    @property
    def num_kept_frames(self) -> int:
        """Feature frames in memory."""
        return self._chunks.num_kept

    def accept(self, samples: Tensor) -> str:
        """Take samples [n] float32 at the model's rate; the text that they add, which may be none.

        Raises:
            InputError: samples are not numbers, or the stream has ended.
        """
        if self._is_finished:
            raise InputError("the stream has ended: make a new StreamingRecognizer for another recording")
        if samples.dim() != 1 or not bool(samples.isfinite().all()):
            raise InputError("samples of a stream are one row of numbers: leave out what is inf or nan")
        added = []
        # A chunk after another, so that memory does not depend on how much comes at once.
        for start in range(0, len(samples), self._chunk_samples):
            block = samples[start : start + self._chunk_samples].float()
            self._online.accept_waveform(self.recognizer.features.sample_rate, block.numpy())
            self._num_samples += len(block)
            added.append(self._advance(is_last=False))
        return "".join(added)

    def finish(self) -> str:
        """End the stream; the text that this adds.

        Raises:
            InputError: there were too few samples for a frame.
        """
        if self._is_finished:
            return ""
        self._is_finished = True
        self._online.input_finished()
        if not Fbank(self.recognizer.features).num_frames(self._num_samples):
            raise InputError(f"{self._num_samples} samples make no frame: give a longer recording")
        return self._advance(is_last=True)

    def _advance(self, is_last: bool) -> str:
        ready = self._online.num_frames_ready
        if is_last:
            ready = min(ready, Fbank(self.recognizer.features).num_frames(self._num_samples))
        frames = [np.array(self._online.get_frame(index)) for index in range(self._num_frames, ready)]
        self._online.pop(ready - self._num_frames)
        self._num_frames = ready
        mels = self.recognizer.features.num_mels
        features = torch.from_numpy(np.stack(frames)) if frames else torch.empty(0, mels)
        added = self._decode(self._chunks.add(features, is_last))
        self._text.append(added)
        return added

    def _decode(self, logits: Tensor) -> str:
        """Merge repeats, also with the last class before, and leave out blanks."""
        classes = []
        for one in logits.argmax(-1).tolist():
            if one not in (BLANK, self._last):
                classes.append(one)
            self._last = one
        tokens = self.recognizer.tokens
        added = tokens.decode(classes)
        return f" {added}" if added and tokens.kind == "phones" and self.text else added


def streamable_features(num_mels: int) -> FeatureSettings:
    """Features that need no whole utterance, as sherpa-onnx computes them."""
    return FeatureSettings(num_mels=num_mels, normalization="none", high_frequency=SHERPA_HIGH_FREQUENCY)


def streamable_model(model: ModelSettings) -> ModelSettings:
    """The same sizes, with attention of limited context and a memory that looks less far ahead."""
    if not isinstance(model, SanmSettings):
        return model
    return replace(model, attention_left=16, attention_right=2, shift=min(2, model.kernel // 2))


def read_blocks(path: str | Path, sample_rate: int, seconds: float = 0.1) -> Iterator[Tensor]:
    """The samples of a file in blocks, each [n] float32: mono, resampled where the rate is another.

    Raises:
        InputError: the file cannot be read, or not to its end; blocks before the damage were given.
    """
    soundfile = import_package("soundfile", "speech")
    info = audio_info(path)
    change: Any = None
    if info.sample_rate != sample_rate:
        change = import_package("soxr", "speech").ResampleStream(
            info.sample_rate, sample_rate, 1, dtype="float32"
        )
    size = max(1, int(seconds * info.sample_rate))
    blocks = soundfile.blocks(soundfile_name(path), size, dtype="float32", always_2d=True)
    while (block := _next_block(blocks, path)) is not None:
        mono = block.mean(1, dtype=np.float64).astype(np.float32)
        yield torch.from_numpy(mono if change is None else change.resample_chunk(mono))
    if change is not None:
        yield torch.from_numpy(change.resample_chunk(np.empty(0, np.float32), last=True))


def _next_block(blocks: Iterator[Any], path: str | Path) -> Any | None:
    try:
        return next(blocks, None)
    except RuntimeError as error:  # libsndfile's
        raise unreadable(path, error) from error


def microphone_blocks(sample_rate: int, seconds: float = 0.1) -> Iterator[Tensor]:
    """Samples of the default microphone in blocks, each [n] float32, until the caller stops.

    Raises:
        InputError: the package sounddevice is not installed, or there is no microphone.
    """
    sounddevice = import_lone_package("sounddevice", "the microphone", ", or give a file")
    size = int(seconds * sample_rate)
    try:
        with sounddevice.InputStream(sample_rate, size, channels=1, dtype="float32") as stream:
            while True:
                block, _ = stream.read(size)
                yield torch.from_numpy(block[:, 0].copy())
    except sounddevice.PortAudioError as error:
        raise InputError(f"the microphone cannot be used ({error}): connect one, or give a file") from error
