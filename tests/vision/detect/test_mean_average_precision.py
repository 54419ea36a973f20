"""Average precision beside plain loops, and pycocotools' beside what is known."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from modicum.vision.detect.mean_average_precision import (
    Truth,
    average_precision,
    coco_average_precision,
    precision_curve,
)
from modicum.vision.detect.nms import Detections
from tests.bounds import exactly
from tests.vision.detect import reference


def images(seed: int, count: int = 4) -> tuple[list[Detections], list[Truth]]:
    """Random boxes, and detections that are some of them moved a little."""
    generator = torch.Generator().manual_seed(seed)
    found, truth = [], []
    for _ in range(count):
        number = int(torch.randint(0, 4, (), generator=generator))
        low = torch.randint(0, 60, (number, 2), generator=generator)
        boxes = torch.cat([low, low + torch.randint(8, 30, (number, 2), generator=generator)], 1).float()
        labels = torch.randint(0, 2, (number,), generator=generator)
        truth.append(Truth(boxes, labels, torch.rand(number, generator=generator) < 0.2))
        moved = torch.cat([boxes, boxes, torch.tensor([[3.0, 3, 20, 20]])])
        moved = moved + torch.randint(-4, 5, moved.shape, generator=generator)
        moved[:, 2:] = torch.maximum(moved[:, 2:], moved[:, :2] + 1)
        # All scores differ, as the order of equal ones is nobody's to say.
        scores = torch.rand(len(moved), generator=generator)
        guessed = torch.cat([labels, labels, torch.zeros(1, dtype=torch.long)])
        found.append(Detections(moved, scores, guessed))
    return found, truth


def plain(found: list[Detections], truth: list[Truth], label: int) -> tuple[list[tuple[float, float]], int]:
    """Recall and precision by loops."""
    rows = []
    total = 0
    for image, true in enumerate(truth):
        total += sum(
            1
            for kind, hard in zip(true.labels.tolist(), true.is_difficult.tolist(), strict=True)
            if kind == label and not hard
        )
        for box, score, kind in zip(
            found[image].boxes.tolist(),
            found[image].scores.tolist(),
            found[image].labels.tolist(),
            strict=True,
        ):
            if kind == label:
                rows.append((score, image, box))
    rows.sort(key=lambda row: -row[0])
    taken: set[tuple[int, int]] = set()
    points, right, wrong = [], 0, 0
    for _, image, box in rows:
        best, place = 0.0, -1
        for number, (other, kind) in enumerate(
            zip(truth[image].boxes.tolist(), truth[image].labels.tolist(), strict=True)
        ):
            overlap = reference.iou(box, other)
            if kind == label and overlap > best:
                best, place = overlap, number
        if place >= 0 and best >= 0.5:
            if bool(truth[image].is_difficult[place]):
                continue
            if (image, place) in taken:
                wrong += 1
            else:
                right += 1
                taken.add((image, place))
        else:
            wrong += 1
        points.append((right / total if total else math.nan, right / (right + wrong)))
    return points, total


@given(st.integers(0, 10_000), st.sampled_from([0, 1]))
def test_both_averages_are_those_of_loops(seed: int, label: int) -> None:
    found, truth = images(seed)
    points, total = plain(found, truth, label)
    curve = precision_curve(found, truth, label)
    assert curve.num_boxes == total
    if not total:
        assert math.isnan(average_precision(curve))
        return
    assert curve.recall.tolist() == exactly([recall for recall, _ in points])
    assert curve.precision.tolist() == exactly([precision for _, precision in points])
    area, before = 0.0, 0.0
    for number, (recall, _) in enumerate(points):
        area += (recall - before) * max(precision for _, precision in points[number:])
        before = recall
    assert average_precision(curve) == exactly(area)
    eleven = 0.0
    for step in range(11):
        eleven += max([p for r, p in points if r >= step / 10 - 1e-12], default=0.0) / 11
    assert average_precision(curve, is_11_point=True) == exactly(eleven)


def test_perfect_and_empty_detections_by_both() -> None:
    _, truth = images(1)
    truth = [Truth(t.boxes, t.labels, torch.zeros_like(t.is_difficult)) for t in truth]
    perfect = [Detections(t.boxes, torch.ones(len(t.boxes)), t.labels) for t in truth]
    nothing = [Detections(torch.zeros(0, 4), torch.zeros(0), torch.zeros(0, dtype=torch.long)) for _ in truth]
    assert coco_average_precision(perfect, truth, 3)[:, :2].tolist() == [[1, 1]] * 10
    assert all(math.isnan(value) for value in coco_average_precision(perfect, truth, 3)[:, 2])
    assert coco_average_precision(nothing, truth, 2).tolist() == [[0, 0]] * 10
    for label in (0, 1):
        assert average_precision(precision_curve(perfect, truth, label)) == exactly(1.0)
        assert average_precision(precision_curve(nothing, truth, label)) == 0


@given(st.integers(0, 10_000))
def test_cocos_101_recalls_are_near_the_area(seed: int) -> None:
    """The mean at 101 recalls and the area under one falling staircase differ by one step at most."""
    found, truth = images(seed, 6)
    truth = [Truth(t.boxes, t.labels, torch.zeros_like(t.is_difficult)) for t in truth]
    # Far apart, so that COCO's greedy matching, which may take a second-best box, takes the same as VOC's.
    shift = torch.arange(4)[:, None] * 200
    apart = [Truth(t.boxes + shift[: len(t.boxes)], t.labels, t.is_difficult) for t in truth]
    moved = [
        Detections(
            f.boxes + torch.cat([shift[: len(t.boxes)], shift[: len(t.boxes)], torch.full((1, 1), 5000)]),
            f.scores,
            f.labels,
        )
        for f, t in zip(found, truth, strict=True)
    ]
    coco = coco_average_precision(moved, apart, 2)
    for label in (0, 1):
        area = average_precision(precision_curve(moved, apart, label))
        if not math.isnan(area):
            assert float(coco[0, label]) == pytest.approx(area, abs=1 / 101 + 1e-9)
