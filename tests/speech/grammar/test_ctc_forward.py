"""CTC scores beside plain recursion, all paths, and torch."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from modicum.errors import InputError
from modicum.speech.grammar import ctc_scores
from tests.bounds import FUNCTION, unit_roundoff
from tests.speech.grammar.reference import all_paths, forward


def drawn(num_frames: int, num_classes: int, seed: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    logits = 3 * torch.randn(num_frames, num_classes, generator=generator, dtype=torch.float64)
    return logits.log_softmax(-1).to(dtype)


def bound(log_probs: torch.Tensor) -> float:
    """Of a score: in each frame two log-sums and an addition of numbers no larger than all frames' sum.

    A log-sum takes over the error of its operands (its slopes sum up to 1) and adds its own.
    """
    num_frames = len(log_probs)
    size = float(-log_probs.min(1).values.double().sum()) + num_frames * math.log(3)
    return num_frames * (2 * FUNCTION + 1) * unit_roundoff(log_probs.dtype) * size


label = st.lists(st.integers(1, 3), max_size=4)


@given(st.integers(1, 5), st.lists(label, min_size=1, max_size=4), st.integers(0, 999))
def test_scores_are_sums_over_all_paths(num_frames: int, labels: list[list[int]], seed: int) -> None:
    log_probs = drawn(num_frames, 4, seed)
    found = ctc_scores(log_probs, labels)
    for one, score in zip(labels, found.tolist(), strict=True):
        expected = all_paths(log_probs.tolist(), one)
        assert forward(log_probs.tolist(), one) == pytest.approx(expected, abs=bound(log_probs))
        assert score == pytest.approx(expected, abs=bound(log_probs))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_long_scores_equal_the_recursion_and_torch(dtype: torch.dtype) -> None:
    log_probs = drawn(120, 28, 1, dtype)
    generator = torch.Generator().manual_seed(2)
    sizes = [0, 1, 2, 7, 30, 60, 119]
    labels = [torch.randint(1, 28, (size,), generator=generator).tolist() for size in sizes]
    labels.append([5] * 40)  # repeats need a blank between
    found = ctc_scores(log_probs, labels)
    assert found.dtype == dtype
    for one, score in zip(labels, found.tolist(), strict=True):
        expected = forward(log_probs.double().tolist(), one)
        # torch's own rounding is of the same size.
        theirs = -torch.nn.functional.ctc_loss(
            log_probs.double()[:, None],
            torch.tensor([one], dtype=torch.long),
            (120,),
            (len(one),),
            reduction="sum",
        )
        assert score == pytest.approx(expected, abs=bound(log_probs))
        assert float(theirs) == pytest.approx(expected, abs=bound(log_probs.double()))


def test_a_sequence_scores_the_same_whatever_stands_beside() -> None:
    log_probs = drawn(40, 28, 3, torch.float32)
    alone = ctc_scores(log_probs, [[3, 3, 4]])
    beside = ctc_scores(log_probs, [[1] * 19, [3, 3, 4], []])
    assert torch.equal(alone, beside[1:2])


def test_too_few_frames_make_minus_infinity() -> None:
    log_probs = drawn(3, 4, 0, torch.float32)
    assert ctc_scores(log_probs, [[1, 2, 3], [1, 1, 2], [1, 2, 3, 1]]).isinf().tolist() == [False, True, True]


def test_probabilities_near_zero_stay_finite() -> None:
    log_probs = torch.full((200, 3), -90.0)
    log_probs[:, 0] = 0.0
    found = ctc_scores(log_probs, [[1, 2] * 20])
    assert found.isfinite().all()
    assert float(found) < -3000


def test_bad_labels_are_named() -> None:
    log_probs = drawn(3, 4, 0)
    for bad in (0, 4, -1):
        with pytest.raises(InputError, match=f"label {bad} is not among 1 to 3"):
            ctc_scores(log_probs, [[1], [bad]])
    with pytest.raises(InputError, match="no frames"):
        ctc_scores(log_probs[:0], [[1]])
    assert ctc_scores(log_probs, []).shape == (0,)
