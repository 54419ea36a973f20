"""Detector: a network with its record, that finds objects in images."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from modicum.vision.detect.boxes import clip
from modicum.vision.detect.image import letterboxed
from modicum.vision.detect.letterbox import Letterbox
from modicum.vision.detect.nms import Detections, NmsSettings, batched_nms
from modicum.vision.detect.ssd import SSD


@dataclass(frozen=True)
class Detector:
    """A detector.

    Attributes:
        network: in evaluation mode.
        about: how it was made, as JSON takes it.
    """

    network: SSD
    about: Mapping[str, Any] = field(default_factory=dict)

    @property
    def classes(self) -> tuple[str, ...]:
        """Names, by label."""
        return self.network.settings.classes

    @property
    def input_size(self) -> tuple[int, int]:
        """Height and width of the input in pixels."""
        return self.network.settings.height, self.network.settings.width

    def detect(self, image: Any, settings: NmsSettings | None = None) -> Detections:
        """What is in an RGB image of Pillow; boxes are in its pixels and inside it."""
        pixels, letterbox = letterboxed(image, self.input_size)
        (found,) = self.detect_inputs(pixels[None], settings)
        return in_image(found, letterbox, (image.height, image.width))

    @torch.no_grad()
    def detect_inputs(self, inputs: Tensor, settings: NmsSettings | None = None) -> list[Detections]:
        """What is in each of the inputs [B, 3, H, W] in RGB, 0 to 255; boxes are in pixels of the input."""
        boxes, scores = self.network.eval().boxes_and_scores(inputs)
        return batched_nms(boxes, scores, settings or NmsSettings())


def in_image(found: Detections, letterbox: Letterbox, size: tuple[int, int]) -> Detections:
    """Detections of an input, in pixels of its image of a height and width; those outside it are dropped."""
    boxes = clip(letterbox.to_image(found.boxes), *size)
    has_area = (boxes[:, 2:] > boxes[:, :2]).all(1)
    return replace(found, boxes=boxes[has_area], scores=found.scores[has_area], labels=found.labels[has_area])


def detection_rows(found: Detections, classes: Sequence[str]) -> list[dict[str, Any]]:
    """As JSON takes it."""
    return [
        {"class": classes[label], "score": round(score, 4), "box": [round(value, 1) for value in box]}
        for box, score, label in zip(
            found.boxes.tolist(), found.scores.tolist(), found.labels.tolist(), strict=True
        )
    ]
