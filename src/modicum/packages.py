"""Optional packages, imported when they are first needed."""

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
    return _imported(name, _USES[extra], f"pip install 'modicum[{extra}]'")


def import_lone_package(name: str, use: str, otherwise: str = "") -> Any:
    """The module of a package that no extra brings, or not every extra that uses it.

    Args:
        name: as it is imported.
        use: what needs it, for the error.
        otherwise: what to do without it, for the error: ", or give the runtime torch".

    Raises:
        InputError: as `import_package`.
    """
    return _imported(name, use, f"pip install {_distribution(name)}{otherwise}")


def _imported(name: str, use: str, remedy: str) -> Any:
    try:
        return import_module(name)
    except (ImportError, OSError) as error:
        if _is_interrupt(error):
            raise KeyboardInterrupt from error
        raise InputError(f"{use} needs the package {_distribution(name)} ({error}): {remedy}") from error


def _distribution(name: str) -> str:
    """What pip calls the package of a module."""
    root = name.partition(".")[0]
    return {"PIL": "pillow"}.get(root, root.replace("_", "-"))


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
