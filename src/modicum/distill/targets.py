"""Targets: recorded soft targets, read from their folder."""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path

import numpy as np
import torch

from modicum.distill.code import ProbabilityCode
from modicum.distill.essence import Essence
from modicum.distill.header import FILE, read_header
from modicum.distill.shard import Shard, ShardContent, shard_name
from modicum.errors import InputError, TargetsError

_LOGIT_NBYTES = 2
"""Of a logit in 16 bits."""


@dataclass(frozen=True)
class TargetsStatistics:
    """What recorded targets hold and take."""

    frames: int
    captured_mass: float
    """Mean probability that a frame's kept classes hold together."""
    least_mass: float
    """The smallest of any frame."""
    kept_classes: float
    """Mean of a frame."""
    nbytes: int
    """Of all files."""
    nbytes_per_frame: float
    dense_nbytes_per_frame: int
    """Of all of a frame's logits in 16 bits."""


class SparseTargets:
    """A teacher's most probable classes for each frame or token, with their probabilities.

    A folder of safetensors files, each mapped into memory: what is read is all that is loaded. A probability
    p comes back to within `ProbabilityCode(bits).error(p)`.

    Args:
        folder: as `TargetsWriter` finished it.

    Raises:
        TargetsError: it holds no recording, or one that is not complete, damaged or of a newer format.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self.header, num_frames = read_header(self.folder)
        if num_frames is None:
            raise TargetsError(
                f"the recording in {self.folder} is not complete: run the command that records it again, "
                "which goes on where it stopped"
            )
        self._code = ProbabilityCode(self.header.bits)
        self._shards: list[Shard] = []
        while sum(map(len, self._shards)) < num_frames:
            path = self.folder / shard_name(len(self._shards))
            self._shards.append(Shard(path, self.header.digest))
        self._starts = [0, *accumulate(map(len, self._shards))]
        if len(self) != num_frames:
            raise TargetsError(
                f"{self.folder} holds {len(self):,} frames and not {num_frames:,}: record the targets again"
            )

    def __len__(self) -> int:
        return self._starts[-1]

    def read(self, start: int, stop: int) -> Essence:
        """The frames from start to before stop: N = stop - start.

        Raises:
            InputError: they are not among those recorded.
        """
        if not 0 <= start < stop <= len(self):
            raise InputError(
                f"frames {start:,} to {stop:,} are not within the {len(self):,} that are recorded"
            )
        parts: list[ShardContent] = []
        at = start
        while at < stop:
            number = bisect_right(self._starts, at) - 1
            first, end = self._starts[number], min(stop, self._starts[number + 1])
            parts.append(self._shards[number].read(at - first, end - first))
            at = end
        counts = np.concatenate([part.counts for part in parts])
        is_kept = np.arange(counts.max()) < counts[:, None]
        classes = np.zeros(is_kept.shape, dtype=np.int64)
        classes[is_kept] = np.concatenate([part.classes for part in parts])
        classes = np.where(is_kept, classes, classes[:, :1])
        probabilities = np.zeros(is_kept.shape, dtype=np.float32)
        probabilities[is_kept] = self._code.decode(np.concatenate([part.codes for part in parts]))
        return Essence(
            torch.from_numpy(classes),
            torch.from_numpy(probabilities),
            torch.from_numpy(counts.astype(np.int64)),
            self.header.num_classes,
        )

    @property
    def statistics(self) -> TargetsStatistics:
        """What they hold and take."""
        found = [shard.statistics for shard in self._shards]
        nbytes = sum(shard.nbytes for shard in self._shards) + (self.folder / FILE).stat().st_size
        frames = max(1, len(self))
        return TargetsStatistics(
            frames=len(self),
            captured_mass=sum(x.mass for x in found) / frames,
            least_mass=min((x.least_mass for x in found), default=0.0),
            kept_classes=sum(x.kept for x in found) / frames,
            nbytes=nbytes,
            nbytes_per_frame=nbytes / frames,
            dense_nbytes_per_frame=_LOGIT_NBYTES * self.header.num_classes,
        )

    def check_integrity(self) -> None:
        """Compare all that is stored with its checksums; reads everything.

        Raises:
            TargetsError: a file was altered.
        """
        for shard in self._shards:
            shard.check_integrity()
