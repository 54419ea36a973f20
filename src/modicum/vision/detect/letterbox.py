"""Letterboxing: an image is scaled to fit a detector's input, without distortion, and padded."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from modicum.errors import InputError

PADDING = 114
"""Grey level of the padding; ours."""


@dataclass(frozen=True)
class Letterbox:
    """How an image of one size becomes an input of another.

    Attributes:
        scale: input pixels for each image pixel.
        left, top: padding in input pixels.
        height, width: of the scaled image, in input pixels.
    """

    scale: float
    left: int
    top: int
    height: int
    width: int

    @classmethod
    def of(cls, image: tuple[int, int], target: tuple[int, int]) -> Letterbox:
        """The largest that fits, in the middle.

        Args:
            image: height and width.
            target: height and width of the input.

        Raises:
            InputError: a side is below 1 pixel.
        """
        if min(*image, *target) < 1:
            raise InputError(f"an image is {image[1]} × {image[0]} pixels: give at least 1 × 1")
        scale = min(target[0] / image[0], target[1] / image[1])
        height, width = (
            max(1, min(round(side * scale), most)) for side, most in zip(image, target, strict=True)
        )
        return cls(scale, (target[1] - width) // 2, (target[0] - height) // 2, height, width)

    def to_input(self, boxes: Tensor) -> Tensor:
        """Boxes [..., 4] of the image, in pixels of the input."""
        return boxes * self.scale + boxes.new_tensor([self.left, self.top, self.left, self.top])

    def to_image(self, boxes: Tensor) -> Tensor:
        """Boxes [..., 4] of the input, in pixels of the image."""
        return (boxes - boxes.new_tensor([self.left, self.top, self.left, self.top])) / self.scale
