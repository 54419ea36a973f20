"""What commands share in talking to people: errors, warnings, sizes, tables."""

from __future__ import annotations

import json
import re
import sys
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from modicum.errors import InputError, ModicumError

if TYPE_CHECKING:
    from modicum.weights.progress import Progress as StageProgress


def complain(line: str) -> None:
    """A line on stderr."""
    print(line, file=sys.stderr, flush=True)


@contextmanager
def warnings_for_people() -> Iterator[None]:
    """Warnings as a line on stderr, without the source line; the same one with other numbers only once."""
    shown = set()

    def show(message: Warning | str, *_: Any, **__: Any) -> None:
        kind = re.sub(r"\d", "", str(message))
        if kind not in shown:
            shown.add(kind)
            complain(f"warning: {message}")

    with warnings.catch_warnings():
        warnings.showwarning = show
        yield


@contextmanager
def settings_as_options(*names: str) -> Iterator[None]:
    """Errors that name these settings as Python does (pattern="2:4") name them as options (--pattern 2:4)."""
    setting = re.compile(rf"\b({'|'.join(names)})=[\"']?([\w:.=-]*\w)[\"']?")
    try:
        yield
    except ModicumError as error:
        text = setting.sub(lambda found: f"--{found[1].replace('_', '-')} {found[2]}", str(error))
        raise type(error)(text) from error


@contextmanager
def options_named(options: Mapping[str, str]) -> Iterator[None]:
    """Errors that begin as Python names a setting (learning_rate is 0) name the option (--rate is 0).

    Args:
        options: by the settings' names.
    """
    setting = re.compile(rf"\b({'|'.join(options)})(?= is )")
    try:
        yield
    except ModicumError as error:
        text = setting.sub(lambda found: options[found[1]], str(error))
        raise type(error)(text) from error


def quiet() -> None:
    """Silence what transformers logs; what matters reaches the user as errors and warnings."""
    from transformers.utils import logging as chatter

    logging: Any = chatter  # its functions have no types
    logging.set_verbosity_error()
    logging.disable_progress_bar()


def load(name: str, dtype: str, device: str) -> tuple[Any, Any]:
    """A model and its tokenizer, without chatter."""
    quiet()
    from modicum.loading import load as load_model

    return load_model(name, dtype=dtype, device=device)


def print_json(value: Any) -> None:
    """One JSON value on stdout."""
    print(json.dumps(value, indent=2, ensure_ascii=False, default=str), flush=True)


def print_table(columns: Sequence[str], rows: Sequence[Sequence[str]], title: str | None = None) -> None:
    """A table on stdout; cells are plain text."""
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(
        title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, show_header=any(columns)
    )
    for column in columns:
        table.add_column(column, overflow="fold")
    for row in rows:
        table.add_row(*(Text(cell) for cell in row))
    Console().print(table)


@contextmanager
def progress_bar() -> Iterator[StageProgress]:
    """A progress bar on stderr, once there is progress to tell of."""
    from rich.console import Console
    from rich.progress import Progress as Bar

    with ExitStack() as stack:
        bar: Bar | None = None

        def tell(what: str, done: int, total: int) -> None:
            nonlocal bar
            if bar is None:
                bar = stack.enter_context(Bar(console=Console(stderr=True), transient=True))
                bar.add_task("")
            bar.update(bar.task_ids[0], description=what, completed=done, total=total)

        yield tell


def read_text(path: Path) -> str:
    """The text of a file, or of stdin for "-".

    Raises:
        InputError: it is missing, cannot be read, is not UTF-8, or is empty.
    """
    name = "stdin" if str(path) == "-" else str(path)
    try:
        data = sys.stdin.buffer.read() if name == "stdin" else path.read_bytes()
    except OSError as error:
        raise InputError(f"cannot read the prompt from {name}: {error.strerror or error}") from error
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(
            f"the prompt in {name} is not UTF-8 (byte {error.start}): convert it first, such as with iconv"
        ) from error
    if not text.strip():
        raise InputError(f"the prompt in {name} is empty: give some text")
    return text
