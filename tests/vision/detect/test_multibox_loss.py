"""Targets, hard negatives and the multibox loss beside plain loops; gradients by finite differences."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from modicum.vision.detect.multibox_loss import Targets, make_targets, mined_anchors, multibox_loss
from tests.bounds import FUNCTION, exactly, gamma
from tests.vision.detect import reference

seeds = st.integers(0, 10_000)


def batch(seed: int, anchors: int = 12, share: float = 0.3) -> tuple[Tensor, Tensor, Targets]:
    generator = torch.Generator().manual_seed(seed)
    logits = 2 * torch.randn(2, anchors, 3, generator=generator, dtype=torch.float64)
    offsets = 2 * torch.randn(2, anchors, 4, generator=generator, dtype=torch.float64)
    labels = torch.randint(1, 3, (2, anchors), generator=generator)
    labels[torch.rand(2, anchors, generator=generator) > share] = 0
    wanted = torch.randn(2, anchors, 4, generator=generator, dtype=torch.float64)
    return logits, offsets, Targets(labels, wanted * (labels > 0)[..., None])


@given(seeds, st.sampled_from([0.0, 0.1, 0.5, 1.0]))
def test_the_loss_is_that_of_loops(seed: int, share: float) -> None:
    logits, offsets, targets = batch(seed, share=share)
    expected = reference.multibox(
        logits.tolist(), offsets.tolist(), targets.labels.tolist(), targets.offsets.tolist()
    )
    assert float(multibox_loss(logits, offsets, targets)) == exactly(expected, 200 + 24 * 3 * FUNCTION)
    mined = mined_anchors(logits, targets)
    for image in range(2):
        wanted = reference.mined(logits[image].tolist(), targets.labels[image].tolist())
        assert set(mined[image].nonzero()[:, 0].tolist()) == wanted


def test_equally_hard_negatives_are_taken_from_the_front() -> None:
    labels = torch.tensor([[0, 1, 0, 0, 0, 0, 0]])
    mined = mined_anchors(torch.zeros(1, 7, 3), Targets(labels, torch.zeros(1, 7, 4)))
    assert mined.tolist() == [[True, True, True, True, False, False, False]]


@pytest.mark.parametrize("part", ["logits", "offsets"])
def test_gradients_are_finite_differences(part: str) -> None:
    logits, offsets, targets = batch(3)
    mined = mined_anchors(logits, targets)
    given = {"logits": logits, "offsets": offsets}
    given[part].requires_grad_()
    multibox_loss(given["logits"], given["offsets"], targets, mined).backward()
    gradient = given[part].grad
    assert gradient is not None
    step = 1e-5
    with torch.no_grad():
        for place in [
            (0, 0, 0),
            (0, 5, 2),
            (1, 3, 1),
            *map(tuple, targets.is_matched.nonzero()[:3].tolist()),
        ]:
            index = place if len(place) == 3 else (*place, 1)
            sides = []
            for sign in (1, -1):
                moved = {name: value.detach().clone() for name, value in given.items()}
                moved[part][index] += sign * step
                sides.append(float(multibox_loss(moved["logits"], moved["offsets"], targets, mined)))
            difference = (sides[0] - sides[1]) / (2 * step)
            # The third derivative is at most 1 here (smooth L1's second jumps by 1): step² and rounding.
            bound = step + gamma(2000, torch.float64) * max(map(abs, sides)) / step
            assert float(gradient[index]) == pytest.approx(difference, abs=bound)


def test_targets_hold_coded_boxes_of_their_images() -> None:
    anchors = torch.tensor([[0.0, 0, 10, 10], [20, 20, 40, 40], [21, 20, 41, 40], [60, 60, 70, 70]])
    boxes = [torch.tensor([[20.0, 22, 40, 42]]), torch.zeros(0, 4)]
    targets = make_targets(boxes, [torch.tensor([1]), torch.zeros(0, dtype=torch.long)], anchors)
    assert targets.labels.tolist() == [[0, 2, 2, 0], [0, 0, 0, 0]]
    expected = reference.encode(boxes[0][0].tolist(), anchors[2].tolist())
    assert targets.offsets[0, 2].tolist() == pytest.approx(expected, abs=1e-5)
    assert not targets.offsets[1].any()
