"""Header: what recorded targets are of, and how they are stored."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from modicum.distill.code import ProbabilityCode
from modicum.errors import InputError, TargetsError
from modicum.whole_file import write_whole

FILE = "targets.json"
FORMAT = 1
_FIELDS = {
    "num_classes": "number of classes",
    "rule": "rule of what is kept",
    "bits": "bits of a probability",
    "temperature": "temperature",
    "about": "teacher or data",
}


@dataclass(frozen=True)
class TargetsHeader:
    """What recorded targets are of.

    Attributes:
        num_classes: C, the teacher's classes.
        rule: what is kept, as text: "topk=16".
        bits: of a stored probability, 8 or 16.
        temperature: by which the teacher's logits were divided.
        about: names and digests of teachers and data; targets with other ones are of another recording.

    Raises:
        InputError: a number is out of range.
    """

    num_classes: int
    rule: str
    bits: int = 16
    temperature: float = 1.0
    about: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        ProbabilityCode(self.bits)
        if not 1 <= self.num_classes <= 2**32:
            raise InputError(f"there are {self.num_classes} classes: give 1 to 2**32")

    @property
    def digest(self) -> str:
        """16 hex digits that stand for all of it."""
        return hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()[:16]

    def check(self, folder: Path, wanted: TargetsHeader) -> None:
        """Raise unless it is the wanted one.

        Raises:
            TargetsError: it is of another recording; the message says what differs.
        """
        mine, other = asdict(self), asdict(wanted)
        for name, words in _FIELDS.items():
            if mine[name] == other[name]:
                continue
            has, asked = mine[name], other[name]
            if name == "about":
                keys = sorted(has.keys() | asked.keys())
                words = next(key for key in keys if has.get(key) != asked.get(key))
                has, asked = has.get(words), asked.get(words)
            raise TargetsError(
                f"{folder} holds targets with another {words}, {has} and not {asked}: repeat what they were "
                "recorded with, or give another folder"
            )


def write_header(folder: Path, header: TargetsHeader, num_frames: int | None) -> None:
    """Write targets.json; num_frames is None until all are recorded.

    Raises:
        OSError: it cannot be written.
    """
    text = json.dumps({"format": FORMAT, "num_frames": num_frames, "header": asdict(header)}, indent=1)
    write_whole(folder / FILE, text + "\n", is_durable=True)


def read_header(folder: Path) -> tuple[TargetsHeader, int | None]:
    """The header, and the number of frames; None where the recording is not complete.

    Raises:
        TargetsError: there is none, or it cannot be read.
    """
    path = folder / FILE
    try:
        found: Any = json.loads(path.read_text(encoding="utf-8"))
        if found["format"] != FORMAT:
            raise TargetsError(
                f"{path} has format {found['format']}, this modicum reads {FORMAT}: get a newer modicum, or "
                "record the targets again"
            )
        return TargetsHeader(**found["header"]), found["num_frames"]
    except FileNotFoundError as error:
        raise TargetsError(
            f"{folder} holds no targets, as it has no {FILE}: give the folder of a recording"
        ) from error
    except (OSError, ValueError, KeyError, TypeError) as error:
        if isinstance(error, TargetsError):
            raise
        raise TargetsError(f"{path} cannot be read ({error}): record the targets again") from error
