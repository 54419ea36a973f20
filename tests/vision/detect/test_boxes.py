"""Overlaps, box coding, anchors, matching and suppression beside plain loops."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from modicum.errors import InputError
from modicum.vision.detect.anchors import AnchorSettings, make_anchors
from modicum.vision.detect.box_coding import decode_boxes, encode_boxes
from modicum.vision.detect.boxes import area, clip, iou, to_centres, to_corners
from modicum.vision.detect.matching import match_anchors
from modicum.vision.detect.nms import NmsSettings, batched_nms, nms
from tests.bounds import FUNCTION, assert_within, gamma
from tests.vision.detect import reference

ROUNDED = gamma(4 * FUNCTION, torch.float64)


def boxes_of(count: int, seed: int, grid: int = 12) -> Tensor:
    """Random boxes [count, 4] float64 on a coarse grid, so that equal overlaps and touching sides occur."""
    generator = torch.Generator().manual_seed(seed)
    low = torch.randint(0, grid, (count, 2), generator=generator)
    return torch.cat([low, low + torch.randint(1, grid, (count, 2), generator=generator)], 1).double()


seeds = st.integers(0, 10_000)


@given(seeds, st.integers(0, 6), st.integers(0, 6))
def test_overlaps_are_those_of_loops(seed: int, n: int, m: int) -> None:
    a, b = boxes_of(n, seed), boxes_of(m, seed + 1)
    expected = torch.tensor([[reference.iou(x, y) for y in b.tolist()] for x in a.tolist()]).reshape(n, m)
    # Integers: areas are exact, and the quotient is rounded once on either side.
    assert_within(iou(a, b), expected.double(), gamma(2, torch.float32))


def test_boxes_without_area_overlap_nothing() -> None:
    empty = torch.tensor([[1.0, 1, 1, 5], [4.0, 4, 2, 2]])
    assert iou(empty, empty).tolist() == [[0, 0], [0, 0]]
    assert area(empty).tolist() == [0, 0]
    assert clip(torch.tensor([[-3.0, 2, 50, 9]]), 8, 10).tolist() == [[0, 2, 10, 8]]


@given(seeds)
def test_coded_boxes_are_those_of_the_formula_and_come_back(seed: int) -> None:
    boxes, anchors = boxes_of(5, seed), boxes_of(5, seed + 1)
    expected = torch.tensor(
        [reference.encode(b, a) for b, a in zip(boxes.tolist(), anchors.tolist(), strict=True)],
        dtype=torch.float64,
    )
    found = encode_boxes(boxes, anchors)
    # A difference of centres cancels: the error is a share of the centres, coded at 1 / (0.1 · side ≥ 1).
    assert_within(found, expected, ROUNDED * (expected.abs() + 10 * 24))
    assert_within(decode_boxes(found, anchors), boxes, 10 * ROUNDED * (boxes.abs().max() + 24))
    assert_within(to_corners(to_centres(boxes)), boxes, gamma(4, torch.float64) * 48)


def test_an_untrained_network_decodes_to_finite_boxes() -> None:
    anchors = torch.tensor([[0.0, 0, 16, 16]])
    found = decode_boxes(torch.full((1, 4), 1e6), anchors)
    assert bool(found.isfinite().all())
    sides = found[0, 2:] - found[0, :2]
    assert_within(sides, torch.full((2,), 16_000.0), 1e-2 * 16_000)


def test_anchors_are_those_of_loops() -> None:
    settings = AnchorSettings(1.5, (2.0, 0.5, 3.0))
    found = make_anchors(settings, [(2, 3), (1, 2)], [8, 16])
    expected = []
    for (rows, columns), stride in (((2, 3), 8), ((1, 2), 16)):
        for row in range(rows):
            for column in range(columns):
                x, y, side = (column + 0.5) * stride, (row + 0.5) * stride, 1.5 * stride
                shapes = [(side, side), (side * math.sqrt(2), side * math.sqrt(2))]
                shapes += [(side * math.sqrt(r), side / math.sqrt(r)) for r in (2.0, 0.5, 3.0)]
                expected += [[x - w / 2, y - h / 2, x + w / 2, y + h / 2] for w, h in shapes]
    assert settings.num_per_cell == 5
    assert_within(found, torch.tensor(expected), gamma(4, torch.float32) * 48)
    with pytest.raises(InputError, match="above 0"):
        AnchorSettings(0.0)


@given(seeds, st.integers(0, 5), st.integers(1, 12), st.sampled_from([0.3, 0.5, 0.7]))
def test_matches_are_those_of_loops(seed: int, boxes: int, anchors: int, threshold: float) -> None:
    ours, theirs = boxes_of(boxes, seed, 8), boxes_of(anchors, seed + 7, 8)
    expected = reference.match(ours.tolist(), theirs.tolist(), threshold)
    assert match_anchors(ours, theirs, threshold).tolist() == expected


@given(seeds)
def test_each_box_that_can_have_an_anchor_has_one(seed: int) -> None:
    boxes, anchors = boxes_of(3, seed, 6), boxes_of(40, seed + 3, 6)
    matched = match_anchors(boxes, anchors)
    for number, overlaps in enumerate(iou(boxes, anchors)):
        if int((overlaps > 0).sum()) >= 3:  # whatever the two others take, one is left
            assert number in matched.tolist()


@given(seeds, st.integers(0, 14), st.sampled_from([0.0, 0.3, 0.45, 1.0]))
def test_suppression_is_the_sequential_greedy_one(seed: int, count: int, max_iou: float) -> None:
    boxes = boxes_of(count, seed, 6)
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randint(0, 5, (count,), generator=generator).double() / 4  # many equal ones
    assert nms(boxes, scores, max_iou).tolist() == reference.nms(boxes.tolist(), scores.tolist(), max_iou)


def test_many_boxes_go_block_by_block() -> None:
    """More than two blocks, so that boxes are dropped by kept ones of earlier blocks."""
    boxes = boxes_of(700, 3, 40)
    scores = torch.rand(700, generator=torch.Generator().manual_seed(3)).double()
    expected = reference.nms(boxes.tolist(), scores.tolist(), 0.3)
    assert any(scores.argsort(descending=True).tolist().index(n) > 512 for n in expected)
    assert nms(boxes, scores, 0.3).tolist() == expected
    assert nms(boxes, scores, 0.3, max_kept=9).tolist() == expected[:9]


def test_a_chain_of_overlaps_takes_several_rounds() -> None:
    """Each box drops the next, so every other one stays: what one round of parallel drops gets wrong."""
    boxes = torch.tensor([[float(4 * n), 0, 4 * n + 10, 10] for n in range(9)])
    scores = torch.linspace(1, 0.1, 9)
    assert nms(boxes, scores, 0.4).tolist() == [0, 2, 4, 6, 8]


@given(seeds)
def test_batches_keep_classes_and_images_apart(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    boxes = torch.stack([boxes_of(10, seed, 6), boxes_of(10, seed + 1, 6)])
    scores = torch.rand(2, 10, 3, generator=generator, dtype=torch.float64)
    settings = NmsSettings(0.2, 0.4, 7)
    for image, found in enumerate(batched_nms(boxes, scores, settings)):
        expected = []
        for label in range(3):
            places = [a for a in range(10) if float(scores[image, a, label]) > 0.2]
            kept = reference.nms(boxes[image][places].tolist(), scores[image, places, label].tolist(), 0.4)
            expected += [(float(scores[image, places[k], label]), label, places[k]) for k in kept]
        expected.sort(key=lambda one: -one[0])
        expected = expected[:7]
        assert found.scores.tolist() == [one[0] for one in expected]
        assert found.labels.tolist() == [one[1] for one in expected]
        assert torch.equal(found.boxes, boxes[image][[one[2] for one in expected]])


def test_settings_out_of_range_are_one_line() -> None:
    with pytest.raises(InputError, match="min_score is 2"):
        NmsSettings(min_score=2)
    with pytest.raises(InputError, match="max_detections is 0"):
        NmsSettings(max_detections=0)
