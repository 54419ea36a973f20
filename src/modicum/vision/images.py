"""Images with classes, from a folder or a zip file that has a folder for each class."""

from __future__ import annotations

import hashlib
import io
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path, PurePosixPath

import torch
from torch import Tensor

from modicum.errors import InputError
from modicum.packages import import_package

SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".gif", ".webp", ".ppm", ".pgm", ".tif", ".tiff")
MAX_NBYTES = 4 * 2**30
"""Pixels are held in memory, a byte each."""

Progress = Callable[[str, int, int], object]


@dataclass(frozen=True)
class ImageSet:
    """Images of one size in memory.

    `images[rows]` gives inputs [b, 3, S, S] float32, normalised by mean and deviation of each colour, in
    `torch.channels_last` order, in which convolutions of few channels are faster on a CPU.

    Attributes:
        pixels: [n, 3, S, S] uint8.
        labels: [n] int64.
        classes: names, by label.
        mean: [3], of pixels from 0 to 1.
        deviation: [3].
    """

    pixels: Tensor
    labels: Tensor
    classes: tuple[str, ...]
    mean: Tensor
    deviation: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, rows: Tensor) -> Tensor:
        return self.normalized(self.pixels[rows])

    def normalized(self, pixels: Tensor) -> Tensor:
        """Inputs of a network: [b, 3, S, S] float32 of uint8 pixels, channels last in memory."""
        scaled = pixels.contiguous(memory_format=torch.channels_last).float() / 255
        return (scaled - self.mean.view(3, 1, 1)) / self.deviation.view(3, 1, 1)

    @property
    def size(self) -> int:
        """Side of an image."""
        return int(self.pixels.shape[-1])

    @cached_property
    def digest(self) -> str:
        """16 digits of a digest of pixels, labels and classes."""
        found = hashlib.sha256(repr((self.classes, self.mean.tolist(), self.deviation.tolist())).encode())
        found.update(self.pixels.contiguous().numpy().tobytes() + self.labels.numpy().tobytes())
        return found.hexdigest()[:16]

    def subset(self, rows: Tensor) -> ImageSet:
        """These images."""
        return replace(self, pixels=self.pixels[rows], labels=self.labels[rows])

    def split(self, share: float, seed: int = 0) -> tuple[ImageSet, ImageSet]:
        """Two sets: the second has about this share of each class.

        Raises:
            InputError: a class would have no image in one of both.
        """
        generator = torch.Generator().manual_seed(seed)
        held = torch.zeros(len(self), dtype=torch.bool)
        for label, name in enumerate(self.classes):
            rows = (self.labels == label).nonzero().flatten()
            count = max(1, round(share * len(rows)))
            if not 0 < share < 1 or len(rows) - count < 1:
                raise InputError(
                    f"the class {name!r} has {len(rows)} images, of which {share:.0%} are held out: give a "
                    "share between 0 and 1, and at least 2 images of each class"
                )
            held[rows[torch.randperm(len(rows), generator=generator)[:count]]] = True
        return self.subset(~held), self.subset(held)

    def with_own_statistics(self) -> ImageSet:
        """The same images, normalised by their own mean and deviation."""
        mean, deviation = _statistics(self.pixels)
        return replace(self, mean=mean, deviation=deviation)

    def with_statistics_of(self, other: ImageSet) -> ImageSet:
        """The same images, normalised as those of another set.

        Raises:
            InputError: the classes are others.
        """
        if self.classes != other.classes:
            raise InputError(
                f"the classes are {', '.join(self.classes)}, and those learnt from "
                f"{', '.join(other.classes)}: give both sets the same class folders"
            )
        return replace(self, mean=other.mean, deviation=other.deviation)


@dataclass(frozen=True)
class LoadedImages:
    """What was read.

    Attributes:
        images: those that can be read.
        unreadable: names of the others, with the reason.
    """

    images: ImageSet
    unreadable: dict[str, str]


def load_images(
    path: str | Path, size: int = 32, *, most: int | None = None, progress: Progress | None = None
) -> LoadedImages:
    """Read the images of a folder or zip file.

    Each folder is a class, and images anywhere below it are of that class. Images are turned as their EXIF
    data says, and converted to RGB; their middle square is scaled to `size`. An image that cannot be read is
    left out and named.

    Args:
        path: of the folder or zip file.
        size: side of the images in pixels.
        most: images of a class at most; of more the first by name. None for all.
        progress: called with what is done, images done, and in all.

    Raises:
        InputError: it is missing, has fewer than 2 classes with readable images, or takes too much memory;
            or pillow is missing.
    """
    path = Path(path)
    if size < 1 or (most is not None and most < 1):
        raise InputError(f"the size is {size}, and at most {most} images of a class: give 1 or more")
    import_package("PIL.Image", "vision")  # before any file is blamed
    with _opened(path) as source:
        named = _by_class(source.names, most)
        classes = tuple(sorted(named))
        _check_classes(path, {name: len(own) for name, own in named.items()})
        total = sum(map(len, named.values()))
        if total * 3 * size * size > MAX_NBYTES:
            raise InputError(
                f"{total:,} images of {size}×{size} take {total * 3 * size * size / 2**30:.1f} GiB, more "
                f"than {MAX_NBYTES / 2**30:.0f} GiB: give a smaller size, or fewer images of a class"
            )
        pixels, labels, unreadable, done = [], [], {}, 0
        for label, name in enumerate(classes):
            for one in named[name]:
                try:
                    pixels.append(_decoded(source.read(one), size))
                    labels.append(label)
                except Exception as error:  # pillow raises many kinds for damaged files
                    unreadable[one] = _reason(error)
                done += 1
                if progress is not None and (done % 50 == 0 or done == total):
                    progress("reading images", done, total)
    counts = {name: labels.count(label) for label, name in enumerate(classes)}
    empty = [name for name, count in counts.items() if not count]
    if empty:
        first = next(iter(unreadable.items()))
        raise InputError(
            f"{path}: no image of the class {empty[0]!r} can be read ({first[0]}: {first[1]}); repair "
            "them, or remove the class"
        )
    stacked = torch.stack(pixels)
    mean, deviation = _statistics(stacked)
    return LoadedImages(ImageSet(stacked, torch.tensor(labels), classes, mean, deviation), unreadable)


def read_image(path: str | Path, size: int) -> Tensor:
    """One image [1, 3, S, S] uint8, as `load_images` reads it.

    Raises:
        InputError: it cannot be read, or pillow is missing.
    """
    import_package("PIL.Image", "vision")
    try:
        return _decoded(Path(path).read_bytes(), size)[None]
    except Exception as error:  # pillow raises many kinds for damaged files
        raise InputError(f"{path} cannot be read as an image ({_reason(error)})") from error


def _reason(error: Exception) -> str:
    """Why an image cannot be read, for people; pillow tells of a buffer where it knows no format."""
    name = type(error).__name__
    return "no format that pillow knows" if name == "UnidentifiedImageError" else f"{name}: {error}"


def _check_classes(path: Path, counts: dict[str, int]) -> None:
    if len(counts) < 2:
        told = f"the class {next(iter(counts))!r} only" if counts else "no class folder with images"
        raise InputError(
            f"{path} has {told}: give a folder or zip file with a folder of images for each of at least 2 "
            f"classes ({', '.join(SUFFIXES)})"
        )


@dataclass(frozen=True)
class _Source:
    """Files by name, relative and with slashes."""

    names: list[str]
    read: Callable[[str], bytes]
    close: Callable[[], object]

    def __enter__(self) -> _Source:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _opened(path: Path) -> _Source:
    if path.is_dir():
        names = [p.relative_to(path).as_posix() for p in path.rglob("*") if p.is_file()]
        return _Source(sorted(names), lambda name: (path / name).read_bytes(), lambda: None)
    if not path.exists():
        raise InputError(f"there is no {path}: give a folder or a zip file of class folders")
    try:
        archive = zipfile.ZipFile(path)
    except (OSError, zipfile.BadZipFile) as error:
        raise InputError(f"{path} is neither a folder nor a zip file ({error})") from error
    names = [info.filename for info in archive.infolist() if not info.is_dir()]
    return _Source(sorted(names), archive.read, archive.close)


def _by_class(names: list[str], most: int | None) -> dict[str, list[str]]:
    """Image files by the folder at the top, below folders that all have in common."""
    split = {
        name: PurePosixPath(name).parts
        for name in names
        if name.lower().endswith(SUFFIXES)
        and not any(part.startswith((".", "__MACOSX")) for part in PurePosixPath(name).parts)
    }
    while split and all(len(p) > 2 for p in split.values()) and len({p[0] for p in split.values()}) == 1:
        split = {name: parts[1:] for name, parts in split.items()}
    found: dict[str, list[str]] = {}
    for name, parts in split.items():
        if len(parts) > 1:
            found.setdefault(parts[0], []).append(name)
    return {name: own[:most] for name, own in found.items()}


def _decoded(data: bytes, size: int) -> Tensor:
    """[3, S, S] uint8."""
    pillow, ops = import_package("PIL.Image", "vision"), import_package("PIL.ImageOps", "vision")
    with pillow.open(io.BytesIO(data)) as opened:
        image = ops.exif_transpose(opened).convert("RGB")
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    if image.size != (size, size):
        image = image.resize((size, size), resample=2, box=(left, top, left + side, top + side))  # bilinear
    flat = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8)
    return flat.view(size, size, 3).permute(2, 0, 1).contiguous()


def _statistics(pixels: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and deviation [3] of each colour, of pixels from 0 to 1."""
    total, square, count = torch.zeros(3, dtype=torch.float64), torch.zeros(3, dtype=torch.float64), 0
    for part in _parts(pixels):
        scaled = part.double() / 255
        total += scaled.sum((0, 2, 3))
        square += scaled.square().sum((0, 2, 3))
        count += part.numel() // 3
    mean = total / count
    deviation = (square / count - mean.square()).clamp_min(1e-6).sqrt()
    return mean.float(), deviation.float()


def _parts(pixels: Tensor, size: int = 256) -> Iterator[Tensor]:
    for start in range(0, len(pixels), size):
        yield pixels[start : start + size]
