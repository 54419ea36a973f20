"""Shard: one file of recorded targets.

A safetensors file with the kept classes of its frames behind each other, uint16 or uint32 [n], and the codes
of their probabilities, uint8 or uint16 [n]. Frames that keep different numbers of classes have these, too,
uint16 or uint32 [frames].
"""

from __future__ import annotations

import json
import zlib
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from modicum.errors import TargetsError
from modicum.whole_file import whole_file

_KEY = "modicum"
_SMALL = 2**16


@dataclass(frozen=True)
class ShardStatistics:
    """Sums over the frames of a shard."""

    frames: int
    kept: int
    """Classes kept, in all."""
    mass: float
    """Probability that they hold together, summed over frames, as it was before it was coded."""
    least_mass: float
    """Of a frame."""


@dataclass(frozen=True)
class ShardContent:
    """The frames of a shard: `counts` [frames] classes each, of `classes` [n] with `codes` [n]."""

    classes: NDArray[Any]
    codes: NDArray[Any]
    counts: NDArray[Any]


def shard_name(number: int) -> str:
    """The file name of a shard."""
    return f"shard-{number:05}.safetensors"


def write_shard(
    path: Path, content: ShardContent, statistics: ShardStatistics, num_classes: int, digest: str
) -> None:
    """Write a file, which appears whole or not at all. digest: of the recording's header.

    Raises:
        OSError, SafetensorError: it cannot be written, as where the disk is full.
    """
    small = np.uint16 if num_classes <= _SMALL else np.uint32
    arrays = {"classes": content.classes.astype(small), "codes": content.codes}
    width = int(content.counts[0])
    if not (content.counts == width).all():
        width = 0
        arrays["counts"] = content.counts.astype(np.uint16 if num_classes < _SMALL else np.uint32)
    told = {"digest": digest, "width": width, "checksum": _checksum(arrays), **asdict(statistics)}
    with whole_file(path, is_durable=True) as part:
        save_file(arrays, part, metadata={_KEY: json.dumps(told)})


class Shard:
    """A shard's file, mapped into memory.

    Raises:
        TargetsError: it is truncated, or not of the recording with this digest.
    """

    def __init__(self, path: Path, digest: str) -> None:
        self.path = path
        try:
            file: Any = safe_open(path, framework="np")
            self._file = file
            told = json.loads(file.metadata()[_KEY])
            self._names = set(file.keys())
            self.statistics = ShardStatistics(told["frames"], told["kept"], told["mass"], told["least_mass"])
            self._digest, self._width, self._sum = told["digest"], told["width"], told["checksum"]
        except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
            raise TargetsError(
                f"{path} cannot be read ({error}): remove it and those of higher numbers, and record again, "
                "which goes on from there"
            ) from error
        if self._digest != digest:
            raise TargetsError(f"{path} is of another recording: give another folder, or remove this one")

    def __len__(self) -> int:
        return self.statistics.frames

    @property
    def nbytes(self) -> int:
        """Of the file."""
        return self.path.stat().st_size

    @cached_property
    def _starts(self) -> NDArray[np.int64]:
        """Where each frame starts, and the end: [frames + 1]."""
        counts = self._file.get_tensor("counts")
        return np.concatenate([[0], counts.cumsum(dtype=np.int64)])

    def read(self, start: int, stop: int) -> ShardContent:
        """The frames from start to before stop, of which nothing else is read from the disk."""
        if self._width:
            first, last = start * self._width, stop * self._width
            counts = np.full(stop - start, self._width, dtype=np.int64)
        else:
            first, last = int(self._starts[start]), int(self._starts[stop])
            counts = np.diff(self._starts[start : stop + 1])
        classes, codes = (self._file.get_slice(name)[first:last] for name in ("classes", "codes"))
        return ShardContent(classes, codes, counts)

    def check_integrity(self) -> None:
        """Compare the content with its checksum.

        Raises:
            TargetsError: it was altered.
        """
        arrays = {name: self._file.get_tensor(name) for name in self._names}
        if _checksum(arrays) != self._sum:
            raise TargetsError(
                f"{self.path} was altered or is damaged, its checksum differs: record the targets again"
            )


def _checksum(arrays: dict[str, NDArray[Any]]) -> int:
    found = 0
    for name in sorted(arrays):
        found = zlib.crc32(np.ascontiguousarray(arrays[name]).tobytes(), zlib.crc32(name.encode(), found))
    return found
