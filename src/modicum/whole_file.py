"""Files that appear whole or not at all."""

from __future__ import annotations

import json
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any


@contextmanager
def whole_file(path: Path | str, *, is_durable: bool = False) -> Iterator[Path]:
    """A new file to write to, in the folder of `path`. It takes the name `path` when the block ends.

    If the block raises, the new file is removed and `path` stays as it was. Each call has a file of its own.
    So several processes and threads may write to one path: the last one stands.

    Args:
        path: of the file, in a folder that exists. An existing file is replaced.
        is_durable: ask the operating system to put the content on disk before the name changes. Otherwise a
            power cut can leave the name without the content.

    Raises:
        OSError: it cannot be written.
    """
    path = Path(path)
    part = path.with_name(f".{path.name}.{secrets.token_hex(4)}.part")
    try:
        yield part
        if is_durable:
            with part.open("rb") as file:
                os.fsync(file.fileno())
        part.replace(path)
    except BaseException:
        with suppress(OSError):
            part.unlink(missing_ok=True)
        raise


def write_whole(path: Path | str, content: bytes | memoryview | str, *, is_durable: bool = False) -> None:
    """Write a file by `whole_file`; a text in UTF-8.

    Raises:
        OSError: it cannot be written.
        UnicodeEncodeError: the text has half of a surrogate pair.
    """
    data = content.encode() if isinstance(content, str) else content
    with whole_file(path, is_durable=is_durable) as part:
        part.write_bytes(data)


def write_json(path: Path | str, value: Any) -> None:
    """Write a JSON file by `whole_file`.

    Raises:
        OSError: it cannot be written.
    """
    write_whole(path, json.dumps(value, indent=1) + "\n")
