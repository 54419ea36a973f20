"""New folder: files that appear in a folder all together, or not at all."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

from safetensors import SafetensorError

from modicum.errors import InputError, ModelError, ModicumError

CONFIG = "config.json"
"""Without it a folder is no model, to transformers as to modicum: it is moved last."""
REPORT = "report.json"
STATE = "state"
"""Where `modicum prune` keeps what it has done, inside the folder, until it is finished."""
_STAGED = ".partial"
_REFUSALS = (OSError, SafetensorError, ValueError, RuntimeError)


def check_new(folder: Path) -> None:
    """Raise if a folder holds anything but the state of a run that was stopped, and hidden files.

    Raises:
        InputError: it does, or the path is a file.
    """
    if folder.exists() and not folder.is_dir():
        raise InputError(f"{folder} is a file: give a folder for the model")
    for path in sorted(folder.iterdir()) if folder.exists() else ():
        if path.name != STATE and not path.name.startswith("."):
            raise InputError(
                f"{folder} is not empty, it holds {path.name}: give another folder, or remove that one"
            )


def check_places(folder: Path, places: Mapping[str, str | Path | None]) -> None:
    """Raise if a folder for something that is kept would be among the files of a new model, or two be one.

    Args:
        folder: of the model; its folder `STATE`, which is removed in the end, may hold anything.
        places: folders by what they are for; None for none.

    Raises:
        InputError: one is the model's folder or in it, or is given for two.
    """
    purposes: dict[Path, str] = {}
    whole = folder.resolve()
    for purpose, place in places.items():
        if place is None:
            continue
        resolved = Path(place).resolve()
        if resolved.is_relative_to(whole) and not resolved.is_relative_to(whole / STATE):
            raise InputError(
                f"the folder {place} of the {purpose} is in {folder}, which gets the model: give another one"
            )
        if resolved in purposes:
            raise InputError(
                f"{place} is given for {purposes[resolved]} and {purpose}: give a folder for each"
            )
        purposes[resolved] = purpose


@contextmanager
def new_files(folder: Path) -> Iterator[Path]:
    """A temporary folder inside `folder`; what is written to it is moved into `folder` at the end.

    If the block or the move is interrupted, the files are removed, and `folder` if it was new.

    Raises:
        InputError: as `check_new`.
        ModelError: a file cannot be written, as where the disk is full, or transformers refuses to write it.
    """
    check_new(folder)
    staged, was_there = folder / _STAGED, folder.exists()
    moved: list[Path] = []
    try:
        folder.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(staged, ignore_errors=True)  # of a process that was killed
        staged.mkdir()
        yield staged
        for path in sorted(staged.iterdir(), key=lambda path: path.name == CONFIG):
            moved.append(folder / path.name)
            path.replace(moved[-1])
        staged.rmdir()
    except BaseException as error:
        with suppress(OSError):
            for path in reversed(moved):
                path.unlink(missing_ok=True)
            shutil.rmtree(staged, ignore_errors=True)
            if not was_there:
                folder.rmdir()
        if isinstance(error, ModicumError) or not isinstance(error, _REFUSALS):
            raise
        raise ModelError(f"cannot write to {folder}: {error}; no file of the model is left there") from error
