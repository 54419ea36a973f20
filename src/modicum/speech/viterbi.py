"""Viterbi: the most probable sequence of phones for the outputs of a frame-labelled model.

The choice of each frame alone flickers between phones. Here a phone goes through its thirds in order, each
of one or more frames, and a new phone costs something, as in a hybrid system with a loop over phones.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from modicum.errors import InputError
from modicum.speech.tokens import SILENCE, TokenSet


@dataclass(frozen=True)
class PhoneViterbi:
    """Decodes log-probabilities of thirds of phones.

    The score of a path is the sum of its classes' log-probabilities, less `penalty` for each phone but the
    first. A phone begins with its first third, whose frames the second or the last follow; it may end after
    any third, so that one frame can be a phone.

    Attributes:
        tokens: of the model.
        penalty: of a new phone, in nats; silence counts as one.

    Raises:
        InputError: the tokens are not thirds, or the penalty is below 0.
    """

    tokens: TokenSet
    penalty: float = 4.0

    def __post_init__(self) -> None:
        if self.tokens.kind != "thirds":
            raise InputError(f"tokens are {self.tokens.kind}: give those of a frames model")
        if not 0 <= self.penalty < float("inf"):
            raise InputError(f"the penalty is {self.penalty}: give 0 or more nats")

    def __call__(self, log_probs: Tensor) -> list[str]:
        """The phones, without silence, of log-probabilities [T, 3P]."""
        phones = [int(one) // 3 for one, is_new in zip(*self.path(log_probs), strict=True) if is_new]
        return [self.tokens.symbols[one] for one in phones if self.tokens.symbols[one] != SILENCE]

    def path(self, log_probs: Tensor) -> tuple[list[int], list[bool]]:
        """The class of each frame on the best path, and whether a phone begins there.

        Raises:
            InputError: the log-probabilities are of other classes, or there is no frame.
        """
        if log_probs.dim() != 2 or not len(log_probs) or log_probs.shape[1] != self.tokens.num_classes:
            raise InputError(
                f"log-probabilities are {tuple(log_probs.shape)}: give [frames, {self.tokens.num_classes}]"
            )
        scores = log_probs.double().view(len(log_probs), -1, 3)  # [T, P, 3]
        best = torch.full_like(scores[0], float("-inf"))
        best[:, 0] = scores[0, :, 0]
        sources = torch.zeros(scores.shape, dtype=torch.int64)
        index = torch.arange(best.numel()).view_as(best)
        never = torch.full_like(best[:, 0], float("-inf"))
        for frame in range(1, len(scores)):
            end = int(best.argmax())
            # From where each third is reached: from itself, from earlier thirds, or by a new phone.
            first = torch.stack([best[:, 0], never, best.flatten()[end] - self.penalty + 0 * best[:, 0]])
            second = torch.stack([best[:, 1], best[:, 0], never])
            last = torch.stack([best[:, 2], best[:, 1], best[:, 0]])
            values, choices = torch.stack([first, second, last], 1).max(0)  # [3 thirds, P]
            steps = torch.stack([index - choice for choice in range(3)])  # of 0, 1 or 2 thirds back
            before = steps.gather(0, choices.T[None])[0]
            # A new phone is marked by a negative source, so that it is told from the same phone going on.
            before[:, 0] = torch.where(choices[0] == 2, -1 - end, before[:, 0])
            sources[frame] = before
            best = values.T + scores[frame]
        classes, is_new = [int(best.argmax())], [True]
        for frame in range(len(scores) - 1, 0, -1):
            source = int(sources[frame].flatten()[classes[0]])
            is_new[0] = source < 0
            classes.insert(0, -1 - source if source < 0 else source)
            is_new.insert(0, True)
        return classes, is_new
