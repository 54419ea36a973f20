"""Commands: the texts that a device is to understand."""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from pathlib import Path

from modicum.errors import InputError
from modicum.speech.tokens import normalize_text


def read_commands(path: str | Path) -> tuple[str, ...]:
    """The commands of a text file, one a line; empty lines and those that begin with # are left out.

    Raises:
        InputError: the file cannot be read, or as `check_commands`.
    """
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(
            f"cannot read the commands in {path} ({error}): give a text file, a command a line"
        ) from error
    return check_commands(line for line in text.split("\n") if not line.lstrip().startswith("#"))


def check_commands(texts: Iterable[str]) -> tuple[str, ...]:
    """Commands in lower case with single spaces; empty ones are left out.

    Raises:
        InputError: two are the same, or there is none.
    """
    commands = [command for command in (normalize_text(text) for text in texts) if command]
    if not commands:
        raise InputError("there is no command: give at least one, a line each")
    twice = next((command for command in commands if commands.count(command) > 1), None)
    if twice is not None:
        raise InputError(f"the command {twice!r} is there twice: give each once")
    if len(commands) == 1:
        warnings.warn(
            "there is one command, so none can be taken for another: only missed commands and false alarms "
            "are counted",
            stacklevel=2,
        )
    return tuple(commands)
