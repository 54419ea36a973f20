"""Batches: which utterances a training step has, with about the same seconds of audio in each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from modicum.distill.training import generator
from modicum.errors import InputError

_POOL = 32
"""Batches whose utterances are sorted by length together, so that little is padding."""


@dataclass(frozen=True)
class BatchPlan:
    """Batches of each epoch, from a seed.

    An epoch has one of the copies of each utterance. Utterances are shuffled, sorted by length within pools
    of 32 batches, cut into batches of at most max_frames with padding, and the batches shuffled.

    Attributes:
        lengths: feature frames of each row of the corpus.
        copies: consecutive rows that are copies of one utterance.
        max_frames: of a batch, with padding; a longer utterance is a batch of its own.
        seed: of the order.

    Raises:
        InputError: max_frames is below 1.
    """

    lengths: Sequence[int]
    copies: int
    max_frames: int
    seed: int

    def __post_init__(self) -> None:
        if self.max_frames < 1:
            raise InputError(f"a batch has {self.max_frames} frames: give more seconds of audio for a batch")

    def epoch(self, rows: Sequence[int], epoch: int) -> list[list[int]]:
        """The batches of an epoch, of the rows that can be used."""
        utterances = sorted({row // self.copies for row in rows})
        usable = set(rows)
        chosen = []
        for utterance in utterances:
            copies = [utterance * self.copies + copy for copy in range(self.copies)]
            copies = [row for row in copies if row in usable]
            chosen.append(copies[(epoch + utterance) % len(copies)])
        chance = generator(self.seed, epoch)
        order = [chosen[index] for index in torch.randperm(len(chosen), generator=chance).tolist()]
        mean = sum(self.lengths[row] for row in order) / len(order)
        pool = max(1, int(_POOL * self.max_frames / mean))
        batches: list[list[int]] = []
        for start in range(0, len(order), pool):
            batches += self._cut(sorted(order[start : start + pool], key=lambda row: self.lengths[row]))
        return [batches[index] for index in torch.randperm(len(batches), generator=chance).tolist()]

    def _cut(self, rows: Sequence[int]) -> list[list[int]]:
        batches: list[list[int]] = []
        for row in rows:  # in order of length: the newest is the longest
            if batches and self.lengths[row] * (len(batches[-1]) + 1) <= self.max_frames:
                batches[-1].append(row)
            else:
                batches.append([row])
        return batches
