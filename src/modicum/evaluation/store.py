"""Store: a folder of results: rows.jsonl, a line for each sample, and grid.json, what made them."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Self

from modicum.errors import InputError
from modicum.evaluation.row import Cell, Row
from modicum.whole_file import write_whole

if sys.platform != "win32":
    import fcntl

ROWS, GRID, LOCK = "rows.jsonl", "grid.json", ".lock"
_FORMAT = 2

Key = tuple[Cell, int]


def read_rows(path: str | Path) -> list[Row]:
    """The rows of a folder, or of a file in its format; a last line cut short by a kill is left out.

    Raises:
        InputError: there is no such file, or a line (named by its number) is broken or comes twice.
    """
    path = Path(path)
    path = path / ROWS if path.is_dir() else path
    try:
        lines = path.read_bytes().split(b"\n")
    except OSError as error:
        raise InputError(
            f"cannot read {path}: {error.strerror or error}; give a folder that `modicum eval --out` wrote"
        ) from error
    rows: list[Row] = []
    at: dict[Key, int] = {}
    for number, line in enumerate(lines[:-1], 1):  # what follows the last line break is a line cut short
        try:
            row = Row.from_dict(json.loads(line))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise InputError(
                f"line {number} of {path} is no row ({error}): take it out, and its sample is run again"
            ) from error
        first = at.setdefault((row.cell, row.index), number)
        if first != number:
            raise InputError(f"lines {first} and {number} of {path} are the same sample: take one out")
        rows.append(row)
    return rows


class Store:
    """An output folder, open for one run at a time (`with Store(...)`); rows of earlier runs are in `rows`.

    Raises:
        InputError: another run is writing there, it cannot be written, or its results are of another model,
            version or way of running and must not be mixed with these.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self.rows: list[Row] = []
        self._done: set[Key] = set()
        self._lock: IO[bytes] | None = None
        self._file: IO[bytes] | None = None

    def __enter__(self) -> Self:
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._lock = open(self.folder / LOCK, "ab")
        except OSError as error:
            raise self._unwritable(error) from error
        try:
            # The system lets go of it when the process ends, however it ends.
            if sys.platform != "win32":
                fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            self._lock.close()
            raise InputError(
                f"another run is writing to {self.folder}: wait for it, or give another --out"
            ) from error
        try:
            self._open()
        except BaseException:
            self._close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._close()

    def _open(self) -> None:
        path = self.folder / ROWS
        try:
            self._file = open(path, "a+b")  # noqa: SIM115
            self._file.seek(0)
            data = self._file.read()
            # A kill may have left part of a line, which the next one must not be glued to.
            whole = data.rfind(b"\n") + 1
            if whole != len(data):
                self._file.truncate(whole)
        except OSError as error:
            raise self._unwritable(error) from error
        self.rows = read_rows(path)
        self._done = {(row.cell, row.index) for row in self.rows}

    def _close(self) -> None:
        for file in (self._file, self._lock):
            if file is not None:
                file.close()

    def admit(
        self,
        models: Mapping[str, str],
        samples: Mapping[str, str],
        grid: Mapping[str, Any],
        settings: Mapping[str, Any],
    ) -> None:
        """Check that rows of these models and settings may join what is here; note them in grid.json.

        models: name and dtype -> fingerprint. samples: the same of tasks' first samples. grid: what is run
        now, added to those run before. settings: what no row says of itself and all of them must share.
        """
        from modicum import __version__

        known = self._known()
        if known is None:
            if self.rows:
                raise InputError(
                    f"{self.folder} has rows but no {GRID}, so they cannot be told from another model's: "
                    "give another --out, or put the file back"
                )
            empty: dict[str, Any] = {"models": {}, "samples": {}, "settings": {}, "grids": []}
            known = {"format": _FORMAT, "version": __version__, **empty}
        if known["format"] != _FORMAT:
            raise self._other(f"are in format {known['format']}, this modicum writes {_FORMAT}")
        if _release(known["version"]) != _release(__version__):
            raise self._other(f"are of modicum {known['version']}, this is {__version__}")
        for name, mark in models.items():
            if known["models"].get(name, mark) != mark:
                raise self._other(f"are of another model named {name}: its weights or its tokenizer differ")
        for name, mark in samples.items():
            if known["samples"].get(name, mark) != mark:
                raise self._other(f"are of other samples of {name}: its data or its text has changed")
        for key, value in settings.items():
            if known["settings"].get(key, value) != value:
                raise self._other(f"were made with {key} = {known['settings'][key]!r}, asked is {value!r}")
        known["models"] |= models
        known["samples"] |= samples
        known["settings"] |= settings
        plain = json.loads(json.dumps(grid))  # as it will be read back
        if plain not in known["grids"]:
            known["grids"].append(plain)
        self._write(json.dumps(known, indent=2) + "\n")

    def _known(self) -> dict[str, Any] | None:
        path = self.folder / GRID
        if not path.exists():
            return None
        try:
            known: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
            for key, kind in (
                ("format", int),
                ("version", str),
                ("models", dict),
                ("samples", dict),
                ("settings", dict),
                ("grids", list),
            ):
                if not isinstance(known[key], kind):
                    raise TypeError(f"{key} is {known[key]!r}")
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise InputError(
                f"cannot read {path} ({error}): give another --out, or put the file back"
            ) from error
        return known

    def _write(self, text: str) -> None:
        """grid.json, whole at any moment."""
        try:
            write_whole(self.folder / GRID, text, is_durable=True)
        except OSError as error:
            raise self._unwritable(error) from error

    def has(self, cell: Cell, index: int) -> bool:
        """Whether that sample has been done."""
        return (cell, index) in self._done

    def add(self, row: Row) -> None:
        """Write a row; on return it is on the disk."""
        assert self._file is not None
        assert not self.has(row.cell, row.index)
        # ASCII: no character of an answer can be taken for the end of a line.
        line = json.dumps(row.to_dict(), ensure_ascii=True) + "\n"
        try:
            self._file.write(line.encode("ascii"))
            self._file.flush()
            os.fsync(self._file.fileno())
        except OSError as error:
            raise self._unwritable(error) from error
        self.rows.append(row)
        self._done.add((row.cell, row.index))

    def _unwritable(self, error: OSError) -> InputError:
        return InputError(
            f"cannot write to {self.folder}: {error.strerror or error}; make room, or give another --out"
        )

    def _other(self, what: str) -> InputError:
        return InputError(f"the results in {self.folder} {what}: give another --out, results are not mixed")


def _release(version: str) -> tuple[str, ...]:
    """The part of a version within which results may be mixed: 1 of 1.4.2, 0.3 of 0.3.1."""
    parts = version.split(".")
    return tuple(parts[: 2 if parts[0] == "0" else 1])
