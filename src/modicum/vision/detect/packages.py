"""Packages of the extra "detect", imported when they are first needed."""

from __future__ import annotations

from importlib import import_module
from typing import Any

from modicum.errors import InputError


def import_package(name: str) -> Any:
    """The module of a package of the extra "detect".

    Args:
        name: as it is imported: "pycocotools.coco".

    Raises:
        InputError: it is not installed, or a library that it loads is missing.
    """
    try:
        return import_module(name)
    except (ImportError, OSError) as error:
        package = {"PIL": "pillow"}.get(name.partition(".")[0], name.partition(".")[0].replace("_", "-"))
        raise InputError(
            f"detection needs the package {package} ({error}): pip install 'modicum[detect]'"
        ) from error
