"""Augmentation: images and boxes are flipped, zoomed, moved and recoloured at random."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from modicum.errors import InputError
from modicum.vision.detect.letterbox import PADDING
from modicum.vision.detect.loaded_images import TrainingImage

_LEAST_SIDE = 2.0
"""Pixels; what is left of a box that is cut further is no longer learned."""


@dataclass(frozen=True)
class AugmentSettings:
    """What is random; ours, in place of SSD's random crops and expansion (arXiv 1512.02325, section 2.2).

    Attributes:
        flip_x, flip_y: whether half of the images are mirrored from left to right, or from top to bottom.
        zoom: lowest and highest scale, where 1 fits the image into the input.
        stretch: width and height are scaled by up to this factor more or less, against each other.
        colour: brightness, contrast and each channel are multiplied by 1 ± at most this.

    Raises:
        InputError: a value is out of range.
    """

    flip_x: bool = True
    flip_y: bool = True
    zoom: tuple[float, float] = (0.8, 1.4)
    stretch: float = 1.1
    colour: float = 0.2

    def __post_init__(self) -> None:
        if not 0.1 <= self.zoom[0] <= self.zoom[1] <= 10:
            raise InputError(f"zoom is {self.zoom}: give a lowest and a highest scale of 0.1 to 10")
        if not 1 <= self.stretch <= 2:
            raise InputError(f"stretch is {self.stretch}: give a factor of 1 to 2")
        if not 0 <= self.colour < 1:
            raise InputError(f"colour is {self.colour}: give a number from 0 to below 1")


NONE = AugmentSettings(False, False, (1.0, 1.0), 1.0, 0.0)
"""Only fits images into the input."""


def augmented(
    image: TrainingImage, target: tuple[int, int], settings: AugmentSettings, generator: torch.Generator
) -> tuple[Tensor, Tensor, Tensor]:
    """An input [3, H, W] float, 0 to 255, its boxes [G, 4] and labels [G].

    A box stays if its centre is inside the input; it is cut at the border.
    """
    height, width = image.pixels.shape[1:]
    fit = min(target[0] / height, target[1] / width)
    zoom = math.exp(_uniform(math.log(settings.zoom[0]), math.log(settings.zoom[1]), generator))
    stretch = math.exp(_uniform(-0.5, 0.5, generator) * math.log(settings.stretch))
    rows = max(1, round(height * fit * zoom / stretch))
    columns = max(1, round(width * fit * zoom * stretch))
    top = round(_uniform(min(0, target[0] - rows), max(0, target[0] - rows), generator))
    left = round(_uniform(min(0, target[1] - columns), max(0, target[1] - columns), generator))
    pixels = functional.interpolate(
        image.pixels[None].float(), (rows, columns), mode="bilinear", antialias=True, align_corners=False
    )[0]
    out = torch.full((3, *target), float(PADDING))
    into = out[:, max(0, top) : top + rows, max(0, left) : left + columns]
    into.copy_(pixels[:, max(0, -top) :, max(0, -left) :][:, : into.shape[1], : into.shape[2]])
    scale = torch.tensor([columns / width, rows / height]).repeat(2)
    boxes = image.boxes * scale + torch.tensor([left, top, left, top])
    boxes, labels = _inside(boxes, image.labels, target)
    if settings.flip_x and _uniform(0, 1, generator) < 0.5:
        out, boxes = out.flip(2), flipped(boxes, target[1], 0)
    if settings.flip_y and _uniform(0, 1, generator) < 0.5:
        out, boxes = out.flip(1), flipped(boxes, target[0], 1)
    return _recoloured(out, settings.colour, generator), boxes, labels


def flipped(boxes: Tensor, size: int, axis: int) -> Tensor:
    """Boxes [G, 4] mirrored in an input of that size; axis 0 for x, 1 for y."""
    out = boxes.clone()
    out[:, axis] = size - boxes[:, axis + 2]
    out[:, axis + 2] = size - boxes[:, axis]
    return out


def _inside(boxes: Tensor, labels: Tensor, target: tuple[int, int]) -> tuple[Tensor, Tensor]:
    limits = torch.tensor([target[1], target[0]])
    centres = (boxes[:, :2] + boxes[:, 2:]) / 2
    cut = torch.minimum(boxes.clamp_min(0), limits.repeat(2))
    stays = ((centres >= 0) & (centres < limits)).all(1) & (cut[:, 2:] - cut[:, :2] >= _LEAST_SIDE).all(1)
    return cut[stays], labels[stays]


def _recoloured(pixels: Tensor, strength: float, generator: torch.Generator) -> Tensor:
    if not strength:
        return pixels
    contrast, brightness = (1 + strength * _uniform(-1, 1, generator) for _ in range(2))
    channels = 1 + strength / 2 * (2 * torch.rand(3, 1, 1, generator=generator) - 1)
    mean = pixels.mean()
    return (((pixels - mean) * contrast + mean) * brightness * channels).clamp(0, 255)


def _uniform(low: float, high: float, generator: torch.Generator) -> float:
    return low + (high - low) * float(torch.rand((), generator=generator))
