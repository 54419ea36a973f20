"""Small pictures of discs and squares with their boxes, as VOC's and COCO's files; tiny detectors."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor, nn

from modicum.vision.detect.detector import Detector
from modicum.vision.detect.ssd import SSD
from modicum.vision.detect.ssd_settings import SSDSettings

CLASSES = ("disc", "square")
SIZE = (64, 96)
"""Height and width of inputs."""

Box = tuple[str, int, int, int, int]


def scene(number: int, size: tuple[int, int] = (72, 100)) -> tuple[Any, list[Box]]:
    """A picture with one disc and one square on noise, and their boxes."""
    random = np.random.default_rng(number)
    pixels = random.integers(90, 130, (*size, 3), dtype=np.uint8)
    image = Image.fromarray(pixels)
    pen = ImageDraw.Draw(image)
    boxes = []
    for half, name in enumerate(CLASSES):
        side = int(random.integers(18, 30))
        x = int(random.integers(0, size[1] // 2 - side)) + half * size[1] // 2
        y = int(random.integers(0, size[0] - side))
        corners = (x, y, x + side - 1, y + side - 1)  # Pillow draws both ends
        if name == "disc":
            pen.ellipse(corners, fill=(220, 40, 40))
        else:
            pen.rectangle(corners, fill=(40, 40, 220))
        boxes.append((name, x, y, x + side, y + side))
    return image, boxes


def annotation(name: str, size: tuple[int, int], boxes: Sequence[Box]) -> str:
    """VOC's XML of an image of a height and width."""
    objects = "".join(
        f"<object><name>{label}</name><difficult>0</difficult><bndbox><xmin>{x1}</xmin><ymin>{y1}</ymin>"
        f"<xmax>{x2}</xmax><ymax>{y2}</ymax></bndbox></object>"
        for label, x1, y1, x2, y2 in boxes
    )
    return (
        f"<annotation><filename>{name}</filename><size><width>{size[1]}</width><height>{size[0]}</height>"
        f"<depth>3</depth></size>{objects}</annotation>"
    )


def write_voc(folder: Path, count: int = 4) -> Path:
    """A folder in VOC's layout with the splits train (all) and one (the first)."""
    for name in ("Annotations", "JPEGImages", "ImageSets/Main"):
        (folder / name).mkdir(parents=True)
    names = []
    for number in range(count):
        image, boxes = scene(number)
        names.append(f"scene{number}")
        image.save(folder / "JPEGImages" / f"{names[-1]}.png")
        text = annotation(f"{names[-1]}.png", (image.height, image.width), boxes)
        (folder / "Annotations" / f"{names[-1]}.xml").write_text(text, encoding="utf-8")
    (folder / "ImageSets/Main/train.txt").write_text("\n".join(names) + "\n", encoding="utf-8")
    (folder / "ImageSets/Main/one.txt").write_text(f"{names[0]}  1\n", encoding="utf-8")
    return folder


def write_coco(folder: Path, count: int = 3) -> Path:
    """A COCO file beside its images."""
    folder.mkdir(parents=True)
    images, annotations = [], []
    for number in range(count):
        image, boxes = scene(number)
        image.save(folder / f"{number}.png")
        images.append({"id": 10 + number, "file_name": f"{number}.png", "height": 72, "width": 100})
        for name, x1, y1, x2, y2 in boxes:
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": 10 + number,
                    "category_id": 7 + CLASSES.index(name),
                    "bbox": [x1, y1, x2 - x1, y2 - y1],
                    "iscrowd": 0,
                }
            )
    categories = [{"id": 7 + number, "name": name} for number, name in enumerate(CLASSES)]
    told = {"images": images, "annotations": annotations, "categories": categories}
    path = folder / "instances.json"
    path.write_text(json.dumps(told), encoding="utf-8")
    return path


def tiny_settings(backbone: str = "resnet14", width: float = 0.125) -> SSDSettings:
    """A record of a small network."""
    return SSDSettings.of(CLASSES, backbone, width, SIZE)


def tiny_network(backbone: str = "resnet14", width: float = 0.125, seed: int = 0) -> SSD:
    """With random weights and random norms, so that nothing cancels."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = SSD(tiny_settings(backbone, width))
        for module in network.modules():
            if isinstance(module, nn.BatchNorm2d):
                assert module.running_mean is not None
                assert module.running_var is not None
                module.running_mean.normal_(0, 0.2)
                module.running_var.uniform_(0.5, 2)
                nn.init.uniform_(module.weight, 0.5, 1.5)
                nn.init.normal_(module.bias, 0, 0.2)
        for head in network.heads:  # scores that differ
            nn.init.normal_(head.classes.weight, 0, 0.3)  # type: ignore[union-attr, arg-type]  # a Head
            nn.init.normal_(head.boxes.weight, 0, 0.1)  # type: ignore[union-attr, arg-type]  # a Head
    return network.eval()


def tiny_detector(backbone: str = "resnet14", seed: int = 0) -> Detector:
    """See `tiny_network`."""
    return Detector(tiny_network(backbone, seed=seed), {"made": "by a test"})


def random_inputs(count: int = 2, seed: int = 0) -> Tensor:
    """Inputs [count, 3, H, W], 0 to 255."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (count, 3, *SIZE), generator=generator, dtype=torch.uint8)
