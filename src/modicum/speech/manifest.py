"""Manifests: which audio files there are, with what is said in each."""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from modicum.errors import InputError
from modicum.speech.audio import AUDIO_SUFFIXES
from modicum.speech.faults import is_full
from modicum.whole_file import write_whole

MANIFEST = "manifest.jsonl"
_NAMED = 5
"""So many bad rows are named in a warning; the others are counted."""


@dataclass(frozen=True)
class PhoneInterval:
    """A phone and when it is spoken.

    Raises:
        InputError: it has no name, or does not end after it starts.
    """

    phone: str
    start: float
    """Seconds from the start of the audio."""
    end: float
    """Seconds."""

    def __post_init__(self) -> None:
        if not self.phone or len(self.phone.split()) != 1:
            raise InputError(f"a phone is named {self.phone!r}: give a name without spaces")
        if not 0 <= self.start < self.end < math.inf:
            raise InputError(
                f"phone {self.phone} is spoken from {self.start} to {self.end} seconds: give an end after "
                "the start"
            )


@dataclass(frozen=True)
class Utterance:
    """One audio file and what is said in it.

    Raises:
        InputError: the duration is below 0, or the phones are not in the order of time.
    """

    audio: Path
    text: str
    speaker: str = ""
    duration: float = 0.0
    """Seconds; 0 where it is not known."""
    phones: tuple[PhoneInterval, ...] = ()
    """In the order of their starts; empty where they are not known."""

    def __post_init__(self) -> None:
        if not 0 <= self.duration < math.inf:
            raise InputError(f"{self.audio} lasts {self.duration} seconds: give 0 where it is not known")
        check_order(self.phones)


def check_order(phones: Sequence[PhoneInterval]) -> None:
    """Raise unless no phone starts before the one in front of it.

    Raises:
        InputError: one does.
    """
    for before, after in pairwise(phones):
        if after.start < before.start:
            raise InputError(
                f"phone {after.phone} at {after.start} seconds is after {before.phone} at {before.start}: "
                "give phones in the order of time"
            )


def read_manifest(path: str | Path) -> list[Utterance]:
    """Read a manifest.

    It is one of three:

    - a file of JSON Lines, `{"audio": "a.wav", "text": "go", "speaker": …, "duration": …, "phones": [["g",
      0.1, 0.2], …]}`, of which the last three may be missing or null;
    - a file of lines `a.wav<TAB>go`;
    - a folder with manifest.jsonl, or else with audio files that have a .txt file of the same stem each.

    Paths are relative to the manifest. Rows that cannot be used, audio without a transcript and transcripts
    without audio are left out, and named in a warning.

    Raises:
        InputError: there is no such file, or no row can be used.
    """
    path = Path(path)
    if path.is_dir():
        if not (path / MANIFEST).is_file():
            return _collect(path, _folder_rows(path), "audio files with a .txt file of the same stem each")
        path = path / MANIFEST
    try:
        # Not splitlines, which also divides at U+2028, U+0085 and others that a text may hold.
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except OSError as error:
        raise InputError(
            f"cannot read the manifest {path}: {error.strerror or error}; give a .jsonl or .tsv file, or a "
            "folder of audio with transcripts"
        ) from error
    except UnicodeDecodeError as error:
        raise InputError(
            f"the manifest {path} is not UTF-8 (byte {error.start}): give a text file, not audio"
        ) from error
    rows = (_row(line, f"line {number}", path.parent) for number, line in enumerate(lines, 1) if line.strip())
    return _collect(path, rows, 'lines {"audio": …, "text": …} or file<TAB>text')


def write_manifest(path: str | Path, utterances: Iterable[Utterance]) -> None:
    """Write JSON Lines; audio below the manifest's folder is named relative to it.

    The file appears whole or not at all.

    Raises:
        InputError: it cannot be written.
    """
    path = Path(path)
    text = "".join(manifest_line(utterance, path.parent) + "\n" for utterance in utterances)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, text)
    except OSError as error:
        remedy = "make room" if is_full(error) else "give a folder that can be written"
        raise InputError(f"cannot write {path}: {error.strerror or error}; {remedy}") from error
    except UnicodeEncodeError as error:
        raise InputError(
            f"cannot write {path}: a name or text has {error.object[error.start]!a}, which is no Unicode; "
            "rename the file, or leave that row out"
        ) from error


def manifest_line(utterance: Utterance, folder: Path) -> str:
    """A row as JSON, for a manifest in this folder."""
    audio = utterance.audio
    name = audio.relative_to(folder).as_posix() if audio.is_relative_to(folder) else str(audio.resolve())
    row: dict[str, Any] = {"audio": name, "text": utterance.text}
    if utterance.speaker:
        row["speaker"] = utterance.speaker
    if utterance.duration:
        row["duration"] = utterance.duration
    if utterance.phones:
        row["phones"] = [[x.phone, x.start, x.end] for x in utterance.phones]
    return json.dumps(row, ensure_ascii=False)


def _collect(path: Path, rows: Iterable[Utterance | str], form: str) -> list[Utterance]:
    """The utterances among the rows; strings say what is wrong with the others."""
    utterances: list[Utterance] = []
    faults: list[str] = []
    for row in rows:
        if isinstance(row, str):
            faults.append(row)
        else:
            utterances.append(row)
    named = "; ".join(faults[:_NAMED])
    if len(faults) > _NAMED:
        named += f"; and {len(faults) - _NAMED:,} more"
    if not utterances:
        raise InputError(f"{path} has no utterance ({named or 'it is empty'}): give {form}")
    if faults:
        warnings.warn(f"{path}: {len(faults):,} left out: {named}", stacklevel=3)
    return utterances


def _row(line: str, where: str, folder: Path) -> Utterance | str:
    """An utterance, or what is wrong with the line."""
    try:
        fields = json.loads(line) if line.lstrip().startswith("{") else _tab_separated(line)
        audio, text = Path(_string(fields, "audio")), _string(fields, "text").strip()
        audio = folder / audio
        _check_unicode(text, "text")
        if not text:
            return f"{where} ({audio.name}) has no text"
        if not audio.is_file():
            return f"{where}: there is no file {audio}"
        phones = tuple(
            PhoneInterval(str(phone), float(start), float(end))
            for phone, start, end in _given(fields, "phones", ())
        )
        for interval in phones:
            _check_unicode(interval.phone, "phones")
        speaker = str(_given(fields, "speaker", ""))
        _check_unicode(speaker, "speaker")
        return Utterance(audio, text, speaker, float(_given(fields, "duration", 0.0)), phones)
    except RecursionError:
        return f"{where}: it is nested too deeply"
    except (ValueError, TypeError, OverflowError, OSError) as error:
        return f"{where}: {error}"


def _given(fields: dict[str, Any], name: str, default: Any) -> Any:
    """A field, or the default where it is missing or null."""
    value = fields.get(name)
    return default if value is None else value


def _check_unicode(text: str, name: str) -> None:
    """Raise for half of a surrogate pair, which JSON can hold and no file in UTF-8."""
    bad = next((letter for letter in text if "\ud800" <= letter <= "\udfff"), None)
    if bad is not None:
        raise ValueError(f'"{name}" has U+{ord(bad):04X}, half of a surrogate pair: write it in UTF-8')


def _tab_separated(line: str) -> dict[str, Any]:
    name, tab, text = line.partition("\t")
    if not tab:
        raise ValueError("neither JSON nor file<TAB>text")
    return {"audio": name.strip(), "text": text}


def _string(fields: dict[str, Any], name: str) -> str:
    value = fields.get(name)
    if not isinstance(value, str) or not value:
        raise ValueError(f'"{name}" is {value!r} and no text')
    return value


def _folder_rows(folder: Path) -> Iterator[Utterance | str]:
    """Audio files, at any depth, each with a .txt file beside it."""
    files = sorted(path for path in folder.rglob("*") if path.is_file() and not path.name.startswith("."))
    audio = [path for path in files if path.suffix.lower() in AUDIO_SUFFIXES]
    has_audio = {path.with_suffix("") for path in audio}
    for path in audio:
        try:
            text = path.with_suffix(".txt").read_text(encoding="utf-8-sig").strip()
        except FileNotFoundError:
            yield f"{path.relative_to(folder)} has no transcript"
            continue
        except (OSError, UnicodeDecodeError) as error:
            yield f"the transcript of {path.relative_to(folder)} cannot be read ({error})"
            continue
        yield Utterance(path, " ".join(text.split())) if text else f"{path.relative_to(folder)} has no text"
    for path in files:
        if path.suffix == ".txt" and path.with_suffix("") not in has_audio:
            yield f"{path.relative_to(folder)} has no audio"
