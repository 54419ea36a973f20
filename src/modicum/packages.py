"""Packages of extras, imported when they are first needed."""

from __future__ import annotations

from importlib import import_module
from typing import Any

from modicum.errors import InputError

_USES = {
    "detect": "detection",
    "grammar": "pocketsphinx's model",
    "hdl": "the hardware generator",
    "search": "the search",
    "speech": "speech",
    "stereo": "stereo matching",
    "vision": "reading images",
}
"""What needs each extra."""


def import_package(name: str, extra: str) -> Any:
    """The module of a package that an extra brings.

    Args:
        name: as it is imported: "scipy.optimize".
        extra: that installs it: "search".

    Raises:
        InputError: it is not installed, or a library that it loads is missing.
    """
    try:
        return import_module(name)
    except (ImportError, OSError) as error:
        if _is_interrupt(error):
            raise KeyboardInterrupt from error
        root = name.partition(".")[0]
        package = {"PIL": "pillow"}.get(root, root.replace("_", "-"))
        raise InputError(
            f"{_USES[extra]} needs the package {package} ({error}): pip install 'modicum[{extra}]'"
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
