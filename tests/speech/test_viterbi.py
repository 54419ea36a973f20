"""Viterbi: the best path is that of all paths, enumerated."""

import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from modicum.errors import InputError
from modicum.speech.tokens import SILENCE, TokenSet
from modicum.speech.viterbi import PhoneViterbi
from tests.bounds import exactly

TOKENS = TokenSet("thirds", (SILENCE, "a"))


def score(log_probs, path, begins, penalty):
    """Of a path, or -inf where it is none."""
    total = 0.0
    for frame, (one, is_new) in enumerate(zip(path, begins, strict=True)):
        if is_new and one % 3:
            return -math.inf
        if not is_new:
            before = path[frame - 1] if frame else -1
            if before // 3 != one // 3 or one < before:
                return -math.inf
        total += float(log_probs[frame, one]) - (penalty if is_new and frame else 0)
    return total


@given(st.integers(1, 4), st.floats(0, 3), st.integers(0, 999))
def test_the_path_is_the_best_of_all(num_frames, penalty, seed):
    generator = torch.Generator().manual_seed(seed)
    log_probs = (2 * torch.randn(num_frames, 6, generator=generator, dtype=torch.float64)).log_softmax(-1)
    best = max(
        score(log_probs, path, begins, penalty)
        for path in itertools.product(range(6), repeat=num_frames)
        for begins in itertools.product([True, False], repeat=num_frames)
    )
    classes, is_new = PhoneViterbi(TOKENS, penalty).path(log_probs)
    assert score(log_probs, classes, is_new, penalty) == exactly(best)


def test_a_flicker_is_no_phone_and_silence_is_not_said():
    choices = [0, 0, 1, 3, 3, 4, 0, 4, 5, 5, 3, 4, 5, 0, 1]
    probabilities = torch.full((len(choices), 6), 0.1)
    probabilities[range(len(choices)), choices] = 0.5
    assert TOKENS.decode(choices) == "a a a"
    assert PhoneViterbi(TOKENS, 2.0)(probabilities.log()) == ["a", "a"]


def test_bad_input_is_refused():
    with pytest.raises(InputError, match="tokens are phones"):
        PhoneViterbi(TokenSet("phones", ("a",)))
    with pytest.raises(InputError, match="penalty is -1"):
        PhoneViterbi(TOKENS, -1)
    for shape in ((0, 6), (3, 5)):
        with pytest.raises(InputError, match=r"give \[frames, 6\]"):
            PhoneViterbi(TOKENS)(torch.zeros(shape))
