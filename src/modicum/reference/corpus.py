"""The texts the reference model learns from: plain files, unwrapped, cut into sentences."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from modicum.errors import InputError

_SENTENCE = re.compile(r"(?<=[.!?;:])[\"')\]]*\s+|\n\n+")


def read_texts(folders: Sequence[Path], held_back: Sequence[str]) -> tuple[dict[str, str], dict[str, str]]:
    """The .txt files of some folders, at any depth, as (texts to learn from, texts held back), by file name.

    Raises:
        InputError: a folder is missing, or there is no text in any.
    """
    learnt: dict[str, str] = {}
    kept: dict[str, str] = {}
    for folder in folders:
        if not folder.is_dir():
            raise InputError(f"there is no folder {str(folder)!r}: give folders that hold .txt files")
        for path in sorted(folder.rglob("*.txt")):
            if path.name.startswith("NOTE"):
                continue
            target = kept if path.name.startswith(tuple(held_back)) else learnt
            target[path.stem] = unwrap(_decode(path.read_bytes()))
    if not learnt:
        raise InputError(f"there is no .txt file to learn from in {', '.join(map(str, folders))}")
    return learnt, kept


def _decode(data: bytes) -> str:
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError:
        return data.decode("latin-1")  # as old Gutenberg files are


def unwrap(text: str) -> str:
    """Lines of a paragraph joined by spaces; verse (short lines) too. Paragraphs end in one newline."""
    text = text.replace("\r\n", "\n").replace("--", " - ")
    paragraphs = (" ".join(part.split()) for part in re.split(r"\n\s*\n", text))
    return "\n".join(paragraph for paragraph in paragraphs if paragraph)


def sentences(text: str) -> list[str]:
    """A text's sentences, in order, each beginning with the space or newline that parts it from the last."""
    out: list[str] = []
    for number, line in enumerate(text.split("\n")):
        for place, piece in enumerate(re.findall(r".+?(?:[.!?]+[\"')\]_]*(?=\s|$)|$)", line)):
            if piece.strip():
                out.append(("\n" if number and not place else " ") + piece.strip())
    return out
