"""Viterbi: the most probable sequence of phones for the outputs of a frame-labelled model.

The choice of each frame alone flickers between phones. Here a phone goes through its thirds in order, each
of one or more frames, and a new phone costs something, as in a hybrid system with a loop over phones.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
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
        scores = log_probs.detach().double().cpu().numpy().reshape(len(log_probs), -1, 3).transpose(0, 2, 1)
        num_phones = scores.shape[2]
        best = np.full((3, num_phones), -np.inf)  # of paths that end in each third of each phone
        best[0] = scores[0, 0]
        # How many thirds back each third was reached from; 3 for a new phone, which begins after `ends`.
        choices = np.zeros(scores.shape, dtype=np.int8)
        ends = np.zeros(len(scores), dtype=np.int64)
        for frame in range(1, len(scores)):
            end = int(best.argmax())
            new = float(best.flat[end]) - self.penalty
            values, choice = best.copy(), choices[frame]
            np.copyto(values[0], new, where=(is_new := new > best[0]))
            choice[0][is_new] = 3
            for third, back in ((1, 1), (2, 1), (2, 2)):
                earlier = best[third - back]
                is_earlier = earlier > values[third]
                np.copyto(values[third], earlier, where=is_earlier)
                choice[third][is_earlier] = back
            ends[frame] = end
            best = values + scores[frame]
        third, phone = divmod(int(best.argmax()), num_phones)
        classes, begins = [3 * phone + third], []
        for frame in range(len(scores) - 1, 0, -1):
            back = int(choices[frame, third, phone])
            begins.append(back == 3)
            third, phone = divmod(int(ends[frame]), num_phones) if back == 3 else (third - back, phone)
            classes.append(3 * phone + third)
        begins.append(True)
        return classes[::-1], begins[::-1]
