"""Loaded images: a data set's pixels and boxes in memory, as training and evaluation take them."""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from modicum.errors import InputError
from modicum.packages import import_package
from modicum.vision.detect.dataset import AnnotatedImage, DetectionDataset, Faults
from modicum.vision.detect.image import letterboxed, open_image
from modicum.vision.detect.letterbox import Letterbox

_FINER = 1.5
"""Pixels of a training image for each pixel of the input, so that zooming in blurs little."""

Progress = Callable[[str, int, int], object]


@dataclass(frozen=True)
class TrainingImage:
    """An image as it is cut from in training.

    Attributes:
        pixels: [3, h, w] uint8.
        boxes: [G, 4] in its pixels; difficult ones are left out.
        labels: [G].
    """

    pixels: Tensor
    boxes: Tensor
    labels: Tensor


def images_digest(images: Sequence[TrainingImage]) -> str:
    """16 hex digits that stand for all pixels, boxes and labels."""
    found = hashlib.sha256()
    for image in images:
        for tensor in (image.pixels, image.boxes, image.labels):
            found.update(f"{list(tensor.shape)}".encode() + tensor.contiguous().numpy().tobytes())
    return found.hexdigest()[:16]


def load_training_images(
    data: DetectionDataset, target: tuple[int, int], progress: Progress | None = None
) -> list[TrainingImage]:
    """All images of a data set, scaled to 1.5 times the input at most.

    Images that cannot be read are noted in the data set's faults and left out, with a warning.

    Raises:
        InputError: none can be read.
    """
    pillow = import_package("PIL.Image", "detect")
    finer = (round(_FINER * target[0]), round(_FINER * target[1]))
    found = []
    for image, annotated in _opened(data, progress):
        box = Letterbox.of((image.height, image.width), finer)
        if box.scale < 1:
            image = image.resize((box.width, box.height), pillow.Resampling.BILINEAR)
        factors = torch.tensor([image.width / annotated.width, image.height / annotated.height])
        is_learned = ~annotated.is_difficult
        found.append(
            TrainingImage(
                torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous(),
                annotated.boxes[is_learned] * factors.repeat(2),
                annotated.labels[is_learned],
            )
        )
    return found


@dataclass(frozen=True)
class TestImage:
    """An image as it is evaluated: the network's input, and how to get back from it."""

    __test__ = False  # to pytest, a class of this name is a test

    annotated: AnnotatedImage
    pixels: Tensor
    """[3, H, W] uint8, letterboxed."""
    letterbox: Letterbox


def load_test_images(
    data: DetectionDataset, target: tuple[int, int], progress: Progress | None = None
) -> list[TestImage]:
    """All images of a data set, letterboxed; those that cannot be read are left out, as above.

    Raises:
        InputError: none can be read.
    """
    found = []
    for image, annotated in _opened(data, progress):
        size = (image.height, image.width)
        if size != (annotated.height, annotated.width):  # annotated at another resolution
            factors = torch.tensor([size[1] / annotated.width, size[0] / annotated.height]).repeat(2)
            annotated = replace(annotated, height=size[0], width=size[1], boxes=annotated.boxes * factors)
        found.append(TestImage(annotated, *letterboxed(image, target)))
    return found


def _opened(data: DetectionDataset, progress: Progress | None) -> Iterator[tuple[Any, AnnotatedImage]]:
    tell = progress or (lambda *_: None)
    count = 0
    unreadable: list[str] = []
    for number, annotated in enumerate(data.images):
        try:
            image = open_image(annotated.path, (annotated.width, annotated.height))
        except InputError as error:
            unreadable.append(str(error))
            continue
        finally:
            tell("reading images", number + 1, len(data))
        count += 1
        yield image, annotated
    if not count:
        raise InputError(f"none of {len(data):,} images can be read; the first: {unreadable[0]}")
    if unreadable:
        (told,) = Faults(unreadable=unreadable).lines()
        warnings.warn(told, stacklevel=4)
    known = set(data.faults.unreadable)
    data.faults.unreadable.extend(line for line in unreadable if line not in known)
