"""Rows: a benchmark's samples from a local JSONL file or by a name that `datasets` knows."""

from __future__ import annotations

import importlib
import json
import warnings
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

from modicum.errors import InputError
from modicum.tasks.measure import count, decode, encode
from modicum.tasks.named import Named
from modicum.tasks.sample import Sample


@dataclass(frozen=True)
class Skipped:
    """A row that could not be used."""

    line: int
    """From 1, in the file or the dataset."""
    reason: str


@dataclass(frozen=True)
class Entry:
    """What a row says."""

    context: str
    question: str
    answers: tuple[str, ...]
    metric: str
    max_new_tokens: int
    needles: tuple[tuple[int, int], ...] = ()
    answer_prefix: str = ""
    """The end of the question that begins the answer."""


@dataclass(frozen=True, kw_only=True)
class Rows(Named, ABC):
    """A task that reads its samples; they are read at the first need and kept.

    Broken rows are left out, with a warning that names their lines, and are listed in `skipped`.
    """

    HUB: ClassVar[str | None] = None
    """The dataset that is meant where neither path nor dataset is given."""

    path: str | None = None
    """A JSONL file: one JSON object a line."""
    dataset: str | None = None
    """A name for `datasets.load_dataset`, in place of a path."""
    config: str | None = None
    """The dataset's configuration."""
    split: str | None = None
    max_new_tokens: int | None = None
    """None as the benchmark says."""

    def __post_init__(self) -> None:
        self.check("max_new_tokens", 1)
        both = self.path is not None and self.dataset is not None
        if both or not (self.path or self.dataset or self.HUB):
            raise InputError(
                f"{self.kind}: give either path=FILE.jsonl or dataset=NAME (by the package datasets)"
            )

    @property
    def metric(self) -> str:
        """The samples' metric (that of the first, should a file mix several)."""
        return self.entries[0].metric

    @property
    def entries(self) -> list[Entry]:
        """The rows that could be read, in order.

        Raises:
            InputError: there is no such file or dataset, or not one row of it can be used.
        """
        return self._read[0]

    @property
    def skipped(self) -> list[Skipped]:
        """The rows that could not."""
        return self._read[1]

    def __len__(self) -> int:
        return len(self.entries)

    def sample(self, index: int, length: int | None, tokenizer: Any, seed: int = 0) -> Sample:
        """See `Task.sample`. A context too long for `length` loses its middle, as in LongBench.

        Raises:
            InputError: there is no sample of that index, or its question alone is too long.
        """
        entry = self.entry(index)
        context, needles = entry.context, entry.needles
        room_new = self.max_new_tokens or entry.max_new_tokens
        if length is not None:
            room = length - room_new - count(tokenizer, entry.question, special=False)
            context = shortened(context, room, tokenizer)
            if context != entry.context:
                needles = ()
            if room < 1 or (entry.context and not context):
                raise InputError(
                    f"sample {index} of {self.name}: question and answer take {length - room} tokens, the "
                    f"length is {length}: give a longer one"
                )
        return Sample(
            task=self.name,
            index=index,
            context=context,
            question=entry.question,
            answers=entry.answers,
            metric=entry.metric,
            max_new_tokens=room_new,
            needles=needles,
            depth=needles[0][0] / len(context) if needles else None,
            answer_prefix=entry.answer_prefix,
        )

    def entry(self, index: int) -> Entry:
        """The row of that index among those that could be read."""
        if not 0 <= index < len(self):
            raise InputError(f"{self.name} has samples 0 to {len(self) - 1}, not {index}")
        return self.entries[index]

    @abstractmethod
    def convert(self, row: dict[str, Any]) -> Entry | None:
        """What a row says; None where it is of another task.

        Raises:
            ValueError: a field is missing or wrong.
        """

    @cached_property
    def _read(self) -> tuple[list[Entry], list[Skipped]]:
        entries: list[Entry] = []
        skipped: list[Skipped] = []
        for line, row in self._rows():
            try:
                if isinstance(row, str):
                    raise ValueError(row)
                entry = self.convert(row)
            except ValueError as error:
                skipped.append(Skipped(line, str(error)))
                continue
            if entry is not None:
                entries.append(entry)
        said = "; ".join(f"line {one.line}: {one.reason}" for one in skipped[:5])
        said += f"; and {len(skipped) - 5} more" if len(skipped) > 5 else ""
        source = self.path or self.dataset or self.HUB
        if not entries:
            raise InputError(
                f"{self.name}: {source!r} has no row that can be used" + (f" ({said})" if said else "")
            )
        if skipped:
            warnings.warn(f"{source}: {len(skipped)} rows left out: {said}", stacklevel=2)
        return entries, skipped

    def _rows(self) -> Iterator[tuple[int, dict[str, Any] | str]]:
        """Line numbers with a row, or with what is wrong with the line."""
        if self.path is not None:
            yield from read_lines(self.file)
        else:
            name, config = self.dataset or str(self.HUB), self.config or self.default_config()
            yield from enumerate(read_dataset(name, config, self.split or self.default_split()), 1)

    @property
    def file(self) -> Path:
        """The file that `path` stands for."""
        return Path(str(self.path)).expanduser()

    def default_split(self) -> str:
        """Which part of a dataset is read when none is named."""
        return "test"

    def default_config(self) -> str | None:
        """Which configuration of a dataset is read when none is named."""
        return None


def shortened(text: str, room: int, tokenizer: Any) -> str:
    """The text, or where it has more than `room` tokens its first and last halves of so many (LongBench)."""
    opening = count(tokenizer, "a", special=True) - count(tokenizer, "a", special=False)
    ids = encode(tokenizer, text, special=False)
    if len(ids) + opening <= room:
        return text
    kept = room - opening
    while kept > 1:
        half = kept // 2
        made = decode(tokenizer, ids[:half]) + decode(tokenizer, ids[-half:])
        over = count(tokenizer, made, special=True) - room
        if over <= 0:
            return made
        kept -= over
    return ""


def read_lines(path: Path) -> Iterator[tuple[int, dict[str, Any] | str]]:
    """Each line's number with its object, or with what is wrong with it; empty lines are passed over.

    Raises:
        InputError: the file cannot be read.
    """
    try:
        with path.open("rb") as file:
            for number, line in enumerate(file, 1):
                if not line.strip():
                    continue
                try:
                    row = json.loads(line.decode("utf-8"))
                except UnicodeDecodeError:
                    yield number, "not UTF-8"
                except (json.JSONDecodeError, RecursionError) as error:
                    yield number, f"not JSON ({getattr(error, 'msg', 'nested too deep')})"
                else:
                    yield number, row if isinstance(row, dict) else "not a JSON object"
    except OSError as error:
        raise InputError(
            f"the file {str(path)!r} cannot be read: {error.strerror}; give a JSONL file"
        ) from error


def read_dataset(name: str, config: str | None, split: str) -> list[dict[str, Any]]:
    """The rows of a dataset.

    Raises:
        InputError: `datasets` is not installed, or cannot get the dataset.
    """
    try:
        package: Any = importlib.import_module("datasets")
    except ModuleNotFoundError as error:
        raise InputError(
            f"the dataset {name!r} needs the package datasets: pip install datasets (or give path=FILE.jsonl)"
        ) from error
    try:
        loaded = package.load_dataset(*[name] if config is None else [name, config], split=split)
        return [dict(row) for row in loaded]
    # datasets lets anything out: of the network, of the Hub, of the files.
    except Exception as error:
        said = " ".join(str(error).split())[:300] or type(error).__name__
        where = name if config is None else f"{name}, {config}"
        raise InputError(f"the dataset {where}, split {split}, cannot be had: {said}") from error


def text_of(row: dict[str, Any], field: str) -> str:
    """A field that must be text."""
    if field not in row:
        raise ValueError(f"no field {field!r}")
    value = row[field]
    if not isinstance(value, str):
        raise ValueError(f"the field {field!r} is {type(value).__name__}, not text")
    return value


def texts_of(row: dict[str, Any], field: str) -> tuple[str, ...]:
    """A field that must be text, or a list of texts that is not empty."""
    value = row.get(field)
    if isinstance(value, str):
        return (value,)
    if not isinstance(value, list | tuple) or not value or not all(isinstance(v, str) for v in value):
        raise ValueError(f"the field {field!r} is not a list of texts")
    return tuple(value)
