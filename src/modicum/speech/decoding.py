"""Decoding: token sequences from the log-probabilities of a CTC model."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from modicum.errors import InputError

Decoder = Callable[[Tensor], list[int]]
"""Log-probabilities [T, C] -> tokens without blanks."""


def greedy_decode(log_probs: Tensor, blank: int = 0) -> list[int]:
    """The tokens of the best path: repeats merged, then blanks removed (Graves et al. 2006, section 3.2).

    Args:
        log_probs: [T, C]; logits will do.
    """
    path = torch.unique_consecutive(log_probs.argmax(-1))
    return [int(token) for token in path if token != blank]


@dataclass(frozen=True)
class GreedyDecoder:
    """`greedy_decode` as a `Decoder`."""

    blank: int = 0

    def __call__(self, log_probs: Tensor) -> list[int]:
        return greedy_decode(log_probs, self.blank)


@dataclass(frozen=True)
class Hypothesis:
    """A token sequence and the log of its probability, summed over the paths that the search kept."""

    tokens: tuple[int, ...]
    log_prob: float


@dataclass(frozen=True)
class PrefixBeamSearch:
    """CTC prefix beam search (Graves 2008, section 7.5.3; Hannun et al. 2014, arXiv 1408.2873), without a
    language model.

    For each prefix the probabilities of paths that end in blank and that do not are kept apart. With a beam
    and num_tokens that leave nothing out, a hypothesis has its exact CTC probability.

    Attributes:
        beam: prefixes kept after each frame.
        num_tokens: most probable classes of a frame with which prefixes are extended; 0 for all.
        blank: class of the blank.

    Raises:
        InputError: a number is out of range.
    """

    beam: int = 8
    num_tokens: int = 16
    blank: int = 0

    def __post_init__(self) -> None:
        if self.beam < 1:
            raise InputError(f"beam is {self.beam}: give 1 or more prefixes")
        if self.num_tokens < 0:
            raise InputError(f"num_tokens is {self.num_tokens}: give 1 or more, or 0 for all tokens")

    def __call__(self, log_probs: Tensor) -> list[int]:
        return list(self.search(log_probs)[0].tokens)

    def search(self, log_probs: Tensor) -> list[Hypothesis]:
        """The hypotheses for log-probabilities [T, C], at most `beam`, most probable first."""
        frames: list[list[float]] = log_probs.double().tolist()
        width = min(self.num_tokens or log_probs.shape[-1], log_probs.shape[-1])
        best: list[list[int]] = log_probs.topk(width, -1).indices.tolist()
        beams: dict[tuple[int, ...], tuple[float, float]] = {(): (0.0, -math.inf)}
        for frame, tokens in zip(frames, best, strict=True):
            beams = self._prune(self._extend(beams, frame, tokens))
        return [Hypothesis(prefix, _add(*ends)) for prefix, ends in beams.items()]

    def _extend(
        self, beams: dict[tuple[int, ...], tuple[float, float]], frame: list[float], tokens: list[int]
    ) -> dict[tuple[int, ...], tuple[float, float]]:
        """Prefixes after one more frame: log-probabilities of paths that end in blank, and that do not."""
        in_blank: dict[tuple[int, ...], float] = defaultdict(lambda: -math.inf)
        in_token: dict[tuple[int, ...], float] = defaultdict(lambda: -math.inf)
        for prefix, (blank, token) in beams.items():
            either = _add(blank, token)
            in_blank[prefix] = _add(in_blank[prefix], either + frame[self.blank])
            if prefix:
                in_token[prefix] = _add(in_token[prefix], token + frame[prefix[-1]])
            for new in tokens:
                if new == self.blank:
                    continue
                # A token follows itself only after a blank.
                before = blank if prefix and new == prefix[-1] else either
                longer = (*prefix, new)
                in_token[longer] = _add(in_token[longer], before + frame[new])
        return {prefix: (in_blank[prefix], in_token[prefix]) for prefix in in_blank.keys() | in_token.keys()}

    def _prune(
        self, beams: dict[tuple[int, ...], tuple[float, float]]
    ) -> dict[tuple[int, ...], tuple[float, float]]:
        # By the prefix where two are equally probable, so that the order of a set does not show.
        order = sorted(beams, key=lambda prefix: (-_add(*beams[prefix]), prefix))
        return {prefix: beams[prefix] for prefix in order[: self.beam]}


def _add(a: float, b: float) -> float:
    """log(e^a + e^b)"""
    high, low = (a, b) if a >= b else (b, a)
    return high if low == -math.inf else high + math.log1p(math.exp(low - high))
