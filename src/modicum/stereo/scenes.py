"""Scenes: pairs of images with true disparities, found by the names that Middlebury and KITTI give files."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from modicum.errors import InputError
from modicum.stereo.disparity_file import read_disparity
from modicum.stereo.evaluation import visible
from modicum.stereo.images import read_image

_PICTURES = (".png", ".ppm", ".pgm", ".jpg")
_PAIRS = (
    ("im0", "im1", "disp0GT"),
    ("im0", "im1", "disp0"),
    ("im2", "im6", "disp2"),
    ("view1", "view5", "disp1"),
)
"""Left, right and truth: Middlebury 2014 and 2021 (two names of the truth), 2001 and 2003, 2005 and 2006."""
_KITTI = (("image_2", "image_3", "disp_occ_0", "disp_noc_0"), ("image_0", "image_1", "disp_occ", "disp_noc"))
"""Folders of KITTI 2015 and 2012: left, right, truth of all pixels, truth of visible ones."""


@dataclass(frozen=True)
class Scene:
    """Files of a scene.

    Attributes:
        name: for tables.
        left: image.
        right: image.
        truth: disparities of the left image.
        visible_truth: disparities of its visible pixels, or None.
        mask: picture that is 255 at visible pixels, or None.
        is_kitti: of KITTI's layout.
    """

    name: str
    left: Path
    right: Path
    truth: Path
    visible_truth: Path | None = None
    mask: Path | None = None
    is_kitti: bool = False

    def read_truth(self, scale: float | None) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
        """True disparities [H, W] in pixels, NaN where unknown; and which pixels are visible.

        Without a file that says which are visible, this follows from the truth: see
        `modicum.stereo.evaluation.visible`.

        Args:
            scale: of pictures, as for `modicum.stereo.disparity_file.read_disparity`.

        Raises:
            InputError: a file is missing or damaged, or of another size; or it needs a scale.
        """
        truth = read_disparity(self.truth, scale)
        if self.visible_truth is not None:
            shown = np.isfinite(read_disparity(self.visible_truth, scale))
        elif self.mask is not None:
            shown = (read_image(self.mask)[0] == 255) & np.isfinite(truth)
        else:
            shown = visible(truth)
        if shown.shape != truth.shape:
            raise InputError(
                f"{self.truth} and what says which pixels are visible differ in size: get them again"
            )
        return truth, shown

    def disparities(self, truth: NDArray[np.float32]) -> int:
        """How many to try: ndisp of calib.txt, else a multiple of 16 above the largest true one.

        Raises:
            InputError: no pixel has a true disparity.
        """
        calibration = self.left.parent / "calib.txt"
        if calibration.is_file():
            for line in calibration.read_text(encoding="utf-8", errors="replace").splitlines():
                if line.startswith("ndisp=") and line[6:].strip().isdecimal():
                    return int(line[6:])
        if not np.isfinite(truth).any():
            raise InputError(f"no pixel of {self.truth} has a true disparity: give one with finite values")
        return (int(np.nanmax(truth)) // 16 + 1) * 16


def find_scenes(folder: Path) -> list[Scene]:
    """The scenes of a folder: it is one, or holds folders that are, or is a KITTI folder.

    Inner folders that are none are named in a warning.

    Raises:
        InputError: there is none.
    """
    if not folder.is_dir():
        raise InputError(f"{folder} is no folder: give one with pairs of images and true disparities")
    found = list(_kitti(folder)) or list(_middlebury(folder))
    others: list[str] = []
    if not found:
        for inner in sorted(path for path in folder.iterdir() if path.is_dir()):
            scenes = list(_middlebury(inner))
            found += scenes
            if not scenes and not inner.name.startswith("."):
                others.append(inner.name)
    if not found:
        raise InputError(
            f"{folder} has no scene: give a folder with im0, im1 and disp0.pfm (or im2, im6, disp2; view1, "
            "view5, disp1), or folders of them, or KITTI's image_2, image_3 and disp_occ_0"
        )
    if others:
        warnings.warn(
            f"{len(others)} folders of {folder} have no scene and are left out: {', '.join(others[:5])}"
            f"{' and others' if len(others) > 5 else ''}",
            stacklevel=2,
        )
    return found


def _middlebury(folder: Path) -> Iterator[Scene]:
    for names in _PAIRS:
        left, right = (_file(folder, name, _PICTURES) for name in names[:2])
        truth = _file(folder, names[2], (".pfm", *_PICTURES))
        if left and right and truth:
            yield Scene(folder.name, left, right, truth, mask=_file(folder, "mask0nocc", _PICTURES))
            return


def _kitti(folder: Path) -> Iterator[Scene]:
    for left, right, truth, shown in _KITTI:
        for path in sorted((folder / truth).glob("*_10.png")):
            pair = folder / left / path.name, folder / right / path.name
            if all(image.is_file() for image in pair):
                noc = folder / shown / path.name
                yield Scene(path.stem, *pair, path, noc if noc.is_file() else None, is_kitti=True)


def _file(folder: Path, stem: str, suffixes: tuple[str, ...]) -> Path | None:
    return next((path for suffix in suffixes if (path := folder / f"{stem}{suffix}").is_file()), None)
