"""Packages of the extra "speech", imported when they are first needed."""

from __future__ import annotations

from importlib import import_module
from typing import Any

from modicum.errors import InputError


def import_package(name: str) -> Any:
    """The module of a package of the extra "speech".

    Args:
        name: as it is imported: "soundfile".

    Raises:
        InputError: it is not installed, or a library that it loads is missing.
    """
    try:
        return import_module(name)
    except (ImportError, OSError) as error:
        if _is_interrupt(error):
            raise KeyboardInterrupt from error
        raise InputError(
            f"speech needs the package {name.replace('_', '-')} ({error}): pip install 'modicum[speech]'"
        ) from error


def _is_interrupt(error: BaseException) -> bool:
    """Whether Ctrl-C is what a package made an error of its own of."""
    seen: list[BaseException] = []
    todo: list[BaseException | None] = [error]
    while todo:
        one = todo.pop()
        if isinstance(one, KeyboardInterrupt):
            return True
        if one is not None and one not in seen:
            seen.append(one)
            todo += [one.__cause__, one.__context__]
    return False
