"""Disparity files: PFM and PNG of 16 bits as data, PNG of 8 bits as Middlebury's older sets have it."""

from __future__ import annotations

import io
import re
import warnings
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from modicum.errors import InputError
from modicum.packages import import_package
from modicum.stereo.images import MAX_PIXELS
from modicum.whole_file import write_whole

KITTI_SCALE = 256
MAX_PNG = (2**16 - 1) / KITTI_SCALE
"""Pixels: the largest disparity of a PNG."""
_GUESSED_SCALE = 4
"""Of 8-bit pictures: Middlebury 2003 at quarter size. 2001 has 8, and no file says which it is."""
_PFM = re.compile(rb"Pf\s+(\d{1,9})\s+(\d{1,9})\s+([-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?)\s")


def write_disparity(path: Path | str, pixels: NDArray[np.float32]) -> None:
    """Write disparities [H, W] in pixels, NaN where there is none; the file appears whole or not at all.

    .pfm: float32, infinite where there is none (Middlebury). .png: 16 bits of 1/256 pixel, 0 where there is
    none, and at least 1 elsewhere (KITTI).

    Raises:
        InputError: the name ends in neither, a disparity is too large for .png, or the file cannot be
            written.
    """
    path = Path(path)
    if path.suffix.lower() == ".pfm":
        rows = np.where(np.isfinite(pixels), pixels, np.inf).astype("<f4")[::-1]
        head = f"Pf\n{pixels.shape[1]} {pixels.shape[0]}\n-1.0\n".encode()
        write_file(path, head + rows.tobytes())
    elif path.suffix.lower() == ".png":
        known = np.where(np.isfinite(pixels), pixels, 0)
        if known.max(initial=0) > MAX_PNG:
            raise InputError(
                f"{path} would have disparities up to {known.max():g} pixels, and a PNG holds up to "
                f"{MAX_PNG:.1f}: give a name in .pfm"
            )
        scaled = np.maximum(np.rint(known * KITTI_SCALE), 1)
        values = np.where(np.isfinite(pixels), scaled, 0).astype(np.uint16)
        write_file(path, png(values))
    else:
        raise InputError(f"{path} is no disparity file that can be written: give a name in .png or .pfm")


def read_disparity(path: Path | str, scale: float | None = None) -> NDArray[np.float32]:
    """Disparities [H, W] in pixels; NaN where there is none.

    Args:
        scale: what a picture's numbers are divided by. None: 256 for 16 bits, and 4 for 8 bits, which is a
            guess and warns. Zeros in a picture are unknown disparities. Not used for .pfm.

    Raises:
        InputError: the file is missing or damaged, the scale is not above 0, or an 8-bit picture named
            disp1 is read without one: Middlebury 2005 and 2006 have it in three scales.
    """
    path = Path(path)
    if scale is not None and not 0 < scale < float("inf"):
        raise InputError(f"scale is {scale}: give a number above 0")
    if path.suffix.lower() == ".pfm":
        return _read_pfm(path)
    pictures = import_package("PIL.Image", "stereo")
    try:
        with pictures.open(path) as picture:
            values = np.asarray(picture)
    except (OSError, ValueError, SyntaxError, pictures.DecompressionBombError) as error:
        reason = getattr(error, "strerror", None) or str(error).partition(" <")[0]
        raise InputError(f"cannot read {path} as disparities ({reason}): give .pfm, .png or .pgm") from error
    if values.ndim != 2 or values.dtype.kind not in "ui":
        raise InputError(
            f"{path} has colours, or one bit a pixel: give disparities as grey numbers, or as .pfm"
        )
    divisor = scale or (_scale_of_8_bits(path) if values.dtype == np.uint8 else KITTI_SCALE)
    found = values.astype(np.float32) / np.float32(divisor)
    found[values == 0] = np.nan
    return found


def _scale_of_8_bits(path: Path) -> int:
    """The scale where none is given. Messages leave the folder out, so that scenes share one."""
    if path.stem == "disp1":
        raise InputError(
            f"{path.name} has 8 bits and no scale, and Middlebury 2005 and 2006 have three: give --scale 1 "
            "(full size), 2 (half size) or 3 (third size)"
        )
    warnings.warn(
        f"the numbers of 8-bit truths are divided by {_GUESSED_SCALE}, a guess: that is the scale of "
        "Middlebury 2003 at quarter size; give --scale for another (8 for Middlebury 2001)",
        stacklevel=3,
    )
    return _GUESSED_SCALE


def png(values: NDArray[Any]) -> bytes:
    """A PNG file of grey numbers [H, W], uint8 or uint16, or of colours uint8 [H, W, 3]."""
    pictures = import_package("PIL.Image", "stereo")
    file = io.BytesIO()
    pictures.fromarray(values).save(file, format="PNG")
    return file.getvalue()


def write_file(path: Path | str, data: bytes) -> None:
    """Write a file, whole or not at all; folders are made.

    Raises:
        InputError: it cannot be written.
    """
    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, data)
    except OSError as error:
        raise InputError(f"cannot write {path} ({error.strerror}): give another place") from error


def _read_pfm(path: Path) -> NDArray[np.float32]:
    try:
        data = path.read_bytes()
    except OSError as error:
        raise InputError(f"cannot read {path} ({error.strerror}): give a disparity file") from error
    head = _PFM.match(data)
    if not head:
        raise InputError(f"{path} is no grey PFM file (it begins with {data[:8]!r}): give another file")
    width, height, scale = int(head[1]), int(head[2]), float(head[3])
    size = len(data) - head.end()
    if not 0 < width * height <= MAX_PIXELS or size != 4 * width * height:
        raise InputError(
            f"{path} says {width} x {height} pixels and has {size:,} bytes of them: get it again"
        )
    values = np.frombuffer(data, "<f4" if scale < 0 else ">f4", offset=head.end())
    found = values.reshape(height, width)[::-1].astype(np.float32)
    found[~np.isfinite(found)] = np.nan
    return found
