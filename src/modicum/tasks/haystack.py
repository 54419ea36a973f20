"""Haystack: running text in sentences, from a file or folder, as much of it as is wanted; and noise."""

from __future__ import annotations

import re
from bisect import bisect_right
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate
from pathlib import Path

from modicum.errors import InputError
from modicum.texts import sample_text

NOISE = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
"""RULER's noise: one unit of it."""

_END = re.compile(r"""[.!?]["')\]”’]* (?=["'(\[“‘]*[A-Z0-9])""")
_SHORT = ("Mr.", "Mrs.", "Ms.", "Dr.", "St.", "Prof.", "Rev.", "Gen.", "Capt.", "No.", "vs.", "etc.")


@dataclass(frozen=True)
class Haystack:
    """A text's sentences, white space made single spaces."""

    sentences: tuple[str, ...]
    ends: tuple[int, ...]
    """Words up to the end of each sentence."""

    @classmethod
    def of(cls, text: str) -> Haystack:
        """Cut a text after full stops, not after such as "Mr."."""
        text = " ".join(text.split())
        cut: list[str] = []
        start = 0
        for match in _END.finditer(text):
            before = text[start : match.end()].rstrip()
            if before.endswith(_SHORT) or re.search(r"(?:^| )[A-Z]\.$", before):
                continue
            cut.append(before)
            start = match.end()
        if text[start:]:
            cut.append(text[start:])
        return cls(tuple(cut), tuple(accumulate(sentence.count(" ") + 1 for sentence in cut)))

    def first(self, words: int) -> list[str]:
        """Sentences of the first so many words, the last one cut where the words end; the text comes again
        from its start as often as that takes."""
        rounds, left = divmod(words, self.ends[-1])
        taken = list(self.sentences) * rounds
        whole = bisect_right(self.ends, left)
        taken += self.sentences[:whole]
        rest = left - (self.ends[whole - 1] if whole else 0)
        if rest:
            taken.append(" ".join(self.sentences[whole].split(" ")[:rest]))
        return taken


def read_text(path: str | None) -> str:
    """The text of a file, of all .txt files under a folder (in order of their names), or, with None, the
    sample text.

    Raises:
        InputError: there is no text there, or it is not UTF-8.
    """
    if path is None:
        return sample_text()
    place = Path(path).expanduser()
    if place.is_dir():
        names = sorted(place.rglob("*.txt"))
        if not names:
            raise InputError(
                f"the folder {str(place)!r} holds no .txt file; give a folder of texts or a file"
            )
    elif place.is_file():
        names = [place]
    else:
        raise InputError(f"there is no text {str(place)!r}; give a .txt file or a folder of them")
    try:
        text = "\n\n".join(name.read_text(encoding="utf-8") for name in names)
    except UnicodeDecodeError as error:
        raise InputError(
            f"a text in {str(place)!r} is not UTF-8 ({error.reason}); save it as UTF-8"
        ) from error
    except OSError as error:
        raise InputError(f"the text {str(place)!r} cannot be read: {error.strerror}") from error
    if not text.strip():
        raise InputError(f"the text {str(place)!r} is empty; give one with sentences")
    return text


@lru_cache(maxsize=4)
def haystack(path: str | None) -> Haystack:
    """The haystack of a path (see `read_text`), kept."""
    return Haystack.of(read_text(path))
