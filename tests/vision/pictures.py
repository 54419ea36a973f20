"""Small pictures that the tests make themselves: bright squares of a colour for each class."""

from __future__ import annotations

import io
import zipfile
from pathlib import Path

import torch
from torch import Tensor

from modicum.vision.images import ImageSet

CLASSES = ("blue", "green", "red")


def pixels(count: int, size: int = 16, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Images [n, 3, S, S] uint8 and labels [n], of the classes in turn."""
    generator = torch.Generator().manual_seed(seed)
    images = torch.randint(0, 120, (count, 3, size, size), generator=generator)
    labels = torch.arange(count) % 3
    for number in range(count):
        row, column = torch.randint(0, size // 2, (2,), generator=generator).tolist()
        colour = 2 - int(labels[number])
        images[number, colour, row : row + size // 2, column : column + size // 2] += 100
    return images.to(torch.uint8), labels


def image_set(count: int = 60, size: int = 16, seed: int = 0) -> ImageSet:
    images, labels = pixels(count, size, seed)
    scaled = images.double() / 255
    mean, deviation = scaled.mean((0, 2, 3)), scaled.var((0, 2, 3), unbiased=False).sqrt()
    return ImageSet(images, labels, CLASSES, mean.float(), deviation.float())


def encoded(image: Tensor, kind: str = "PNG") -> bytes:
    from PIL import Image

    file = io.BytesIO()
    height, width = image.shape[1:]
    Image.frombytes("RGB", (width, height), image.permute(1, 2, 0).contiguous().numpy().tobytes()).save(
        file, kind
    )
    return file.getvalue()


def write_folder(folder: Path, count: int = 60, size: int = 16, seed: int = 0) -> Path:
    """A folder of class folders."""
    images, labels = pixels(count, size, seed)
    for number in range(count):
        path = folder / CLASSES[int(labels[number])] / f"{number:04d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encoded(images[number]))
    return folder


def write_zip(path: Path, count: int = 12, top: str = "data/") -> Path:
    images, labels = pixels(count)
    with zipfile.ZipFile(path, "w") as archive:
        for number in range(count):
            archive.writestr(f"{top}{CLASSES[int(labels[number])]}/{number:04d}.png", encoded(images[number]))
        archive.writestr("__MACOSX/._x.png", b"junk")
    return path
