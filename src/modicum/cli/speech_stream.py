"""`modicum speech transcribe --stream`: text as the audio arrives."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from modicum.cli.console import complain
from modicum.errors import InputError

if TYPE_CHECKING:
    from torch import Tensor

    from modicum.speech.recognizer import Recognizer


def stream_text(recognizer: Recognizer, files: Sequence[Path]) -> None:
    """Print the text of each file, or without files that of the microphone until Ctrl-C, as it is recognised.

    Ctrl-C, or damage in the middle of a file, ends it early, with the text of what was heard; the files after
    it are left out.

    Raises:
        InputError: a file cannot be read, or there is no microphone.
        ModelError: the model cannot be streamed.
    """
    from modicum.speech.compact.streaming import microphone_blocks, read_blocks

    rate = recognizer.features.sample_rate
    if not files:
        complain("listening to the microphone; stop with Ctrl-C")
        _print_stream(recognizer, microphone_blocks(rate))
        return
    for path in files:
        if not _print_stream(recognizer, read_blocks(path, rate)):
            return


def _print_stream(recognizer: Recognizer, blocks: Iterable[Tensor]) -> bool:
    """Print the text of a stream; whether it came to its end, not to Ctrl-C."""
    from modicum.speech.compact.streaming import StreamingRecognizer

    stream = StreamingRecognizer(recognizer)
    is_whole = True
    try:
        for block in blocks:
            sys.stdout.write(stream.accept(block))
            sys.stdout.flush()
    except KeyboardInterrupt:
        is_whole = False  # what was heard is written to its end
    except InputError:
        with suppress(InputError):  # too little was heard for a frame
            print(stream.finish(), flush=True)
        raise
    print(stream.finish(), flush=True)
    return is_whole
