"""The three terms of guidance beside plain loops, and their gradients."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from modicum.errors import InputError, ModelError
from modicum.vision.detect.guidance import (
    GuidanceSettings,
    Guide,
    bounded_regression,
    class_distillation,
    hint_loss,
    matched_cells,
)
from modicum.vision.detect.multibox_loss import Targets, mined_anchors
from modicum.vision.detect.ssd import SSD
from modicum.vision.detect.ssd_settings import SSDSettings
from tests.bounds import FUNCTION, exactly, gamma
from tests.vision.detect import reference
from tests.vision.detect.scenes import SIZE, random_inputs, tiny_network
from tests.vision.detect.test_multibox_loss import batch

seeds = st.integers(0, 10_000)


def noise(like: Tensor, seed: int) -> Tensor:
    return torch.randn(like.shape, generator=torch.Generator().manual_seed(seed), dtype=like.dtype)


@given(seeds, st.sampled_from([0.5, 1.0, 2.0]))
def test_class_distillation_is_that_of_loops(seed: int, temperature: float) -> None:
    student, _, targets = batch(seed)
    teacher = student + noise(student, seed + 1)
    mined = mined_anchors(student, targets)
    settings = GuidanceSettings(temperature=temperature, background=0.75, foreground=1.5)
    total, count = 0.0, 0
    for image in range(2):
        for anchor in range(student.shape[1]):
            is_matched = int(targets.labels[image, anchor]) > 0
            count += is_matched
            if not mined[image, anchor]:
                continue
            p = reference.log_softmax([float(x) / temperature for x in teacher[image, anchor]])
            q = reference.log_softmax([float(x) / temperature for x in student[image, anchor]])
            divergence = sum(math.exp(a) * (a - b) for a, b in zip(p, q, strict=True))
            total += (1.5 if is_matched else 0.75) * divergence
    expected = temperature**2 * total / max(1, count)
    found = float(class_distillation(student, teacher, targets, mined, settings))
    assert found == pytest.approx(expected, abs=gamma(100 * FUNCTION, torch.float64) * (1 + 40))
    assert float(class_distillation(teacher, teacher, targets, mined, settings)) == 0


@given(seeds, st.sampled_from([0.0, 0.5, 3.0]))
def test_bounded_regression_is_that_of_loops(seed: int, margin: float) -> None:
    _, student, targets = batch(seed)
    teacher = targets.offsets + noise(student, seed + 2)
    total, count = 0.0, 0
    for image, anchor in (targets.labels > 0).nonzero().tolist():
        count += 1
        truth = targets.offsets[image, anchor].tolist()
        ours = sum((a - b) ** 2 for a, b in zip(student[image, anchor].tolist(), truth, strict=True))
        theirs = sum((a - b) ** 2 for a, b in zip(teacher[image, anchor].tolist(), truth, strict=True))
        total += ours if ours + margin > theirs else 0.0
    found = float(bounded_regression(student, teacher, targets, margin))
    assert found == exactly(total / max(1, count), 400)
    assert float(bounded_regression(targets.offsets, teacher, targets, 0.0)) == 0


@given(seeds)
def test_hints_are_those_of_loops(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    teacher = [torch.randn(2, 3, size, size, generator=generator, dtype=torch.float64) for size in (3, 2)]
    ours = [x + noise(x, seed + 1) for x in teacher]
    cells = [torch.rand(2, size, size, generator=generator) < 0.4 for size in (3, 2)]
    total = 0.0
    for a, b, mask in zip(ours, teacher, cells, strict=True):
        places = mask.nonzero().tolist()
        if not places:
            continue
        ratios = []
        for channel in range(3):
            values = b[:, channel].flatten().tolist()
            mean = sum(values) / len(values)
            variance = sum((v - mean) ** 2 for v in values) / len(values)
            errors = [float(a[n, channel, y, x] - b[n, channel, y, x]) ** 2 for n, y, x in places]
            ratios.append(sum(errors) / len(errors) / variance)
        total += sum(ratios) / 3
    assert float(hint_loss(ours, teacher, cells)) == pytest.approx(
        total / 2, rel=gamma(400, torch.float64) * 50
    )
    assert float(hint_loss(teacher, teacher, cells)) == 0


def test_cells_are_those_of_matched_anchors() -> None:
    network = tiny_network()
    labels = torch.zeros(1, len(network.anchors), dtype=torch.long)
    first = network.map_sizes[0][0] * network.map_sizes[0][1] * 4
    labels[0, 5 * 4 + 3] = 1  # the sixth cell of the first map
    labels[0, first + 1] = 2  # the first of the second
    cells = matched_cells(Targets(labels, torch.zeros(1, len(labels[0]), 4)), network.map_sizes, 4)
    assert cells[0].nonzero().tolist() == [[0, 0, 5]]
    assert cells[1].nonzero().tolist() == [[0, 0, 0]]
    assert not any(bool(x.any()) for x in cells[2:])


def test_the_guides_gradient_is_a_finite_difference_and_leaves_the_teacher() -> None:
    teacher, student = tiny_network(seed=1).double(), tiny_network("mobilenet", seed=2).double()
    guide = Guide(teacher, student, GuidanceSettings()).double()
    images = random_inputs(2).double()
    labels = torch.zeros(2, len(student.anchors), dtype=torch.long)
    labels[:, 40:44] = 1
    targets = Targets(labels, torch.zeros(2, len(student.anchors), 4, dtype=torch.float64))
    weight = student.heads[0].inner.conv.weight  # type: ignore[union-attr]
    mined = mined_anchors(student(images).logits, targets)
    guide.loss(images, student(images), targets, mined).backward()
    assert all(parameter.grad is None for parameter in teacher.parameters())
    assert all(parameter.grad is not None for parameter in guide.adapters[0].parameters())
    assert not any("teacher" in name for name in guide.state_dict())
    direction = noise(weight, 5)
    slope = float((weight.grad * direction).sum())
    step, sides = 1e-6, []
    for sign in (1, -1):
        with torch.no_grad():
            weight += sign * step * direction
            sides.append(float(guide.loss(images, student(images), targets, mined)))
            weight -= sign * step * direction
    difference = (sides[0] - sides[1]) / (2 * step)
    # Rounding of a loss of that size, and a second-order rest that relu's kinks may add.
    assert slope == pytest.approx(difference, rel=1e-3, abs=1e-13 * abs(sides[0]) / step * 100)


def test_a_teacher_of_another_shape_is_refused() -> None:
    student = tiny_network()
    for other in (
        SSD(SSDSettings.of(("a", "b"), "resnet14", 0.125, SIZE)),
        SSD(SSDSettings.of(student.settings.classes, "resnet14", 0.125, (96, 96))),
    ):
        with pytest.raises(ModelError, match="take a teacher with the same"):
            Guide(other, student, GuidanceSettings())
    with pytest.raises(InputError, match="temperature of guidance is 0"):
        GuidanceSettings(temperature=0)
    with pytest.raises(InputError, match="hints of guidance is -1"):
        GuidanceSettings(hints=-1)


def test_adapters_depend_on_the_seed_alone() -> None:
    def adapters(seed: int) -> list[Tensor]:
        torch.rand(3)  # what is drawn elsewhere changes nothing
        guide = Guide.seeded(tiny_network(seed=1), tiny_network(seed=2), GuidanceSettings(), seed)
        return list(guide.adapters.state_dict().values())

    state = torch.get_rng_state()
    first = adapters(0)
    torch.rand(1)
    assert all(map(torch.equal, first, adapters(0)))
    assert not all(map(torch.equal, first, adapters(1)))
    torch.set_rng_state(state)
    torch.rand(3)
    after = torch.get_rng_state()
    torch.set_rng_state(state)
    adapters(0)
    assert torch.equal(torch.get_rng_state(), after)
