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
        raise InputError(
            f"speech needs the package {name.replace('_', '-')} ({error}): pip install 'modicum[speech]'"
        ) from error
