"""COCO: annotations of all images in one JSON file."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from modicum.errors import InputError
from modicum.vision.detect.dataset import DatasetBuilder, DetectionDataset, RawBox
from modicum.vision.detect.image import is_file


def read_coco(
    path: Path,
    images: Path | None = None,
    classes: Sequence[str] | None = None,
    skip_unknown: bool = False,
) -> DetectionDataset:
    """Images and boxes of a COCO file of instances.

    Args:
        images: the folder of the images; None: the file's own folder, or the folder images in it.
        classes, skip_unknown: as for `read_voc`.

    Raises:
        InputError: the file cannot be read, no image can be used, or a class is not known.
    """
    folders = [path.parent, path.parent / "images"] if images is None else [images]
    try:
        told: Any = json.loads(path.read_text(encoding="utf-8"))
        names = {category["id"]: str(category["name"]) for category in told["categories"]}
        boxes: dict[Any, list[RawBox]] = {image["id"]: [] for image in told["images"]}
        orphans = []
        for annotation in told["annotations"]:
            if annotation["image_id"] not in boxes:
                orphans.append(f"an annotation of image {annotation['image_id']}, which is not listed")
                continue
            if classes is None and annotation["category_id"] not in names:
                raise ValueError(
                    f"an annotation has the category {annotation['category_id']}, which is not among the "
                    "categories"
                )
            boxes[annotation["image_id"]].append(_raw_box(annotation, names))
        files = [(i["id"], str(i["file_name"]), int(i["height"]), int(i["width"])) for i in told["images"]]
    except (
        *(OSError, ValueError, KeyError, TypeError, AttributeError),
        *(OverflowError, RecursionError),  # numbers and nesting beyond what Python takes
    ) as error:
        what = f"{error.args[0]!r} is missing" if isinstance(error, KeyError) else str(error)
        raise InputError(f"{path} cannot be read as COCO annotations: {what}") from error
    builder = DatasetBuilder(classes, skip_unknown)
    builder.faults.without_image += orphans
    for number, name, height, width in files:
        found = next((folder / name for folder in folders if is_file(folder / name)), None)
        if found is None or min(height, width) < 1:
            builder.faults.without_image.append(name)
        else:
            builder.add(found, (height, width), boxes[number])
    return builder.build(path)


def _raw_box(annotation: Any, names: dict[Any, str]) -> RawBox:
    x, y, width, height = (float(value) for value in annotation["bbox"])
    if not all(math.isfinite(value) for value in (x, y, width, height)):
        raise ValueError(f"the bbox of an annotation is {annotation['bbox']}")
    name = names.get(annotation["category_id"], f"category {annotation['category_id']}")
    return RawBox(name, (x, y, x + width, y + height), bool(annotation.get("iscrowd", 0)))
