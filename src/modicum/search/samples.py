"""Samples: networks of a space that are finetuned so that a predictor can be fitted to their scores."""

from __future__ import annotations

import json
import math
import os
import random
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from modicum.errors import InputError
from modicum.search.space import Picks


@dataclass(frozen=True)
class Sample:
    """A network that was finetuned.

    Attributes:
        variants: the name of each block's variant.
        assembled: its score before, with statistics reset.
        finetuned: its score after.
        seconds: that it took.
    """

    variants: tuple[str, ...]
    assembled: float
    finetuned: float
    seconds: float


def draw(usable: Sequence[Sequence[int]], count: int, seed: int) -> list[Picks]:
    """Networks drawn so that each block's variants come up equally often, as nearly as can be; no two alike.

    Args:
        usable: for each block the numbers of variants that may be drawn.
        count: how many networks; fewer come where there are fewer.
    """
    generator = random.Random(seed)
    count = min(count, math.prod(map(len, usable)))
    decks: list[list[int]] = [[] for _ in usable]
    drawn: list[Picks] = []
    seen: set[Picks] = set()
    tries = 0
    while len(drawn) < count:
        for deck, own in zip(decks, usable, strict=True):
            if not deck:
                deck.extend(generator.sample(list(own), len(own)))
        picks = tuple(deck.pop() for deck in decks)
        tries += 1
        if tries > 50 * count:
            # A small space: the last ones are hardly ever drawn.
            rest = [p for p in _all(usable) if p not in seen]
            return drawn + generator.sample(rest, count - len(drawn))
        if picks not in seen:
            seen.add(picks)
            drawn.append(picks)
    return drawn


def _all(usable: Sequence[Sequence[int]]) -> list[Picks]:
    networks: list[Picks] = [()]
    for own in usable:
        networks = [(*picks, pick) for picks in networks for pick in own]
    return networks


class SampleFile:
    """Samples in a JSON Lines file, one line each, so that a stopped run goes on.

    Args:
        path: of the file; need not exist.
        basis: what the scores depend on (a digest); lines of another basis are left out.

    Raises:
        InputError: the file cannot be read.
    """

    def __init__(self, path: Path, basis: str) -> None:
        self.path, self.basis = path, basis
        self.samples: dict[tuple[str, ...], Sample] = {}
        try:
            lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"{path} cannot be read ({error}): remove it to begin anew") from error
        for line in lines:
            try:
                told = json.loads(line)
                if told.pop("basis") == basis:
                    sample = Sample(**(told | {"variants": tuple(told["variants"])}))
                    self.samples[sample.variants] = sample
            except (ValueError, TypeError, KeyError):
                continue  # cut by a kill

    def add(self, sample: Sample) -> None:
        """Append a line in one write.

        Raises:
            InputError: it cannot be written.
        """
        line = (json.dumps(asdict(sample) | {"basis": self.basis}) + "\n").encode()
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with open(self.path, "ab") as file:
                if file.tell() and not self.path.read_bytes().endswith(b"\n"):
                    line = b"\n" + line
                file.write(line)
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise InputError(f"cannot write {self.path}: {error.strerror or error}") from error
        self.samples[sample.variants] = sample
