"""Packages of the extras "search" and "vision", imported when they are first needed."""

from __future__ import annotations

from importlib import import_module
from typing import Any

from modicum.errors import InputError


def import_package(name: str, extra: str, package: str | None = None) -> Any:
    """The module of a package that an extra brings.

    Args:
        name: as it is imported: "scipy.optimize".
        extra: that installs it: "search".
        package: as it is installed, where that is another name than the first part of `name`.

    Raises:
        InputError: it is not installed, or a library that it loads is missing.
    """
    try:
        return import_module(name)
    except (ImportError, OSError) as error:
        installed = package or name.partition(".")[0]
        raise InputError(
            f"this needs the package {installed} ({error}): pip install 'modicum[{extra}]'"
        ) from error
