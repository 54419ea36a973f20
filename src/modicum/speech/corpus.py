"""Corpus: the features of a manifest's utterances, computed once and mapped into memory."""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from torch import Tensor

from modicum.errors import InputError
from modicum.speech.audio import is_silent, load_audio
from modicum.speech.augment import change_speed, check_speed
from modicum.speech.faults import is_full, listed
from modicum.speech.features import Fbank, FeatureSettings
from modicum.speech.manifest import PhoneInterval, Utterance
from modicum.speech.noise import AddNoise, NoiseSettings, noise_files
from modicum.whole_file import whole_file, write_whole

FILE = "corpus.json"
_FEATURES = "features.f32"
_FORMAT = 1
_FIELDS = ("source", "digest", "num_skipped", "utterances")
_SEED = 1_000_003
Progress = Callable[[str, int, int], object]
"""Called with what is done, how much of it, and of how much."""


@dataclass(frozen=True)
class CorpusSettings:
    """How the features of a corpus are made.

    Attributes:
        features: of the audio.
        copies: perturbed copies of each utterance; 1 for none but the one that the others say.
        speeds: factors of the speed, copy c has the factor c modulo their number; 1 is unchanged.
        noise: that is added to each copy; None for none.
        seed: of the noise.

    Raises:
        InputError: a number is out of range.
    """

    features: FeatureSettings = field(default_factory=FeatureSettings)
    copies: int = 1
    speeds: tuple[float, ...] = (1.0,)
    noise: NoiseSettings | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if self.copies < 1:
            raise InputError(f"there are {self.copies} copies of each utterance: give 1 or more")
        if not self.speeds:
            raise InputError("there is no speed: give at least one factor")
        for speed in self.speeds:
            check_speed(speed)

    def speed(self, copy: int) -> float:
        """The factor of a copy."""
        return self.speeds[copy % len(self.speeds)]


class FeatureCorpus:
    """Features of utterances, in a folder.

    Attributes:
        folder: with the features.
        settings: of which they were made.
        utterances: one for each row; the copies of an utterance are consecutive rows. Durations and phones
            are those of the copy, at its speed.
        digest: 16 hex digits that stand for the features and the texts.
        num_skipped: utterances that were left out.
    """

    def __init__(self, folder: Path, settings: CorpusSettings, saved: dict[str, Any]) -> None:
        self.folder, self.settings = folder, settings
        self.digest: str = saved["digest"]
        self.num_skipped: int = saved["num_skipped"]
        self.utterances = [_utterance(row) for row in saved["utterances"]]
        self._starts = np.cumsum([0, *(row["frames"] for row in saved["utterances"])])
        shape = (int(self._starts[-1]), settings.features.num_mels)
        if (size := (folder / _FEATURES).stat().st_size) != 4 * shape[0] * shape[1]:
            raise InputError(
                f"{folder / _FEATURES} is not whole, it has {size:,} bytes and not "
                f"{4 * shape[0] * shape[1]:,}: remove {folder} to compute it again"
            )
        self._features: Any = np.memmap(folder / _FEATURES, dtype="<f4", mode="r", shape=shape)

    def __len__(self) -> int:
        return len(self.utterances)

    @property
    def seconds(self) -> float:
        """Of audio, all copies together."""
        return float(self._starts[-1]) / self.settings.features.frames_per_second

    def num_frames(self, row: int) -> int:
        """Feature frames of a row."""
        return int(self._starts[row + 1] - self._starts[row])

    def features(self, row: int) -> Tensor:
        """Of a row, [frames, num_mels] float32."""
        return torch.from_numpy(np.array(self._features[self._starts[row] : self._starts[row + 1]]))


def build_corpus(
    utterances: Sequence[Utterance],
    folder: str | Path,
    settings: CorpusSettings | None = None,
    progress: Progress | None = None,
) -> FeatureCorpus:
    """The features of utterances, from the folder if it holds them already, else computed into it.

    Files that are unreadable, empty or silent are left out, and named in a warning. Audio of another sample
    rate is resampled, with a warning. The folder is whole once its corpus.json is there, which is written
    last.

    Args:
        utterances: of a manifest.
        folder: new, or of the same utterances and settings.
        settings: of the features.
        progress: called with "features", utterances done, and in all.

    Raises:
        InputError: no utterance is left, the folder is of another corpus, or it cannot be written.
    """
    folder, settings = Path(folder), settings or CorpusSettings()
    if folder.exists() and not folder.is_dir():
        raise InputError(f"{folder} is a file: give a folder for the features")
    source = _source(utterances, settings)
    saved = _saved(folder)
    if saved is None:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            saved = _write(utterances, folder, settings, progress or (lambda *_: None)) | {"source": source}
            write_whole(folder / FILE, json.dumps(saved))
        except OSError as error:
            remedy = "make room, or give another folder" if is_full(error) else "give one that can be written"
            raise InputError(
                f"cannot write features to {folder}: {error.strerror or error}; {remedy}"
            ) from error
    elif saved["source"] != source:
        raise InputError(
            f"{folder} holds features of other audio, texts or settings: give another folder, or remove it"
        )
    try:
        return FeatureCorpus(folder, settings, saved)
    except FileNotFoundError as error:
        raise InputError(
            f"{folder} has {FILE} and no {_FEATURES}: remove {folder} to compute it again"
        ) from error
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(_damaged(folder, error)) from error


def _saved(folder: Path) -> dict[str, Any] | None:
    path = folder / FILE
    try:
        saved: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        if saved["format"] != _FORMAT:
            raise InputError(
                f"{path} has format {saved['format']}, this modicum reads {_FORMAT}: remove {folder}"
            )
        if missing := next((name for name in _FIELDS if name not in saved), None):
            raise ValueError(f"it has no {missing!r}")
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(_damaged(folder, error)) from error
    return saved


def _damaged(folder: Path, error: Exception) -> str:
    return f"{folder / FILE} cannot be read ({error}): remove {folder} to compute it again"


def _write(
    utterances: Sequence[Utterance], folder: Path, settings: CorpusSettings, tell: Progress
) -> dict[str, Any]:
    """Write the features; what is to be told of them."""
    with whole_file(folder / _FEATURES) as part:
        with open(part, "wb") as file:
            rows, digest, faults = _append_all(utterances, file, settings, tell)
        if not rows:
            reason = listed(faults) or "there is none"
            raise InputError(f"no utterance can be used ({reason}): give audio with speech")
    if faults:
        warnings.warn(f"{len(faults):,} utterances left out: {listed(faults)}", stacklevel=3)
    return {"format": _FORMAT, "digest": digest, "num_skipped": len(faults), "utterances": rows}


def _append_all(
    utterances: Sequence[Utterance], file: IO[bytes], settings: CorpusSettings, tell: Progress
) -> tuple[list[dict[str, Any]], str, list[str]]:
    """Write the features of all rows; the rows, their digest, and what is wrong with those left out."""
    rows: list[dict[str, Any]] = []
    faults: list[str] = []
    digest = hashlib.sha256()
    fbank, perturb = Fbank(settings.features), _Perturbation(settings)
    for number, utterance in enumerate(utterances):
        tell("features", number, len(utterances))
        try:
            samples = _samples(utterance, settings)
            numbers = range(settings.copies * number, settings.copies * (number + 1))
            features = [fbank(perturb(samples, row)) for row in numbers]
        except InputError as error:
            # Of what is wrong with samples the file's name is no part.
            name, told = str(utterance.audio), str(error)
            faults.append(told if name in told else f"{name}: {told}")
            continue
        for copy, one in enumerate(features):
            data = one.contiguous().numpy().astype("<f4").tobytes()
            row = _row(utterance, settings.speed(copy)) | {"frames": len(one)}
            digest.update(data)
            digest.update(json.dumps([row["text"], row["phones"]]).encode())
            file.write(data)
            rows.append(row)
    tell("features", len(utterances), len(utterances))
    return rows, digest.hexdigest()[:16], faults


def _samples(utterance: Utterance, settings: CorpusSettings) -> Tensor:
    samples = load_audio(utterance.audio, settings.features.sample_rate)
    if is_silent(samples):
        raise InputError(f"{utterance.audio} is silent: leave it out")
    return samples


class _Perturbation:
    """Speed, then noise."""

    def __init__(self, settings: CorpusSettings) -> None:
        self.settings = settings
        self.add_noise = None if settings.noise is None else AddNoise(settings.noise)

    def __call__(self, samples: Tensor, row: int) -> Tensor:
        """Samples [n] as those of a row, counted with rows that are left out."""
        samples = change_speed(samples, self.settings.speed(row % self.settings.copies))
        if self.add_noise is None:
            return samples
        generator = torch.Generator().manual_seed((self.settings.seed * _SEED + row) % 2**63)
        return self.add_noise(samples, generator)


def _row(utterance: Utterance, speed: float) -> dict[str, Any]:
    return {
        "audio": str(utterance.audio),
        "text": utterance.text,
        "speaker": utterance.speaker,
        "duration": utterance.duration / speed,
        "phones": [[x.phone, x.start / speed, x.end / speed] for x in utterance.phones],
    }


def _utterance(row: dict[str, Any]) -> Utterance:
    phones = tuple(PhoneInterval(*interval) for interval in row["phones"])
    return Utterance(Path(row["audio"]), row["text"], row["speaker"], row["duration"], phones)


def _source(utterances: Sequence[Utterance], settings: CorpusSettings) -> str:
    """16 hex digits that stand for the files, by name, size and time, for their rows and the settings.

    The files are those of the utterances and of the noise.
    """
    rows: list[Any] = [asdict(settings)]
    for utterance in utterances:
        row = _row(replace(utterance, audio=utterance.audio.resolve()), 1.0)
        rows.append([row, _state(utterance.audio)])
    if settings.noise is not None and (folder := settings.noise.folder) is not None:
        rows.append([[str(path.resolve()), _state(path)] for path in noise_files(folder)])
    return hashlib.sha256(json.dumps(rows, sort_keys=True, default=str).encode()).hexdigest()[:16]


def _state(path: Path) -> list[int] | None:
    """Changes when the file does; None where there is none."""
    stat = path.stat() if path.exists() else None
    return stat and [stat.st_size, stat.st_mtime_ns]
