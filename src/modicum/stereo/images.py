"""Images: reading them as grey numbers, and checks of a pair."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from modicum.errors import InputError
from modicum.packages import import_package

MAX_PIXELS = 2**27


def read_image(path: Path | str) -> tuple[NDArray[Any], bool]:
    """A picture as grey numbers, uint8 or uint16 [H, W]; and whether it had colours.

    Colours become (299 R + 587 G + 114 B) / 1000 (ITU-R BT.601), as Pillow computes it.

    Raises:
        InputError: it is missing or no picture, or of a kind that is not read.
    """
    pictures = import_package("PIL.Image", "stereo")
    try:
        with pictures.open(path) as picture:
            if picture.width * picture.height > MAX_PIXELS:
                raise InputError(
                    f"{path} has {picture.width} x {picture.height} pixels: give at most {MAX_PIXELS:,}"
                )
            mode = picture.mode
            if mode in ("L", "1"):
                return np.asarray(picture.convert("L")), False
            if mode.startswith("I"):
                return _sixteen_bits(np.asarray(picture), path), False
            if mode in ("RGB", "RGBA", "P", "LA", "YCbCr", "CMYK"):
                return np.asarray(picture.convert("RGB").convert("L")), True
    except InputError:
        raise
    except (OSError, ValueError, SyntaxError, pictures.DecompressionBombError) as error:
        reason = getattr(error, "strerror", None) or str(error).partition(" <")[0]
        raise InputError(
            f"cannot read {path} as a picture ({reason}): give PNG, JPEG, PGM or TIFF"
        ) from error
    raise InputError(f"{path} is a picture of kind {mode}: give grey of 8 or 16 bits, or RGB")


def check_pair(left: NDArray[Any], right: NDArray[Any], disparities: int) -> int:
    """Check that two images can be matched; their bits per pixel.

    Raises:
        InputError: they are not grey, differ in size or depth, or have fewer columns than disparities.
    """
    for name, image in (("left", left), ("right", right)):
        if image.ndim != 2 or image.dtype not in (np.uint8, np.uint16):
            raise InputError(
                f"the {name} image is {image.dtype} {list(image.shape)}: give uint8 or uint16 [H, W]; "
                "colours become grey by modicum.stereo.read_image"
            )
        if not image.size:
            raise InputError(f"the {name} image has no pixels: give a picture")
    if left.shape != right.shape:
        sizes = " and ".join(f"{image.shape[1]} x {image.shape[0]}" for image in (left, right))
        raise InputError(f"the images are {sizes} pixels: give two of the same size, rectified")
    if left.dtype != right.dtype:
        raise InputError(
            f"the images have {8 * left.itemsize} and {8 * right.itemsize} bits a pixel: give two of the "
            "same depth"
        )
    if disparities > left.shape[1]:
        raise InputError(
            f"there are {disparities} disparities and {left.shape[1]} columns: give at most as many "
            "disparities as columns"
        )
    return 8 * left.itemsize


def _sixteen_bits(values: NDArray[Any], path: Path | str) -> NDArray[np.uint16]:
    if values.size and not 0 <= int(values.min()) <= int(values.max()) < 2**16:
        raise InputError(
            f"{path} has values from {values.min()} to {values.max()}: give 8 or 16 bits a pixel"
        )
    return values.astype(np.uint16)
