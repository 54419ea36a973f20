"""Sequence ensemble: several CTC models decide together on a token sequence.

CTC models give the same token at different frames, so the mean of their outputs at one frame says little.
The mean of the probabilities that they give to a whole token sequence has no such fault:

    P(y | x) = 1/M · Σ_m P_m(y | x)

with P_m by CTC's forward algorithm. The most probable sequence among those that the members find themselves
is taken. This is ours, after the combination of systems by rescoring lists of hypotheses.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn import functional as F

from modicum.speech.decoding import Decoder, GreedyDecoder, PrefixBeamSearch


@dataclass(frozen=True)
class SequenceEnsemble:
    """Decodes the outputs of several CTC models.

    Attributes:
        decoder: of one model; all hypotheses of a `PrefixBeamSearch` are candidates.
        blank: class of the blank.
    """

    decoder: Decoder = field(default_factory=GreedyDecoder)
    blank: int = 0

    def __call__(self, log_probs: Sequence[Tensor]) -> list[int]:
        """Tokens for the log-probabilities [T, C] of each member."""
        candidates = sorted({found for one in log_probs for found in self._hypotheses(one)})
        scores = torch.stack([sequence_log_probs(one, candidates, self.blank) for one in log_probs])
        best = int((scores.logsumexp(0) - math.log(len(log_probs))).argmax())
        return list(candidates[best])

    def _hypotheses(self, log_probs: Tensor) -> list[tuple[int, ...]]:
        if isinstance(self.decoder, PrefixBeamSearch):
            return [hypothesis.tokens for hypothesis in self.decoder.search(log_probs)]
        return [tuple(self.decoder(log_probs))]


def sequence_log_probs(log_probs: Tensor, sequences: Sequence[Sequence[int]], blank: int = 0) -> Tensor:
    """log P(y | x) of each of N token sequences by CTC, [N] float64; -inf where it has no path.

    Args:
        log_probs: [T, C], one model's.
    """
    num, size = len(sequences), log_probs.shape[0]
    tokens = torch.tensor([token for sequence in sequences for token in sequence], dtype=torch.int64)
    return -F.ctc_loss(
        log_probs.double()[:, None].expand(-1, num, -1),
        tokens,
        torch.full((num,), size),
        torch.tensor([len(sequence) for sequence in sequences]),
        blank=blank,
        reduction="none",
    )
