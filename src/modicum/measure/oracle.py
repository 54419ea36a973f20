"""LatencyOracle: which of several implementations is the fastest for a shape, by measurement."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field, is_dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch

from modicum.cache_folder import cache_folder
from modicum.errors import InputError
from modicum.measure.processor import processor_name
from modicum.measure.timing import Spread, TimingSettings, interleaved
from modicum.whole_file import write_json

Shape = TypeVar("Shape")
FORMAT = 1


@dataclass(frozen=True)
class Operation(Generic[Shape]):
    """An operation with several implementations.

    Attributes:
        name: of the operation, part of a file's name.
        candidates: by name: given a shape, a callable without arguments that runs it once. Inputs are made
        when
            the shape is given. The first candidate is the default.
        version: of the implementations; measurements of another one do not count.

    Raises:
        InputError: there are no candidates.
    """

    name: str
    candidates: Mapping[str, Callable[[Shape], Callable[[], object]]]
    version: str = "1"

    def __post_init__(self) -> None:
        if not self.candidates or not self.name.replace("-", "").replace("_", "").isalnum():
            raise InputError(
                f"the operation {self.name!r} has {len(self.candidates)} candidates: give at least one, and "
                "a name of letters, digits, - and _"
            )

    @property
    def default(self) -> str:
        """The candidate that is used unless another one is faster."""
        return next(iter(self.candidates))


@dataclass(frozen=True)
class Latency:
    """What was measured of one candidate for one shape.

    Attributes:
        seconds: of a call.
        ratio: to the default's in the same round; below 1 is faster.
    """

    seconds: Spread
    ratio: Spread


def measured_samples(
    runs: Mapping[str, Callable[[], object]], timing: TimingSettings
) -> dict[str, list[float]]:
    """As `interleaved`; with one thread by the processor time of the thread.

    That leaves out what other processes take on a shared machine. With more threads it is the time on the
    wall. Candidates with threads of their own, which torch does not know, would be judged too well.
    """
    return interleaved(runs, timing, time.thread_time if torch.get_num_threads() == 1 else time.perf_counter)


@dataclass
class LatencyOracle(Generic[Shape]):
    """Measures the candidates of an operation for each shape once, and keeps the results on disk.

    A file holds the results of one operation on one processor (its model name, a digest of its features, and
    torch's number of threads). A damaged file, or one of another version, counts as none.

    Attributes:
        operation: what is measured.
        folder: of the files; None: `latency` in the user's cache folder.
        timing: how long is measured.
        measure_samples: gives the samples; tests replace it.
    """

    operation: Operation[Shape]
    folder: Path | str | None = None
    timing: TimingSettings = field(default_factory=TimingSettings)
    measure_samples: Callable[..., dict[str, list[float]]] = measured_samples
    # By the file: torch's number of threads may change.
    _known: dict[Path, dict[str, dict[str, Latency]]] = field(default_factory=dict, init=False, repr=False)

    @property
    def path(self) -> Path:
        """The file of the results; need not exist."""
        name = f"{self.operation.name}-{processor_name(torch.get_num_threads())}.json"
        return (Path(self.folder) if self.folder else cache_folder() / "latency") / name

    def choose(self, shape: Shape) -> str:
        """The fastest candidate, if it is faster than the default outside the noise; else the default.

        Faster means that the upper quartile of its ratio to the default, sample by sample, is below 1: it won
        in at least three rounds of four. Of several such candidates it is the one with the least median
        ratio.

        Raises:
            InputError: the shape is not a dataclass.
        """
        measured = self.measure(shape)
        faster = {
            name: latency.ratio.median
            for name, latency in measured.items()
            if name != self.operation.default and latency.ratio.high < 1
        }
        return min(faster, key=lambda name: faster[name]) if faster else self.operation.default

    def measure(self, shape: Shape) -> dict[str, Latency]:
        """Of each candidate: known, read from disk, or measured now and written.

        Raises:
            InputError: the shape is not a dataclass.
        """
        key, path = self._key(shape), self.path
        if path not in self._known:
            self._known[path] = self._read(path)
        known = self._known[path]
        if known.get(key, {}).keys() != self.operation.candidates.keys():
            runs = {name: prepare(shape) for name, prepare in self.operation.candidates.items()}
            samples = self.measure_samples(runs, self.timing)
            base = samples[self.operation.default]
            known[key] = {
                name: Latency(Spread.of(own), Spread.of([x / y for x, y in zip(own, base, strict=True)]))
                for name, own in samples.items()
            }
            # Others may have written in the meantime.
            known.update({**self._read(path), **known})
            self._write(path, known)
        return known[key]

    def _key(self, shape: Shape) -> str:
        if not is_dataclass(shape) or isinstance(shape, type):
            raise InputError(f"the shape is {shape!r}: give an instance of a dataclass of numbers")
        return json.dumps(asdict(shape), sort_keys=True)

    def _read(self, path: Path) -> dict[str, dict[str, Latency]]:
        with suppress(OSError, ValueError, KeyError, TypeError, AttributeError):
            found: Any = json.loads(path.read_text(encoding="utf-8"))
            if found["format"] == FORMAT and found["version"] == self.operation.version:
                return {
                    key: {
                        name: Latency(_spread(x["seconds"]), _spread(x["ratio"]))
                        for name, x in results.items()
                    }
                    for key, results in found["results"].items()
                }
        return {}

    def _write(self, path: Path, results: dict[str, dict[str, Latency]]) -> None:
        """Whole or not at all; a folder that cannot be written is no error, only slow."""
        told = {
            "format": FORMAT,
            "version": self.operation.version,
            "results": {
                key: {name: asdict(latency) for name, latency in row.items()} for key, row in results.items()
            },
        }
        with suppress(OSError):
            path.parent.mkdir(parents=True, exist_ok=True)
            write_json(path, told)


def _spread(stored: dict[str, Any]) -> Spread:
    """As it was stored.

    Raises:
        ValueError: a value is not a finite number.
        TypeError: a value is missing or not known.
    """
    for value in stored.values():
        if not isinstance(value, int | float) or isinstance(value, bool) or not math.isfinite(value):
            raise ValueError(f"{value!r} is not a finite number")
    return Spread(**stored)
