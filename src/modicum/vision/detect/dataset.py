"""Dataset: images with boxes of named classes, and what was wrong with them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from modicum.errors import InputError
from modicum.vision.detect.boxes import clip

_SHOWN = 5


@dataclass(frozen=True)
class AnnotatedImage:
    """An image's file and its boxes.

    Attributes:
        path: of the image.
        height, width: in pixels, as annotated.
        boxes: [G, 4] corners in pixels.
        labels: [G] int64, numbers of classes from 0.
        is_difficult: [G] bool: not counted in evaluation, and no object to learn ("difficult" in VOC, crowds
            in COCO). Training takes their place for background.
    """

    path: Path
    height: int
    width: int
    boxes: Tensor
    labels: Tensor
    is_difficult: Tensor


@dataclass
class Faults:
    """What was wrong with a data set; the rest of it is used."""

    num_clipped: int = 0
    """Boxes that reached over the image, and were cut."""
    num_dropped: int = 0
    """Boxes without area in the image."""
    unknown: dict[str, int] = field(default_factory=dict)
    """Boxes of each class that is not known, which were skipped."""
    without_image: list[str] = field(default_factory=list)
    """Annotations whose image is missing."""
    without_annotation: list[str] = field(default_factory=list)
    """Images of a split that have no annotation."""
    unreadable: list[str] = field(default_factory=list)
    """Files that cannot be read, and why."""

    def lines(self) -> list[str]:
        """One for each kind of fault, for people."""
        found = []
        if self.num_clipped:
            found.append(f"{self.num_clipped:,} boxes reach over their image and were cut at its border")
        if self.num_dropped:
            found.append(f"{self.num_dropped:,} boxes have no area in their image and were dropped")
        for name, count in sorted(self.unknown.items()):
            found.append(f"{count:,} boxes of the unknown class {name!r} were skipped")
        for names, what in (
            (self.without_image, "have no image and were left out"),
            (self.without_annotation, "have no annotation and were left out"),
            (self.unreadable, "were left out"),
        ):
            if names:
                more = f" and {len(names) - _SHOWN:,} more" if len(names) > _SHOWN else ""
                found.append(f"{len(names):,} {what}: {'; '.join(names[:_SHOWN])}{more}")
        return found


@dataclass(frozen=True)
class DetectionDataset:
    """Images with boxes.

    Attributes:
        images: at least one.
        classes: names, by label.
        faults: what was left out.
    """

    images: list[AnnotatedImage]
    classes: tuple[str, ...]
    faults: Faults = field(default_factory=Faults)

    def __len__(self) -> int:
        return len(self.images)

    @property
    def num_boxes(self) -> int:
        """Of all images."""
        return sum(len(image.boxes) for image in self.images)


@dataclass(frozen=True)
class RawBox:
    """A box as an annotation has it."""

    name: str
    corners: tuple[float, float, float, float]
    is_difficult: bool = False


@dataclass
class DatasetBuilder:
    """Collects images, with boxes checked.

    Attributes:
        classes: that are known; None: those that occur, in alphabetical order.
        skip_unknown: leave out boxes of other classes, instead of an error.
    """

    classes: Sequence[str] | None = None
    skip_unknown: bool = False
    faults: Faults = field(default_factory=Faults)
    _found: list[tuple[Path, int, int, list[RawBox]]] = field(default_factory=list)

    def add(self, path: Path, size: tuple[int, int], boxes: list[RawBox]) -> None:
        """An image of a height and width with its boxes."""
        self._found.append((path, *size, boxes))

    def build(self, source: Path) -> DetectionDataset:
        """The data set.

        Raises:
            InputError: there is no image or no box, or a class is not known.
        """
        if not self._found:
            told = "; ".join(self.faults.lines()) or "nothing is annotated"
            raise InputError(f"{source} has no image that can be used: {told}")
        names = {box.name for *_, boxes in self._found for box in boxes}
        classes = tuple(sorted(names) if self.classes is None else self.classes)
        if not classes:
            raise InputError(f"{source} has {len(self._found):,} images and no box: annotate some")
        known = {name: number for number, name in enumerate(classes)}
        images = [self._image(known, *one) for one in self._found]
        return DetectionDataset(images, classes, self.faults)

    def _image(
        self, known: dict[str, int], path: Path, height: int, width: int, boxes: list[RawBox]
    ) -> AnnotatedImage:
        kept: list[RawBox] = []
        for box in boxes:
            if box.name in known:
                kept.append(box)
            elif self.skip_unknown:
                self.faults.unknown[box.name] = self.faults.unknown.get(box.name, 0) + 1
            else:
                raise InputError(
                    f"{path.name} has a box of the class {box.name!r}, and the known classes are "
                    f"{', '.join(known)}: correct the annotation, or skip such boxes (--skip-unknown)"
                )
        raw = torch.tensor([box.corners for box in kept], dtype=torch.float32).reshape(-1, 4)
        cut = clip(raw, height, width)
        has_area = (cut[:, 2:] > cut[:, :2]).all(1)
        is_changed = (cut != raw).any(1)
        self.faults.num_dropped += int((~has_area).sum())
        self.faults.num_clipped += int((has_area & is_changed).sum())
        labels = torch.tensor([known[box.name] for box in kept], dtype=torch.long)
        difficult = torch.tensor([box.is_difficult for box in kept], dtype=torch.bool)
        return AnnotatedImage(path, height, width, cut[has_area], labels[has_area], difficult[has_area])
