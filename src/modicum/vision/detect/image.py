"""Images: read from files as tensors, and letterboxed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from modicum.errors import InputError
from modicum.packages import import_package
from modicum.vision.detect.letterbox import PADDING, Letterbox

SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff", ".gif", ".ppm")


def open_image(path: Path, size: tuple[int, int] | None = None) -> Any:
    """An RGB image of Pillow, turned as its EXIF data says.

    Args:
        path: of the file.
        size: width and height that it is annotated with. If it has them only as it is stored, it is not
            turned, as its boxes are not either.

    Raises:
        InputError: it cannot be read as an image; it is named.
    """
    pillow, ops = import_package("PIL.Image", "detect"), import_package("PIL.ImageOps", "detect")
    try:
        with pillow.open(path) as image:
            turned = ops.exif_transpose(image)
            is_stored = size is not None and image.size == size != turned.size
            return (image if is_stored else turned).convert("RGB")
    except (OSError, ValueError, SyntaxError, pillow.DecompressionBombError) as error:
        told = getattr(error, "strerror", None) or type(error).__name__
        raise InputError(f"{path} cannot be read as an image ({told}): repair it, or leave it out") from error


def letterboxed(image: Any, target: tuple[int, int]) -> tuple[Tensor, Letterbox]:
    """The input [3, H, W] uint8 of an RGB image of Pillow, by bilinear resampling, and how it was made."""
    pillow = import_package("PIL.Image", "detect")
    box = Letterbox.of((image.height, image.width), target)
    scaled = image.resize((box.width, box.height), pillow.Resampling.BILINEAR)
    pixels = torch.from_numpy(np.array(scaled)).permute(2, 0, 1)
    out = torch.full((3, *target), PADDING, dtype=torch.uint8)
    out[:, box.top : box.top + box.height, box.left : box.left + box.width] = pixels
    return out, box


def is_file(path: Path) -> bool:
    """Whether a path is one of a file; no for a name that the system does not take."""
    try:
        return path.is_file()
    except OSError:  # too long, for one
        return False


def images_in(path: Path) -> list[Path]:
    """An image file, or the images of a folder and the folders in it, by name.

    Raises:
        InputError: there is none.
    """
    if path.is_file():
        return [path]
    found = sorted(x for x in path.rglob("*") if x.suffix.lower() in SUFFIXES and x.is_file())
    if not found:
        raise InputError(f"{path} holds no image: give an image, or a folder of {', '.join(SUFFIXES[:3])} …")
    return found
