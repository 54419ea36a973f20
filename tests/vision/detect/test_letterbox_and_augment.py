"""Where pixels go, boxes go."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageDraw

from modicum.errors import InputError
from modicum.vision.detect.augment import NONE, AugmentSettings, augmented, flipped
from modicum.vision.detect.image import letterboxed
from modicum.vision.detect.letterbox import PADDING, Letterbox
from modicum.vision.detect.loaded_images import TrainingImage
from tests.bounds import assert_within, gamma

sizes = st.integers(1, 2000)


@given(sizes, sizes, st.sampled_from([(192, 256), (64, 64), (96, 32)]))
def test_an_image_fits_and_boxes_come_back(height: int, width: int, target: tuple[int, int]) -> None:
    box = Letterbox.of((height, width), target)
    assert 1 <= box.height <= target[0]
    assert 1 <= box.width <= target[1]
    assert box.height == target[0] or box.width == target[1]
    assert abs(2 * box.left + box.width - target[1]) <= 1
    assert abs(2 * box.top + box.height - target[0]) <= 1
    boxes = torch.tensor([[0.0, 0, width, height], [width / 3, height / 4, width / 2, height / 2]]).double()
    there = box.to_input(boxes)
    assert float(there[0, 2]) <= target[1] + 1
    size = max(height, width, *target)
    assert_within(box.to_image(there), boxes, gamma(8, torch.float64) * 2 * size / min(1.0, box.scale))


def test_the_picture_is_where_the_letterbox_says() -> None:
    image = Image.new("RGB", (40, 20), (255, 0, 0))
    pixels, box = letterboxed(image, (32, 32))
    assert (box.left, box.top, box.height, box.width) == (0, 8, 16, 32)
    assert pixels[0, 8:24].unique().tolist() == [255]
    assert pixels[:, :8].unique().tolist() == [PADDING]
    assert pixels[:, 24:].unique().tolist() == [PADDING]
    with pytest.raises(InputError, match="at least 1"):
        Letterbox.of((0, 5), (32, 32))


@given(st.integers(0, 3000))
def test_boxes_stay_on_their_objects(seed: int) -> None:
    """A white square on black: all that is bright is inside its box, and the box is no larger than it."""
    picture = Image.new("RGB", (90, 60))
    ImageDraw.Draw(picture).rectangle((40, 20, 59, 39), fill=(255, 255, 255))
    pixels = (
        torch.frombuffer(bytearray(picture.tobytes()), dtype=torch.uint8).view(60, 90, 3).permute(2, 0, 1)
    )
    image = TrainingImage(pixels, torch.tensor([[40.0, 20, 60, 40]]), torch.tensor([1]))
    generator = torch.Generator().manual_seed(seed)
    made, boxes, labels = augmented(image, (64, 96), AugmentSettings(colour=0.0), generator)
    assert made.shape == (3, 64, 96)
    bright = (made[0] > 150).nonzero()
    if not len(boxes):
        assert len(bright) <= 400 * 1.6**2 * 0.6  # less than about half of it is left
        return
    assert labels.tolist() == [1]
    x1, y1, x2, y2 = boxes[0].tolist()
    blur = 2.0  # of bilinear resampling, and of rounding the picture's size
    assert x1 - blur <= int(bright[:, 1].min()) <= x1 + blur
    assert x2 - blur <= int(bright[:, 1].max()) + 1 <= x2 + blur
    assert y1 - blur <= int(bright[:, 0].min()) <= y1 + blur
    assert y2 - blur <= int(bright[:, 0].max()) + 1 <= y2 + blur


def test_a_box_whose_centre_is_outside_goes_and_others_are_cut() -> None:
    image = TrainingImage(
        torch.zeros(3, 64, 96, dtype=torch.uint8),
        torch.tensor([[-20.0, 10, 10, 20], [-5, 10, 15, 20], [30, 30, 31, 60]]),
        torch.tensor([0, 1, 1]),
    )
    _, boxes, labels = augmented(image, (64, 96), NONE, torch.Generator())
    assert boxes.tolist() == [[0, 10, 15, 20]]
    assert labels.tolist() == [1]


def test_flipping_twice_changes_nothing() -> None:
    boxes = torch.tensor([[1.0, 2, 30, 40]])
    for axis, size in ((0, 96), (1, 64)):
        once = flipped(boxes, size, axis)
        assert not torch.equal(once, boxes)
        assert torch.equal(flipped(once, size, axis), boxes)


@pytest.mark.parametrize(
    ("options", "told"),
    [({"zoom": (2.0, 1.0)}, "zoom is"), ({"stretch": 0.5}, "stretch is"), ({"colour": 1.0}, "colour is")],
)
def test_settings_out_of_range_are_one_line(options: dict[str, object], told: str) -> None:
    with pytest.raises(InputError, match=told):
        AugmentSettings(**options)  # type: ignore[arg-type]
