"""Running: perplexity of running text: strided, and where a passage comes a second time.

Nothing is generated: the mean loss of a sample's target after its context counts (metric "loss").
"""

from __future__ import annotations

import random
import re
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from modicum.errors import InputError
from modicum.tasks.generated import ENDLESS
from modicum.tasks.haystack import read_text
from modicum.tasks.measure import count, largest
from modicum.tasks.named import Named
from modicum.tasks.sample import Sample


@dataclass(frozen=True)
class Words:
    """A text and where its words (what stands between white space) start and end."""

    text: str
    starts: tuple[int, ...]
    ends: tuple[int, ...]

    def cut(self, first: int, last: int, *, led: bool = False) -> str:
        """The text of words first to last - 1; `led` with the white space in front of the first."""
        if first >= last:
            return ""
        start = self.ends[first - 1] if led and first else self.starts[first]
        return self.text[start : self.ends[last - 1]]


@lru_cache(maxsize=4)
def words(path: str | None) -> Words:
    """The words of a file, a folder, or the sample text; kept."""
    text = read_text(path)
    spans = [match.span() for match in re.finditer(r"\S+", text)]
    return Words(text, tuple(start for start, _ in spans), tuple(end for _, end in spans))


@dataclass(frozen=True, kw_only=True)
class Text(Named):
    """Strided perplexity: sample i is `stride` words of the text from word (i + 1) · stride on, after as many
    words before them as the length allows. Together the targets are the text, but for its first words."""

    kind: str = "text"
    path: str | None = None
    """A text file or a folder of .txt files; None is `modicum.sample_text()`."""
    stride: int = 64
    """Words, not tokens: so the samples are the same for every tokenizer."""

    def __post_init__(self) -> None:
        self.check("stride", 1)

    @property
    def metric(self) -> str:
        """Mean loss of the target."""
        return "loss"

    def __len__(self) -> int:
        return max(0, -(-len(words(self.path).starts) // self.stride) - 1)

    def sample(self, index: int, length: int | None, tokenizer: Any, seed: int = 0) -> Sample:
        """See `Task.sample`; the target counts in the length.

        Raises:
            InputError: there is no sample of that index, or the target alone is too long.
        """
        text = words(self.path)
        if not 0 <= index < len(self):
            raise InputError(f"{self.name} has {len(self)} samples, from 0 on; there is no {index}")
        first = (index + 1) * self.stride
        target = text.cut(first, min(first + self.stride, len(text.starts)), led=True)
        before: int | None = first
        if length is not None:
            room = length - count(tokenizer, target, special=False)
            before = largest(
                lambda n: count(tokenizer, text.cut(first - n, first), special=True), room, 1, first
            )
            if before is None:
                raise InputError(
                    f"sample {index} of {self.name}: its {self.stride} words are {length - room} tokens, the "
                    f"length is {length}: give a longer one or a smaller stride"
                )
        return Sample(
            task=self.name,
            index=index,
            context=text.cut(first - (before or 0), first),
            question="",
            answers=(),
            metric="loss",
            max_new_tokens=0,
            target=target,
        )


@dataclass(frozen=True, kw_only=True)
class Recall(Named):
    """Long-range perplexity: a passage that stands early in a text comes again at its end; the loss of what
    follows its first `cue` words is low only for one who still knows the passage."""

    kind: str = "recall"
    path: str | None = None
    """A text file or a folder of .txt files; None is `modicum.sample_text()`."""
    passage: int = 64
    """Words of the passage."""
    cue: int = 8
    """How many of them are given when it comes again."""
    depth: float | None = None
    """Where in the context the passage first stands, 0 to 1; None: drawn from 0 to 0.5."""

    def __post_init__(self) -> None:
        self.check("passage", 2)
        self.check("cue", 1, self.passage - 1)
        self.check("depth", 0, 1)

    @property
    def metric(self) -> str:
        """Mean loss of the target."""
        return "loss"

    def __len__(self) -> int:
        return ENDLESS

    def sample(self, index: int, length: int | None, tokenizer: Any, seed: int = 0) -> Sample:
        """See `Task.sample`; the target counts in the length. None takes the whole text.

        Raises:
            InputError: a negative index, a text shorter than the passage, or a length too short for it.
        """
        if not 0 <= index < ENDLESS:
            raise InputError(f"{self.name} has samples 0 to {ENDLESS - 1}, not {index}")
        text = words(self.path)
        more = len(text.starts) - self.passage  # words beside the passage
        if more < 1:
            raise InputError(
                f"{self.name}: the text has {len(text.starts)} words, which is not more than the passage's "
                f"{self.passage}; give a longer text"
            )
        rng = random.Random(f"recall/{index}/{length}/{seed}")
        place, depth = rng.randint(0, more), rng.uniform(0, 0.5)
        if self.depth is not None:
            depth = self.depth
        again = "\n\n" + text.cut(place, place + self.cue)
        target = text.cut(place + self.cue, place + self.passage, led=True)

        def window(n: int) -> tuple[int, int]:
            """The passage with n words around it, at its depth unless the text ends there."""
            start = min(max(0, place - int(depth * n)), more - n)
            return start, start + n + self.passage

        def context(n: int) -> str:
            return text.cut(*window(n)) + again

        n: int | None = more
        if length is not None:
            room = length - count(tokenizer, target, special=False)
            n = largest(lambda n: count(tokenizer, context(n), special=True), room, 0, more)
        if n is None:
            raise InputError(
                f"{self.name}: a passage of {self.passage} words that comes twice does not fit into {length} "
                "tokens: give a longer length or a shorter passage"
            )
        base = text.starts[window(n)[0]]
        start, end = text.starts[place] - base, text.ends[place + self.passage - 1] - base
        made = context(n)
        return Sample(
            task=self.name,
            index=index,
            context=made,
            question="",
            answers=(),
            metric="loss",
            max_new_tokens=0,
            target=target,
            needles=((start, end),),
            depth=start / max(1, len(made) - len(again) - (end - start)),
        )
