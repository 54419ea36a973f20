"""Writer: targets recorded into a folder, safe against a kill."""

from __future__ import annotations

import sys
from pathlib import Path
from types import TracebackType
from typing import IO, Self

import numpy as np
import torch
from safetensors import SafetensorError
from torch import Tensor

from modicum.distill.code import ProbabilityCode
from modicum.distill.essence import Essence
from modicum.distill.header import FILE, TargetsHeader, read_header, write_header
from modicum.distill.rule import parse_rule
from modicum.distill.shard import Shard, ShardContent, ShardStatistics, shard_name, write_shard
from modicum.errors import InputError, TargetsError

if sys.platform != "win32":
    import fcntl

SHARD_FRAMES = 2**16
_LOCK = ".lock"


class TargetsWriter:
    """Appends targets to a folder, shard by shard; a folder with part of the same recording goes on.

    A shard's file appears whole or not at all. A kill loses the shard in hand; an error or Ctrl-C inside the
    `with` block writes the frames in hand as a shard of their own. Only `finish` makes the folder one that
    `SparseTargets` reads.

    Args:
        folder: new, empty, or with a recording of the same header.
        header: what is recorded. Its rule selects the classes.
        shard_frames: a file is written when so many frames are in hand.

    Attributes:
        num_frames: frames appended so far, those of earlier runs included.
        is_complete: whether `finish` was called, now or in an earlier run.

    Raises:
        TargetsError: the folder holds another recording, or a shard of it is damaged.
        InputError: it cannot be written, holds other files, or another process is writing there.
    """

    def __init__(self, folder: str | Path, header: TargetsHeader, shard_frames: int = SHARD_FRAMES) -> None:
        self.folder, self.header, self.shard_frames = Path(folder), header, shard_frames
        self._rule, self._code = parse_rule(header.rule), ProbabilityCode(header.bits)
        self._rule.check(header.num_classes)
        self._pending: list[Essence] = []
        self._lock: IO[bytes] | None = None
        self._num_shards = 0
        self.num_frames = 0
        self.is_complete = False

    def __enter__(self) -> Self:
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._acquire()
            self._open()
        except OSError as error:
            self._release()
            raise self._unwritable(error) from error
        except BaseException:
            self._release()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if not isinstance(error, TargetsError):
                self._flush()
        finally:
            self._release()

    def append(self, probabilities: Tensor) -> None:
        """Append frames.

        Args:
            probabilities: [N, C] floating point, of the teacher; N may be 0.

        Raises:
            InputError: they are not of the header's classes, or are not numbers.
            TargetsError: a shard cannot be written; what was written before stays.
        """
        if self.is_complete:
            raise InputError(f"{self.folder} is complete: give another folder for more targets")
        if probabilities.shape[-1] != self.header.num_classes:
            raise InputError(
                f"probabilities are of {probabilities.shape[-1]:,} classes, the recording of "
                f"{self.header.num_classes:,}: give those of the teacher that it was begun with"
            )
        if not len(probabilities):  # all were recorded by a run that did not come to `finish`
            return
        self._pending.append(self._rule.select(probabilities.cpu()))
        self.num_frames += len(probabilities)
        if sum(map(len, self._pending)) >= self.shard_frames:
            self._flush()

    def finish(self) -> None:
        """Write what is in hand and mark the folder as complete.

        Raises:
            TargetsError: it cannot be written.
        """
        self._flush()
        try:
            write_header(self.folder, self.header, self.num_frames)
        except OSError as error:
            raise self._full(error) from error
        self.is_complete = True

    def _acquire(self) -> None:
        self._lock = open(self.folder / _LOCK, "ab")  # noqa: SIM115  # closed in _release
        try:
            # The system lets go of it when the process ends, however it ends.
            if sys.platform != "win32":
                fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise InputError(
                f"another process is recording to {self.folder}: wait for it, or give another folder"
            ) from error

    def _release(self) -> None:
        if self._lock is not None:
            self._lock.close()

    def _open(self) -> None:
        if (self.folder / FILE).exists():
            known, num_frames = read_header(self.folder)
            known.check(self.folder, self.header)
            self.is_complete = num_frames is not None
        else:
            foreign = [path.name for path in sorted(self.folder.iterdir()) if not path.name.startswith(".")]
            if foreign:
                raise InputError(
                    f"{self.folder} holds {foreign[0]} and no recording: give another folder for the targets"
                )
            write_header(self.folder, self.header, None)
        while (path := self.folder / shard_name(self._num_shards)).exists():
            self.num_frames += len(Shard(path, self.header.digest))
            self._num_shards += 1

    def _flush(self) -> None:
        if not self._pending:
            return
        essences, path = self._pending, self.folder / shard_name(self._num_shards)
        classes, probabilities, counts = [], [], []
        for essence in essences:
            width = essence.classes.shape[1]
            is_kept = torch.arange(width) < essence.counts[:, None]
            classes.append(essence.classes[is_kept].numpy())
            probabilities.append(essence.probabilities[is_kept].double().numpy())
            counts.append(essence.counts.numpy())
        mass = torch.cat([essence.mass for essence in essences])
        joined = np.concatenate(probabilities)
        content = ShardContent(np.concatenate(classes), self._code.encode(joined), np.concatenate(counts))
        statistics = ShardStatistics(len(mass), len(joined), float(mass.sum()), float(mass.min()))
        try:
            write_shard(path, content, statistics, self.header.num_classes, self.header.digest)
        except (OSError, SafetensorError) as error:
            raise self._full(error) from error
        self._pending = []
        self._num_shards += 1

    def _full(self, error: Exception) -> TargetsError:
        whole = self.num_frames - sum(map(len, self._pending))
        return TargetsError(
            f"cannot write to {self.folder}: {error}; make room and run the same again, which goes on from "
            f"the {whole:,} frames that are recorded"
        )

    def _unwritable(self, error: OSError) -> InputError:
        return InputError(
            f"cannot write to {self.folder}: {error.strerror or error}; give a folder that can be written"
        )
