"""The loss on a teacher's CTC outputs."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from modicum.distill import CTCBatch, CTCFrames, SoftTarget, TopK, ctc_essence_loss, essence_loss
from modicum.errors import InputError
from tests.bounds import FUNCTION, assert_within, gamma
from tests.distill import reference

NUM, LENGTH, CLASSES = 2, 10, 5
F64 = torch.float64


def logits_of(seed: int) -> Tensor:
    return 2 * torch.randn(NUM, LENGTH, CLASSES, generator=torch.Generator().manual_seed(seed), dtype=F64)


def target_of(seed: int, k: int = 2) -> SoftTarget:
    teacher = logits_of(seed)
    teacher[..., 0] += 2  # blank at most frames
    return TopK(k).select(teacher.softmax(-1).flatten(0, 1)).target()


BATCH = CTCBatch(torch.tensor([10, 7]), torch.tensor([[1, 2, 2], [3, 1, 0]]), torch.tensor([3, 2]))


@given(
    best=st.lists(st.integers(0, 3), min_size=1, max_size=20),
    blank=st.integers(0, 3),
    neighbours=st.integers(0, 4),
    data=st.data(),
)
def test_frames_are_those_near_spikes(
    best: list[int], blank: int, neighbours: int, data: st.DataObject
) -> None:
    length = data.draw(st.integers(0, len(best)))
    found = CTCFrames(blank, neighbours).select(torch.tensor([best]), torch.tensor([length]))
    assert found[0].tolist() == reference.near_spikes(best, length, blank, neighbours)


@pytest.mark.parametrize("neighbours", [0, 1, LENGTH])
@pytest.mark.parametrize("hard_weight", [0.0, 0.4, 1.0])
def test_the_loss_is_ctc_and_the_selected_frames(neighbours: int, hard_weight: float) -> None:
    logits, target, frames = logits_of(0), target_of(1), CTCFrames(0, neighbours)
    assert BATCH.labels is not None
    assert BATCH.label_lengths is not None
    best = target.classes[:, 0].view(NUM, LENGTH).tolist()
    soft, hard = [], []
    for n in range(NUM):
        chosen = reference.near_spikes(best[n], int(BATCH.lengths[n]), 0, neighbours)
        for t in range(LENGTH):
            if chosen[t]:
                row = n * LENGTH + t
                pair = zip(target.classes[row].tolist(), target.probabilities[row].tolist(), strict=True)
                soft.append(reference.loss(logits[n, t].tolist(), dict(pair), 0.0, 0, 0.0, 1.0))
        rows = [reference.softmax(row) for row in logits[n, : BATCH.lengths[n]].tolist()]
        labels = BATCH.labels[n, : BATCH.label_lengths[n]].tolist()
        hard.append(reference.ctc(rows, labels, 0) / len(labels))
    assert 0 < len(soft) < NUM * LENGTH
    expected = hard_weight * sum(hard) / NUM + (1 - hard_weight) * sum(soft) / len(soft)
    found = ctc_essence_loss(logits, target, BATCH, frames=frames, hard_weight=hard_weight)
    bound = 2 * gamma(LENGTH * (2 * CLASSES + 4 * FUNCTION), F64) * max(1.0, *hard, *soft)
    assert_within(found, torch.tensor(expected, dtype=F64), bound)


def test_all_frames_are_the_loss_of_frames() -> None:
    logits, target = logits_of(0), target_of(1)
    whole = CTCBatch(torch.full((NUM,), LENGTH))
    found = ctc_essence_loss(logits, target, whole, frames=CTCFrames(0, LENGTH), hard_weight=0, temperature=2)
    expected = essence_loss(logits, target, hard_weight=0, temperature=2)
    assert_within(found, expected, 2 * gamma(NUM * LENGTH, F64) * expected.abs())


def test_frames_that_are_not_selected_get_no_gradient() -> None:
    logits, target, frames = logits_of(0).requires_grad_(), target_of(1), CTCFrames(0, 1)
    ctc_essence_loss(logits, target, BATCH, frames=frames, hard_weight=0).backward()
    assert logits.grad is not None
    chosen = frames.select(target.classes[:, 0].view(NUM, LENGTH), BATCH.lengths)
    assert torch.equal(logits.grad.abs().sum(-1) > 0, chosen)


def test_a_teacher_that_gives_blank_alone_teaches_nothing() -> None:
    logits = logits_of(0).requires_grad_()
    blank = torch.zeros(NUM * LENGTH, CLASSES, dtype=F64)
    blank[:, 0] = 1
    target = TopK(1).select(blank).target()
    loss = ctc_essence_loss(logits, target, BATCH, frames=CTCFrames(), hard_weight=0)
    loss.backward()
    assert loss.item() == 0
    assert logits.grad is not None
    assert not logits.grad.any()


def test_bad_input() -> None:
    logits, target = logits_of(0), target_of(1)
    with pytest.raises(InputError, match="there are no labels"):
        ctc_essence_loss(logits, target, CTCBatch(BATCH.lengths), frames=CTCFrames())
    with pytest.raises(InputError, match="blank is 9"):
        ctc_essence_loss(logits, target, BATCH, frames=CTCFrames(blank=9))
    with pytest.raises(InputError, match="9 frames and 5 classes, the target of 20 frames"):
        ctc_essence_loss(logits[:, :9], target, BATCH, frames=CTCFrames())
    with pytest.raises(InputError, match="neighbours -1"):
        CTCFrames(neighbours=-1)
