"""Worker: a process that speaks texts by espeak-ng, each in a fork of its own.

The library keeps a state from one text to the next. A fork of a process that has spoken nothing makes the
samples of a text depend on nothing else. Imports nothing but the standard library and `library`, so that
forks are small.

A request is a line of JSON on stdin, {"text", "voice", "rate", "pitch"}. A reply on stdout is a line of JSON
and so many bytes of samples as its "nbytes" says. The first line, before any request, tells of the library.
"""

from __future__ import annotations

import json
import os
import sys
from typing import Any

from modicum.speech.synthesis.library import Library, LibraryError


def main() -> None:
    """Serve until stdin ends."""
    out = sys.stdout.buffer
    try:
        library = Library()
    except LibraryError as error:
        _send(out, {"error": str(error)}, b"")
        return
    _send(out, {"sample_rate": library.sample_rate, "variants": library.variants}, b"")
    for line in sys.stdin.buffer:
        reply = _forked(library, json.loads(line))
        out.write(reply)
        out.flush()


def _forked(library: Library, request: dict[str, Any]) -> bytes:
    """The reply that a fork makes."""
    read_end, write_end = os.pipe()
    child = os.fork()
    if not child:
        status = 1
        try:
            os.close(read_end)
            with os.fdopen(write_end, "wb") as file:
                _answer(library, request, file)
            status = 0
        finally:
            os._exit(status)
    os.close(write_end)
    with os.fdopen(read_end, "rb") as file:
        reply = file.read()
    _, status = os.waitpid(child, 0)
    if status:
        return json.dumps({"error": f"espeak-ng ended with status {status}", "nbytes": 0}).encode() + b"\n"
    return reply


def _answer(library: Library, request: dict[str, Any], file: Any) -> None:
    try:
        spoken = library.speak(request["text"], request["voice"], request["rate"], request["pitch"])
    except LibraryError as error:
        _send(file, {"error": str(error)}, b"")
    else:
        _send(file, {"events": spoken.events}, spoken.samples)


def _send(file: Any, header: dict[str, Any], data: bytes) -> None:
    file.write(json.dumps(header | {"nbytes": len(data)}).encode() + b"\n" + data)
    file.flush()


if __name__ == "__main__":
    main()
