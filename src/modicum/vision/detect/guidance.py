"""Guidance: a student detector learns from the outputs and maps of a teacher.

arXiv 1905.01787 names "knowledge distillation as guidance"; only its abstract is public, so the terms are our
design, after Chen et al. 2017 ("Learning Efficient Object Detection Models with Knowledge Distillation"),
which we know by its description only. Over matched and mined anchors (see `multibox_loss`), with n matched:

    classes  T² / n · Σ w · KL(softmax(teacher / T) ‖ softmax(student / T)), w of background and of matched
    boxes    1 / n · Σ over matched: |student - box|², where that is above |teacher - box|² - m; else 0
    hints    mean over maps of the noise-to-signal ratio: over cells of matched anchors, the mean square of
             (1 × 1 adapted student - teacher) in each channel divided by the teacher's variance in it, the
             mean over channels (see `modicum.search.noise`)
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from modicum.errors import InputError, ModelError
from modicum.search.noise import noise_to_signal
from modicum.vision.detect.multibox_loss import Targets, num_matched
from modicum.vision.detect.ssd import SSD, Outputs


@dataclass(frozen=True)
class GuidanceSettings:
    """Weights of what is learned from a teacher, added to the detection loss.

    Attributes:
        classes, boxes, hints: weights of the three terms.
        temperature: T, divides both detectors' logits.
        background, foreground: w of anchors without and with a box.
        margin: m, in squared units of coded boxes.

    Raises:
        InputError: a value is out of range.
    """

    classes: float = 0.5
    boxes: float = 0.5
    hints: float = 0.5
    temperature: float = 2.0
    background: float = 1.0
    foreground: float = 1.5
    margin: float = 0.0

    def __post_init__(self) -> None:
        for name in ("classes", "boxes", "hints", "background", "foreground", "margin"):
            if not 0 <= getattr(self, name) < math.inf:
                raise InputError(f"{name} of guidance is {getattr(self, name)}: give a number of at least 0")
        if not 0 < self.temperature < math.inf:
            raise InputError(f"the temperature of guidance is {self.temperature}: give a number above 0")


def class_distillation(
    student: Tensor, teacher: Tensor, targets: Targets, mined: Tensor, settings: GuidanceSettings
) -> Tensor:
    """The first term, without its weight; logits are [B, A, K + 1]."""
    t = settings.temperature
    log_p = (teacher[mined] / t).log_softmax(-1)
    log_q = (student[mined] / t).log_softmax(-1)
    divergence = (log_p.exp() * (log_p - log_q)).sum(-1)
    weight = torch.where(targets.is_matched[mined], settings.foreground, settings.background)
    return t**2 * (weight * divergence).sum() / num_matched(targets)


def bounded_regression(student: Tensor, teacher: Tensor, targets: Targets, margin: float) -> Tensor:
    """The second term, without its weight; offsets are [B, A, 4]."""
    is_matched = targets.is_matched
    truth = targets.offsets[is_matched]
    error = (student[is_matched] - truth).square().sum(-1)
    bound = (teacher[is_matched] - truth).square().sum(-1)
    return torch.where(error + margin > bound, error, 0.0).sum() / num_matched(targets)


def hint_loss(adapted: Sequence[Tensor], teacher: Sequence[Tensor], is_cell: Sequence[Tensor]) -> Tensor:
    """The third term, without its weight.

    Args:
        adapted, teacher: maps [B, C, H, W] of each level.
        is_cell: [B, H, W] bool of each level: where an anchor is matched. Levels without any count as 0.
    """
    total = adapted[0].new_zeros(())
    for ours, theirs, mask in zip(adapted, teacher, is_cell, strict=True):
        if bool(mask.any()):
            signal = theirs.var((0, 2, 3), correction=0)
            found, expected = (x.movedim(1, -1)[mask] for x in (ours, theirs))
            total = total + noise_to_signal(found, expected, signal)
    return total / len(adapted)


class Guide(nn.Module):
    """A teacher, and adapters from a student's maps to its own.

    Args:
        teacher: stays as it is.
        student: with the same classes, input, anchors and number of maps.
        settings: weights.

    Raises:
        ModelError: the detectors differ in one of these.
    """

    def __init__(self, teacher: SSD, student: SSD, settings: GuidanceSettings) -> None:
        super().__init__()
        for name in ("classes", "height", "width", "num_extras", "anchors"):
            ours, theirs = getattr(student.settings, name), getattr(teacher.settings, name)
            if ours != theirs:
                raise ModelError(
                    f"the teacher's {name} are {theirs} and the student's {ours}: take a teacher with "
                    "the same"
                )
        self._teacher = [teacher]  # in a list, so that its weights are not trained or saved with the adapters
        self.settings = settings
        self.adapters = nn.ModuleList(
            nn.Conv2d(_width(student, level), _width(teacher, level), 1)
            for level in range(student.settings.num_levels)
        )

    @classmethod
    def seeded(cls, teacher: SSD, student: SSD, settings: GuidanceSettings, seed: int) -> Guide:
        """With adapters that depend on the seed alone, not on what was drawn before.

        Raises:
            ModelError: as the class.
        """
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return cls(teacher, student, settings)

    def loss(self, images: Tensor, student: Outputs, targets: Targets, mined: Tensor) -> Tensor:
        """What is added to the detection loss of a batch."""
        teacher = self._teacher[0].eval()
        with torch.no_grad():
            told: Outputs = teacher(images)
        s = self.settings
        total = s.classes * class_distillation(student.logits, told.logits, targets, mined, s)
        total = total + s.boxes * bounded_regression(student.offsets, told.offsets, targets, s.margin)
        if s.hints:
            adapted = [adapter(x) for adapter, x in zip(self.adapters, student.features, strict=True)]
            is_cell = matched_cells(targets, teacher.map_sizes, teacher.settings.anchors.num_per_cell)
            total = total + s.hints * hint_loss(adapted, told.features, is_cell)
        return total


def matched_cells(targets: Targets, maps: Sequence[tuple[int, int]], per_cell: int) -> list[Tensor]:
    """For each map, the cells [B, H, W] that have a matched anchor."""
    found, start = [], 0
    for rows, columns in maps:
        size = rows * columns * per_cell
        here = targets.is_matched[:, start : start + size]
        found.append(here.view(len(here), rows, columns, per_cell).any(-1))
        start += size
    return found


def _width(network: SSD, level: int) -> int:
    return network.settings.channels[network.taps[level]]
