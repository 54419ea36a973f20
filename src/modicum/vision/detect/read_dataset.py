"""Reading a data set of either kind."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from modicum.errors import InputError
from modicum.vision.detect.coco import read_coco
from modicum.vision.detect.dataset import DetectionDataset
from modicum.vision.detect.voc import read_voc


def read_dataset(
    path: str | Path,
    split: str | None = None,
    classes: Sequence[str] | None = None,
    skip_unknown: bool = False,
) -> DetectionDataset:
    """A folder in VOC's layout, or a COCO .json file.

    Raises:
        InputError: as `read_voc` and `read_coco`; or there is no such path, or a split of a COCO file.
    """
    path = Path(path)
    if path.is_dir():
        return read_voc(path, split, classes, skip_unknown)
    if not path.is_file():
        raise InputError(f"there is no {path}: give a folder in VOC's layout, or a COCO .json file")
    if split is not None:
        raise InputError(f"{path} is a COCO file, which has no splits: leave out --split {split}")
    return read_coco(path, None, classes, skip_unknown)
