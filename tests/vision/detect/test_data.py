"""VOC and COCO files, and all that may be wrong with them."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from modicum.errors import InputError
from modicum.vision.detect.coco import read_coco
from modicum.vision.detect.image import images_in, open_image
from modicum.vision.detect.loaded_images import load_test_images, load_training_images
from modicum.vision.detect.read_dataset import read_dataset
from modicum.vision.detect.voc import read_voc
from tests.vision.detect.scenes import CLASSES, SIZE, annotation, scene, write_coco, write_voc


def test_voc_gives_images_boxes_and_classes(tmp_path: Path) -> None:
    data = read_dataset(write_voc(tmp_path / "voc"))
    assert data.classes == CLASSES
    assert len(data) == 4
    assert data.num_boxes == 8
    assert data.faults.lines() == []
    for number, image in enumerate(data.images):
        boxes = scene(number)[1]
        assert image.boxes.tolist() == [list(map(float, box[1:])) for box in boxes]
        assert [CLASSES[label] for label in image.labels] == [box[0] for box in boxes]
        assert (image.height, image.width) == (72, 100)
    assert len(read_dataset(tmp_path / "voc", "one")) == 1


def test_coco_gives_the_same(tmp_path: Path) -> None:
    data = read_dataset(write_coco(tmp_path / "coco"))
    assert data.classes == CLASSES
    for number, image in enumerate(data.images):
        assert image.boxes.tolist() == [list(map(float, box[1:])) for box in scene(number)[1]]
    path = tmp_path / "coco" / "instances.json"
    told = json.loads(path.read_text())
    told["annotations"][0]["iscrowd"] = 1
    path.write_text(json.dumps(told))
    assert read_dataset(path).images[0].is_difficult.tolist() == [True, False]


def test_loaded_images_have_boxes_in_their_own_pixels(tmp_path: Path) -> None:
    data = read_dataset(write_voc(tmp_path / "voc"))
    (first, *_) = load_training_images(data, (32, 48))
    # 72 × 100 shrinks to fit 48 × 72, one and a half times the input.
    assert first.pixels.shape == (3, 48, 67)
    wanted = data.images[0].boxes[0] * 0.67
    assert float((first.boxes[0] - wanted).abs().max()) < 0.5
    tested = load_test_images(data, SIZE)[0]
    assert tested.pixels.shape == (3, *SIZE)
    assert tested.annotated.boxes.tolist() == data.images[0].boxes.tolist()


def test_boxes_outside_are_cut_or_dropped_and_counted(tmp_path: Path) -> None:
    folder = write_voc(tmp_path / "voc", 1)
    boxes = [("disc", -5, 3, 20, 30), ("disc", 90, 60, 120, 90), ("square", 100, 1, 130, 9)]
    boxes += [("square", 5, 5, 5, 9), ("disc", 9, 9, 3, 3), ("square", 1, 1, 9, 9)]
    (folder / "Annotations/scene0.xml").write_text(annotation("scene0.png", (72, 100), boxes))
    data = read_voc(folder)
    assert data.images[0].boxes.tolist() == [[0, 3, 20, 30], [90, 60, 100, 72], [1, 1, 9, 9]]
    assert (data.faults.num_clipped, data.faults.num_dropped) == (2, 3)
    assert len(data.faults.lines()) == 2


def test_an_unknown_class_is_named_or_skipped(tmp_path: Path) -> None:
    folder = write_voc(tmp_path / "voc", 2)
    with pytest.raises(InputError, match=r"scene0\.png has a box of the class 'square'.*--skip-unknown"):
        read_voc(folder, classes=("disc",))
    data = read_voc(folder, classes=("disc",), skip_unknown=True)
    assert data.num_boxes == 2
    assert data.faults.unknown == {"square": 2}
    assert "2 boxes of the unknown class 'square'" in data.faults.lines()[0]


def test_what_is_missing_is_named_and_the_rest_kept(tmp_path: Path) -> None:
    folder = write_voc(tmp_path / "voc")
    (folder / "JPEGImages/scene1.png").unlink()
    (folder / "Annotations/scene2.xml").unlink()
    (folder / "Annotations/scene3.xml").write_text("<annotation><size>")
    data = read_voc(folder, "train")
    assert [image.path.name for image in data.images] == ["scene0.png"]
    assert data.faults.without_image == ["scene1.xml"]
    assert data.faults.without_annotation == ["scene2"]
    assert data.faults.unreadable[0].startswith("scene3.xml")
    assert len(data.faults.lines()) == 3


def test_an_image_that_does_not_open_is_named_and_the_rest_kept(tmp_path: Path) -> None:
    folder = write_voc(tmp_path / "voc", 3)
    (folder / "JPEGImages/scene1.png").write_bytes(b"no image")
    data = read_voc(folder)
    with pytest.warns(UserWarning, match=r"1 were left out: .*scene1\.png"):
        assert len(load_training_images(data, SIZE)) == 2
    with pytest.warns(UserWarning, match=r"scene1\.png"):
        assert len(load_test_images(data, SIZE)) == 2
    assert len(data.faults.unreadable) == 1
    assert "scene1.png" in data.faults.unreadable[0]
    for path in (folder / "JPEGImages").iterdir():
        path.write_bytes(b"")
    with pytest.raises(InputError, match="none of 3 images can be read"):
        load_training_images(data, SIZE)


def test_difficult_boxes_are_marked_and_not_learned(tmp_path: Path) -> None:
    folder = write_voc(tmp_path / "voc", 1)
    path = folder / "Annotations/scene0.xml"
    text = path.read_text(encoding="utf-8")
    path.write_text(text.replace("<difficult>0", "<difficult>1", 1), encoding="utf-8")
    data = read_voc(folder)
    assert data.images[0].is_difficult.tolist() == [True, False]
    (image,) = load_training_images(data, SIZE)
    assert image.labels.tolist() == data.images[0].labels[1:].tolist()
    assert len(image.boxes) == 1
    (tested,) = load_test_images(data, SIZE)
    assert tested.annotated.is_difficult.tolist() == [True, False]


def test_annotations_without_their_image_are_counted(tmp_path: Path) -> None:
    path = write_coco(tmp_path / "coco")
    told = json.loads(path.read_text(encoding="utf-8"))
    told["images"].pop()  # of number 12, with two boxes
    path.write_text(json.dumps(told), encoding="utf-8")
    data = read_coco(path)
    assert len(data) == 2
    (line,) = data.faults.lines()
    assert line.startswith("2 have no image and were left out: an annotation of image 12")


def test_an_image_cut_short_is_one_line(tmp_path: Path) -> None:
    image, _ = scene(0, (200, 200))
    image.save(tmp_path / "whole.jpg")
    data = (tmp_path / "whole.jpg").read_bytes()
    (tmp_path / "short.jpg").write_bytes(data[: len(data) // 2])
    with pytest.raises(InputError, match=r"short\.jpg cannot be read as an image"):
        open_image(tmp_path / "short.jpg")
    assert images_in(tmp_path / "whole.jpg") == [tmp_path / "whole.jpg"]
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="holds no image"):
        images_in(tmp_path / "empty")


def _edit(change: Callable[[Any], object]) -> Callable[[Path], None]:
    def edited(path: Path) -> None:
        told = json.loads(path.read_text())
        change(told)
        path.write_text(json.dumps(told))

    return edited


@pytest.mark.parametrize(
    ("damage", "told"),
    [
        (lambda path: path.write_text("{"), "cannot be read as COCO"),
        (lambda path: path.write_text("[]"), "cannot be read as COCO"),
        (_edit(lambda told: told.pop("categories")), "'categories' is missing"),
        (_edit(lambda told: told["annotations"][0].update(bbox=[1, 2, 3])), "cannot be read as COCO"),
        (_edit(lambda told: told["annotations"][0].update(bbox=[1, 2, "nan", 3])), "the bbox of"),
        (_edit(lambda told: told["images"].clear()), "no image that can be used"),
        (_edit(lambda told: told["images"][0].update(height=math.inf)), "cannot be read as COCO"),
        (
            _edit(lambda told: told["annotations"][0].update(bbox=[0, 0, 10**400, 1])),
            "cannot be read as COCO",
        ),
        (lambda path: path.write_text("[" * 100_000), "cannot be read as COCO"),
        (_edit(lambda told: told["annotations"][0].update(category_id=99)), "the category 99, which is not"),
    ],
)
def test_a_damaged_coco_file_is_one_line(tmp_path: Path, damage: Callable[[Path], object], told: str) -> None:
    path = write_coco(tmp_path / "coco")
    damage(path)
    with pytest.raises(InputError, match=told):
        read_coco(path)


def test_a_name_that_no_file_can_have_is_an_image_that_is_missing(tmp_path: Path) -> None:
    path = write_coco(tmp_path / "coco", 2)
    _edit(lambda told: told["images"][0].update(file_name="a" * 5000))(path)
    assert read_coco(path).faults.without_image == ["a" * 5000]
    folder = write_voc(tmp_path / "voc", 2)
    (folder / "JPEGImages/scene0.png").unlink()
    told = annotation("a" * 5000, (72, 100), [("disc", 1, 1, 9, 9)])
    (folder / "Annotations/scene0.xml").write_text(told)
    assert read_voc(folder).faults.without_image == ["scene0.xml"]


def test_paths_that_are_no_data_are_one_line(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="there is no"):
        read_dataset(tmp_path / "nowhere")
    with pytest.raises(InputError, match="no folder Annotations"):
        read_dataset(tmp_path)
    folder = write_voc(tmp_path / "voc", 1)
    with pytest.raises(InputError, match="no split 'val': choose one of one, train"):
        read_dataset(folder, "val")
    (folder / "ImageSets/Main/odd.txt").write_bytes(b"\xff\xfe")
    with pytest.raises(InputError, match=r"odd\.txt cannot be read"):
        read_dataset(folder, "odd")
    with pytest.raises(InputError, match="has no splits"):
        read_dataset(write_coco(tmp_path / "coco"), "train")
    for path in (folder / "Annotations").iterdir():
        path.write_text(annotation("scene0.png", (72, 100), []))
    with pytest.raises(InputError, match="1 images and no box"):
        read_dataset(folder)


@pytest.mark.parametrize(
    "xml",
    [
        "<annotation/>",
        "<?xml version='1.0' encoding='nonsense'?><annotation/>",
        "<annotation><size><width>0</width><height>5</height></size></annotation>",
        "<annotation><size><width>wide</width><height>5</height></size></annotation>",
        "<annotation><size><width>9</width><height>5</height></size><object/></annotation>",
        "<annotation><size><width>9</width><height>5</height></size><object><name>disc</name><bndbox>"
        "<xmin>nan</xmin><ymin>1</ymin><xmax>2</xmax><ymax>2</ymax></bndbox></object></annotation>",
    ],
)
def test_a_damaged_annotation_is_named(tmp_path: Path, xml: str) -> None:
    folder = write_voc(tmp_path / "voc", 2)
    (folder / "Annotations/scene0.xml").write_text(xml)
    data = read_voc(folder)
    assert len(data) == 1
    assert data.faults.unreadable[0].startswith("scene0.xml (")


def test_bccd_is_read_as_it_is(real_data: Callable[[str], Path]) -> None:
    data = read_dataset(real_data("bccd/BCCD"))
    assert data.classes == ("Platelets", "RBC", "WBC")
    assert len(data) == 364
    assert data.num_boxes + data.faults.num_dropped == 4888
    assert data.faults.num_dropped == 2


@pytest.mark.parametrize("is_stored", [False, True])
def test_boxes_of_a_photo_that_is_stored_turned(is_stored: bool, tmp_path: Path) -> None:
    """Annotated as it is shown, or as it is stored: the box is around the white square either way."""
    from PIL import Image

    folder = write_voc(tmp_path / "voc", 1)
    pixels = Image.new("RGB", (60, 40))
    pixels.paste((255, 255, 255), (0, 0, 30, 10))
    exif = Image.Exif()
    exif[0x0112] = 6  # shown turned by 90 degrees, clockwise
    pixels.save(folder / "JPEGImages/scene0.png", exif=exif)
    size, box = ((40, 60), (0, 0, 30, 10)) if is_stored else ((60, 40), (30, 0, 40, 30))
    told = annotation("scene0.png", size, [("disc", *box)])
    (folder / "Annotations/scene0.xml").write_text(told, encoding="utf-8")
    data = read_dataset(folder, "train")
    (image,) = load_training_images(data, (64, 64))
    left, top, right, bottom = (round(x) for x in image.boxes[0].tolist())
    assert bool((image.pixels[:, top:bottom, left:right] == 255).all())
    assert int((image.pixels[0] == 255).sum()) == (right - left) * (bottom - top) == 300
    (tested,) = load_test_images(data, (64, 64))
    assert (tested.annotated.height, tested.annotated.width) == size
