"""CTC scores: log P(expression | recording) of many expressions at once, by the forward algorithm."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from modicum.errors import InputError

BLANK = 0


def ctc_scores(log_probs: Tensor, labels: Sequence[Sequence[int]]) -> Tensor:
    """The log-probability of each label sequence, summed over all paths (Graves et al. 2006, section 4.1).

    With z = (_, l₁, _, …, l_L, _) of 2L + 1 states,

        a_t(s) = lp[t, z_s] + log(e^a_{t-1}(s) + e^a_{t-1}(s-1) + [z_s ≠ _ and z_s ≠ z_{s-2}] e^a_{t-1}(s-2)),

    and the result is log(e^a_T(2L+1) + e^a_T(2L)). All sequences are computed together, padded to the
    longest, in the dtype of log_probs.

    Args:
        log_probs: [T, C], class 0 is the blank.
        labels: classes without blanks; may be empty.

    Returns:
        [N]; -inf where T frames are too few for the sequence.

    Raises:
        InputError: there is no frame, or a label is the blank or out of range.
    """
    num_frames, num_classes = log_probs.shape
    if not num_frames:
        raise InputError("there are no frames: give a longer recording")
    bad = next((one for row in labels for one in row if not 0 < one < num_classes), None)
    if bad is not None:
        raise InputError(f"label {bad} is not among 1 to {num_classes - 1}: use the model's token set")
    if not labels:
        return log_probs.new_empty(0)
    sizes = torch.tensor([len(row) for row in labels])
    width = 2 * int(sizes.max()) + 1
    states = torch.full((len(labels), width), BLANK)  # [N, S]
    for index, row in enumerate(labels):
        states[index, 1 : 2 * len(row) : 2] = torch.tensor(row, dtype=torch.int64)
    may_skip = torch.zeros(states.shape, dtype=torch.bool)
    may_skip[:, 2:] = (states[:, 2:] != BLANK) & (states[:, 2:] != states[:, :-2])
    barrier = torch.where(may_skip, 0.0, -torch.inf).to(log_probs.dtype)[:, 2:]

    # Two states of -inf to the left save the edges a case of their own.
    alpha = log_probs.new_full((len(labels), width + 2), -torch.inf)
    alpha[:, 2:4] = log_probs[0][states[:, :2]]
    alpha[sizes == 0, 3:] = -torch.inf
    for frame in log_probs[1:]:
        total = torch.logaddexp(alpha[:, 2:], alpha[:, 1:-1])
        total[:, 2:] = torch.logaddexp(total[:, 2:], alpha[:, 2:-2] + barrier)
        alpha[:, 2:] = total + frame[states]
    # What lies beyond a sequence's own states never flows back, so only its last two count.
    rows = torch.arange(len(labels))
    last = alpha[rows, 2 + 2 * sizes]
    before = torch.where(sizes > 0, alpha[rows, 1 + 2 * sizes], -torch.inf)
    return torch.logaddexp(last, before)
