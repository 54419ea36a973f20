"""Recordings: audio of commands, of other speech, and of general speech with its texts."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path

from torch import Tensor

from modicum.errors import InputError
from modicum.speech.audio import AUDIO_SUFFIXES, audio_info, is_silent, load_audio
from modicum.speech.faults import listed
from modicum.speech.manifest import MANIFEST, Utterance, read_manifest
from modicum.speech.tokens import normalize_text

_LEAST_PIECE = 0.5
"""Seconds: a shorter rest of a recording is left out."""


@dataclass(frozen=True)
class Recording:
    """A file of audio, or a stretch of it.

    Attributes:
        audio: the file.
        text: what is said; empty where that is not known.
        start: of the stretch, in seconds.
        end: of the stretch, in seconds; infinite for the file's end.
        speaker: empty where it is not known.
    """

    audio: Path
    text: str = ""
    start: float = 0.0
    end: float = math.inf
    speaker: str = ""

    def load(self, sample_rate: int) -> Tensor:
        """Samples [n] float32.

        Raises:
            InputError: the file cannot be read, or is silent.
        """
        if math.isinf(self.end):
            samples = load_audio(self.audio, sample_rate)[round(self.start * sample_rate) :]
        else:
            start, end = (round(seconds * sample_rate) for seconds in (self.start, self.end))
            samples = _last_file(self.audio, _state(self.audio), sample_rate)[start:end].clone()
        if is_silent(samples):
            stretch = "" if math.isinf(self.end) else f" from {self.start:g} to {self.end:g} s"
            raise InputError(f"{self.audio} is silent{stretch}: leave it out")
        return samples


def read_recordings(path: str | Path) -> list[Recording]:
    """Recordings with what is said in them.

    It is a manifest as `read_manifest` takes it, or a folder with a folder of audio for each text, named as
    the text with _ or - for spaces ("turn_on"), as in Speech Commands.

    Raises:
        InputError: there is no audio with a text.
    """
    path = Path(path)
    if not path.exists():
        raise InputError(f"there is no {path}: give a folder of recordings, or a manifest")
    if path.is_dir() and not (path / MANIFEST).exists() and not _has_transcripts(path):
        found = [
            Recording(audio, normalize_text(folder.name.replace("_", " ").replace("-", " ")))
            for folder in sorted(path.iterdir())
            if folder.is_dir() and not folder.name.startswith(".")
            for audio in _audio(folder)
        ]
        if not found:
            raise InputError(
                f"{path} has no audio with a text: give a folder with a folder of recordings for each "
                "command, or recordings with a .txt file beside each, or a manifest"
            )
        return found
    return [_of(utterance) for utterance in read_manifest(path)]


def read_other_speech(path: str | Path, piece_seconds: float | None = None) -> list[Recording]:
    """Speech that is no command: all audio of a folder, or of a manifest, whatever is said.

    Args:
        path: a folder, searched at any depth, or a manifest.
        piece_seconds: cut longer recordings into pieces of this length, as a device would hand them on; None
            to leave them whole.

    Raises:
        InputError: there is no audio, or piece_seconds is below 0.5.
    """
    path = Path(path)
    if piece_seconds is not None and not piece_seconds >= _LEAST_PIECE:
        raise InputError(f"pieces are {piece_seconds:g} s long: give {_LEAST_PIECE:g} or more")
    if path.is_dir() and not (path / MANIFEST).exists():
        found = [Recording(audio) for audio in _audio(path)]
        if not found:
            raise InputError(f"{path} has no audio ({', '.join(AUDIO_SUFFIXES)}): give a folder with speech")
    else:
        found = [_of(utterance) for utterance in read_manifest(path)]
    if piece_seconds is None:
        return found
    return [piece for recording in found for piece in _pieces(recording, piece_seconds)]


def of_commands(recordings: Sequence[Recording], commands: Sequence[str]) -> list[Recording]:
    """Those whose text is a command, with that command as their text; the others are counted in a warning.

    Raises:
        InputError: a command has none.
    """
    recordings = [replace(one, text=normalize_text(one.text)) for one in recordings]
    kept = [one for one in recordings if one.text in commands]
    texts = {one.text for one in recordings}
    missing = [command for command in commands if command not in texts]
    if missing:
        raise InputError(
            f"there is no recording of {listed([repr(one) for one in missing])}: give some of each "
            f"command, or leave it out; there are recordings of "
            f"{listed([repr(one) for one in sorted(texts)])}"
        )
    if len(kept) < len(recordings):
        others = sorted(texts - set(commands))
        warnings.warn(
            f"{len(recordings) - len(kept):,} of {len(recordings):,} recordings are of no command and left "
            f"out: {listed([repr(one) for one in others])}",
            stacklevel=2,
        )
    return kept


def _audio(folder: Path) -> list[Path]:
    """Audio files at any depth, but for hidden files and those in hidden folders."""
    return sorted(
        path
        for path in folder.rglob("*")
        if path.suffix.lower() in AUDIO_SUFFIXES
        and path.is_file()
        and not any(name.startswith(".") for name in path.relative_to(folder).parts)
    )


@lru_cache(maxsize=1)
def _last_file(audio: Path, state: tuple[int, int], sample_rate: int) -> Tensor:
    """Samples of a file, kept for its next piece: else a long file is decoded once for each piece."""
    return load_audio(audio, sample_rate)


def _state(audio: Path) -> tuple[int, int]:
    """Changes when the file does; (0, 0) where there is none, which reading it tells."""
    try:
        found = audio.stat()
    except OSError:
        return 0, 0
    return found.st_mtime_ns, found.st_size


def _has_transcripts(folder: Path) -> bool:
    """Whether audio has a .txt beside it. Other .txt files are notes, as Speech Commands has some."""
    return any(audio.with_suffix(".txt").is_file() for audio in _audio(folder))


def _of(utterance: Utterance) -> Recording:
    return Recording(utterance.audio, normalize_text(utterance.text), speaker=utterance.speaker)


def _pieces(recording: Recording, seconds: float) -> list[Recording]:
    try:
        duration = audio_info(recording.audio).duration
    except InputError:
        return [recording]  # what reads it says what is wrong
    if duration <= seconds:
        return [recording]
    starts = [index * seconds for index in range(math.ceil(duration / seconds))]
    return [
        replace(recording, text="", start=start, end=min(start + seconds, duration))
        for start in starts
        if min(start + seconds, duration) - start >= _LEAST_PIECE
    ]
