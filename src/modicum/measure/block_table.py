"""Block table: how long each block takes on a device, measured there, exported and imported as JSON."""

from __future__ import annotations

import csv
import io
import json
import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from modicum.errors import InputError
from modicum.measure.processor import processor_name
from modicum.measure.runtimes import Runtime, onnx_bytes
from modicum.measure.timing import Spread, TimingSettings, interleaved
from modicum.whole_file import write_json

FORMAT = 1
_AT_ONCE = 16
"""Blocks that are measured in turn: a machine that slows down slows all of them."""
LIST = "blocks.csv"
"""The list to fill in, beside the ONNX files."""
EMPTY = "empty"
"""The key of a block that does nothing: what a call costs by itself."""

Progress = Callable[[str, int, int], object]


@dataclass(frozen=True)
class TimedBlock:
    """A block to measure.

    Attributes:
        key: under which its time is kept: shapes and name.
        build: makes it; weights do not matter.
        shape: of one input, without the batch.
    """

    key: str
    build: Callable[[], nn.Module]
    shape: tuple[int, ...]


@dataclass
class BlockTable:
    """Seconds of each block on one device.

    Attributes:
        device: what it is, for people.
        runtime: what ran the blocks, for people: "torch, 1 thread, batch 1".
        seconds: by key: median and quartiles.
    """

    device: str
    runtime: str
    seconds: dict[str, Spread] = field(default_factory=dict)

    def __getitem__(self, key: str) -> float:
        """The median seconds of a block, without what a call costs by itself; never below 0.

        Raises:
            InputError: the table lacks it.
        """
        if key not in self.seconds:
            raise InputError(
                f"the table of {self.device} has no time for the block {key!r} (it has {len(self.seconds)} "
                "blocks): measure it there with `modicum measure`, or leave the variant out"
            )
        empty = self.seconds[EMPTY].median if EMPTY in self.seconds else 0.0
        return max(0.0, self.seconds[key].median - empty)

    def total(self, keys: Iterable[str]) -> float:
        """Seconds of a network made of these blocks, a single call's own cost included.

        Raises:
            InputError: the table lacks one.
        """
        empty = self.seconds[EMPTY].median if EMPTY in self.seconds else 0.0
        return empty + math.fsum(self[key] for key in keys)

    def missing(self, keys: Iterable[str]) -> list[str]:
        """Which of these it lacks."""
        return [key for key in dict.fromkeys(keys) if key not in self.seconds]

    def save(self, path: str | Path) -> None:
        """Write it as JSON, whole or not at all.

        Raises:
            InputError: it cannot be written.
        """
        path = Path(path)
        told = {
            "format": FORMAT,
            "device": self.device,
            "runtime": self.runtime,
            "seconds": {key: asdict(spread) for key, spread in self.seconds.items()},
        }
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_json(path, told)
        except OSError as error:
            raise InputError(f"cannot write {path}: {error.strerror or error}; give another file") from error

    @classmethod
    def load(cls, path: str | Path) -> BlockTable:
        """Read it.

        Raises:
            InputError: it is missing, no such table, or of another format; or a time is not a number above 0.
        """
        path = Path(path)
        try:
            told: Any = json.loads(path.read_text(encoding="utf-8"))
            if told["format"] != FORMAT:
                raise InputError(f"{path} has the format {told['format']}, and this version reads {FORMAT}")
            seconds = {key: Spread(**one) for key, one in told["seconds"].items()}
            table = cls(str(told["device"]), str(told["runtime"]), seconds)
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            if isinstance(error, InputError):
                raise
            raise InputError(
                f"{path} is no table of block times ({type(error).__name__}: {error}): make one with "
                "`modicum measure`"
            ) from error
        for key, spread in table.seconds.items():
            for value in (spread.median, spread.low, spread.high):
                _check_seconds(path, key, value)
        return table


def device_name(runtime: Runtime) -> str:
    """This machine."""
    return processor_name(runtime.threads)


def runtime_name(runtime: Runtime) -> str:
    """Such as "torch, 1 thread, batch 1"."""
    threads = f"{runtime.threads} thread{'s' if runtime.threads > 1 else ''}"
    return f"{runtime.name}, {threads}, batch {runtime.batch}"


def measure_blocks(
    blocks: Sequence[TimedBlock],
    runtime: Runtime,
    path: str | Path,
    timing: TimingSettings | None = None,
    *,
    progress: Progress | None = None,
) -> BlockTable:
    """Measure the blocks that a table on disk lacks, and write it after every few.

    With one thread it is the processor time of the thread, which leaves out what other processes take; with
    more it is the time on the wall, so leave the machine alone meanwhile.

    Args:
        blocks: to measure.
        runtime: what runs them.
        path: of the table; made if it is missing, gone on with if it is there.
        timing: how long.
        progress: called with what is done, blocks done, and in all.

    Raises:
        InputError: the table is of another device or runtime.
    """
    path, timing = Path(path), timing or TimingSettings(rounds=15, sample_seconds=0.005)
    table = BlockTable(device_name(runtime), runtime_name(runtime))
    if path.exists():
        known = BlockTable.load(path)
        if (known.device, known.runtime) != (table.device, table.runtime):
            raise InputError(
                f"{path} is of {known.device} ({known.runtime}), and this is {table.device} "
                f"({table.runtime}): give another file"
            )
        table = known
    wanted = {block.key: block for block in [TimedBlock(EMPTY, nn.Identity, (1, 1, 1)), *blocks]}
    missing = table.missing(wanted)
    tell = progress or (lambda *_: None)
    clock = time.thread_time if runtime.threads == 1 else time.perf_counter
    tell("measuring blocks", len(wanted) - len(missing), len(wanted))
    with runtime.active(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        for start in range(0, len(missing), _AT_ONCE):
            keys = missing[start : start + _AT_ONCE]
            runs = {key: runtime.prepare(wanted[key].build(), wanted[key].shape) for key in keys}
            for key, samples in interleaved(runs, timing, clock).items():
                table.seconds[key] = Spread.of(samples)
            table.save(path)
            tell("measuring blocks", len(wanted) - len(missing) + start + len(keys), len(wanted))
    return table


def export_blocks(blocks: Sequence[TimedBlock], folder: str | Path, batch: int = 1) -> Path:
    """Write each block as an ONNX file, and a list to fill in, for a device that does not run modicum.

    Args:
        blocks: to write.
        folder: of the files; blocks.csv in it has the columns key, file, milliseconds; the last one is empty.
        batch: inputs of one call.

    Returns:
        The path of the list.

    Raises:
        InputError: the folder has a list already, a file cannot be written, or the package onnx is missing.
    """
    folder = Path(folder)
    if (folder / LIST).exists():
        raise InputError(
            f"{folder / LIST} exists, and may have been filled in: give another folder, or remove it"
        )
    lines = [("key", "file", "milliseconds")]
    unique = {block.key: block for block in [TimedBlock(EMPTY, nn.Identity, (1, 1, 1)), *blocks]}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for number, block in enumerate(unique.values()):
            name = f"{number:04d}.onnx"
            (folder / name).write_bytes(onnx_bytes(block.build().eval(), torch.randn(batch, *block.shape)))
            lines.append((block.key, name, ""))
        text = io.StringIO()
        csv.writer(text, lineterminator="\n").writerows(lines)
        (folder / LIST).write_text(text.getvalue(), encoding="utf-8")
    except OSError as error:
        raise InputError(
            f"cannot write to {folder}: {error.strerror or error}; give another folder"
        ) from error
    return folder / LIST


def import_times(path: str | Path, device: str, runtime: str = "measured elsewhere") -> BlockTable:
    """A table from a list that was filled in (see `export_blocks`).

    Raises:
        InputError: it cannot be read, a column is missing, or a time is not a number above 0; a block without
            a time is left out of the table.
    """
    path = Path(path)
    try:
        rows: list[Mapping[str, str | None]] = list(
            csv.DictReader(io.StringIO(path.read_text(encoding="utf-8-sig")))
        )
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"{path} cannot be read ({error}): give the list that was filled in") from error
    if not rows or not {"key", "milliseconds"} <= rows[0].keys():
        raise InputError(f"{path} has no columns key and milliseconds: give the list that was filled in")
    table = BlockTable(device, runtime)
    for row in rows:
        key, told = row["key"] or "", (row["milliseconds"] or "").strip()
        if not told:
            continue
        try:
            seconds = float(told) / 1000
        except ValueError:
            seconds = math.nan
        _check_seconds(path, key, seconds)
        table.seconds[key] = Spread(seconds, seconds, seconds)
    if not table.seconds:
        raise InputError(f"{path} has no times: fill in the column milliseconds")
    return table


def _check_seconds(path: Path, key: str, seconds: float) -> None:
    if isinstance(seconds, bool) or not isinstance(seconds, int | float) or not 0 < seconds < math.inf:
        raise InputError(f"{path}: the time of {key!r} is {seconds}: give a number above 0")
