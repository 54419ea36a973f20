"""Pascal VOC: annotations in XML, one file for each image.

Corners are taken as they are written. VOC counts pixels from 1 and other tools from 0, which cannot be told
from the file; a box is off by a pixel at most.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from xml.etree import ElementTree

from modicum.errors import InputError
from modicum.vision.detect.dataset import DatasetBuilder, DetectionDataset, RawBox
from modicum.vision.detect.image import SUFFIXES, is_file

_ANNOTATIONS, _IMAGES, _SPLITS = "Annotations", "JPEGImages", "ImageSets/Main"


def read_voc(
    folder: Path, split: str | None = None, classes: Sequence[str] | None = None, skip_unknown: bool = False
) -> DetectionDataset:
    """A folder with Annotations, JPEGImages and ImageSets/Main, as the VOC devkit has them.

    Args:
        split: a file of ImageSets/Main without .txt, such as trainval; None: all annotations.
        classes: that are known; None: those that occur.
        skip_unknown: leave out boxes of other classes, instead of an error.

    Raises:
        InputError: a folder or the split is missing, no image can be used, or a class is not known.
    """
    annotations = folder / _ANNOTATIONS
    if not annotations.is_dir():
        raise InputError(
            f"{folder} has no folder {_ANNOTATIONS}: give a folder in VOC's layout, or a COCO .json file"
        )
    builder = DatasetBuilder(classes, skip_unknown)
    for stem in _stems(folder, split):
        path = annotations / f"{stem}.xml"
        if not path.is_file():
            builder.faults.without_annotation.append(stem)
            continue
        try:
            told, size, boxes = _read(path)
        except (ElementTree.ParseError, LookupError, ValueError, OSError) as error:  # of an encoding, too
            builder.faults.unreadable.append(f"{path.name} ({error})")
            continue
        image = _image_of(folder / _IMAGES, stem, told)
        if image is None:
            builder.faults.without_image.append(path.name)
        else:
            builder.add(image, size, boxes)
    return builder.build(folder)


def _stems(folder: Path, split: str | None) -> list[str]:
    if split is None:
        return sorted(path.stem for path in (folder / _ANNOTATIONS).glob("*.xml"))
    path = folder / _SPLITS / f"{split}.txt"
    if not path.is_file():
        known = sorted(one.stem for one in (folder / _SPLITS).glob("*.txt"))
        raise InputError(
            f"{folder} has no split {split!r}: "
            + (f"choose one of {', '.join(known)}" if known else "leave it out")
        )
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path} cannot be read ({error}): give a list of names, one a line") from error
    # Files of one class have a second column, which says whether it occurs.
    return [line.split()[0] for line in lines if line.strip()]


def _image_of(folder: Path, stem: str, told: str) -> Path | None:
    """The file of the annotation's name, or the one that the annotation names."""
    names = [f"{stem}{suffix}" for ending in SUFFIXES for suffix in (ending, ending.upper())]
    for name in (*names, Path(told).name):
        if name and is_file(folder / name):
            return folder / name
    return None


def _read(path: Path) -> tuple[str, tuple[int, int], list[RawBox]]:
    """File name of the image, its height and width, boxes.

    Raises:
        ValueError: an element is missing or no number.
    """
    root = ElementTree.parse(path).getroot()
    height, width = (int(_number(root, f"size/{side}")) for side in ("height", "width"))
    if min(height, width) < 1:
        raise ValueError(f"the image has {width} × {height} pixels")
    boxes = []
    for element in root.findall("object"):
        name = (element.findtext("name") or "").strip()
        if not name:
            raise ValueError("an object has no name")
        x1, y1, x2, y2 = (_number(element, f"bndbox/{corner}") for corner in ("xmin", "ymin", "xmax", "ymax"))
        boxes.append(RawBox(name, (x1, y1, x2, y2), (element.findtext("difficult") or "0").strip() == "1"))
    return root.findtext("filename") or "", (height, width), boxes


def _number(element: ElementTree.Element, path: str) -> float:
    text = element.findtext(path)
    if text is None:
        raise ValueError(f"{path} is missing")
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{path} is {text}")
    return value
