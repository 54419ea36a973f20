"""Images from folders and zip files: what is read, split, left out and refused."""

from __future__ import annotations

import zipfile
from pathlib import Path

import pytest
import torch

from modicum.errors import InputError
from modicum.vision.augment import augmented
from modicum.vision.images import load_images, read_image
from tests.vision.pictures import CLASSES, encoded, image_set, pixels, write_folder, write_zip

pytest.importorskip("PIL", reason="needs pillow: pip install 'modicum[vision]'")


def test_a_folder_and_a_zip_of_it_are_the_same_images(tmp_path: Path) -> None:
    write_folder(tmp_path / "folder", 12)
    folder = load_images(tmp_path / "folder", 16)
    zipped = load_images(write_zip(tmp_path / "all.zip"), 16)
    assert folder.unreadable == zipped.unreadable == {}
    assert folder.images.classes == CLASSES
    assert folder.images.digest == zipped.images.digest
    images, labels = pixels(12)
    order = labels.argsort(stable=True)
    assert torch.equal(folder.images.pixels, images[order])
    assert torch.equal(folder.images.labels, labels[order])


def test_inputs_have_mean_0_and_deviation_1_of_each_colour(tmp_path: Path) -> None:
    images = load_images(write_folder(tmp_path, 12), 16).images
    found = images[torch.arange(12)].double()
    # Mean and deviation are float32: a few roundings of values up to 4.
    assert found.mean((0, 2, 3)).abs().max() < 1e-5
    assert (found.var((0, 2, 3), unbiased=False) - 1).abs().max() < 1e-5


def test_other_sizes_and_modes_are_cropped_and_scaled(tmp_path: Path) -> None:
    from PIL import Image

    write_folder(tmp_path, 6)
    flat = torch.full((3, 20, 40), 90, dtype=torch.uint8)
    (tmp_path / "red" / "wide.jpg").write_bytes(encoded(flat, "JPEG"))
    Image.new("L", (9, 9), 200).save(tmp_path / "red" / "grey.png")
    Image.new("RGBA", (9, 9), (1, 2, 3, 0)).save(tmp_path / "red" / "clear.png")
    loaded = load_images(tmp_path, 8)
    assert not loaded.unreadable
    assert loaded.images.pixels.shape == (9, 3, 8, 8)
    assert (read_image(tmp_path / "red" / "grey.png", 8) == 200).all()
    assert (read_image(tmp_path / "red" / "wide.jpg", 8).int() - 90).abs().max() <= 2  # JPEG rounds


def test_unreadable_images_are_named_and_the_rest_kept(tmp_path: Path) -> None:
    write_folder(tmp_path, 12)
    (tmp_path / "red" / "broken.png").write_bytes(b"no image")
    whole = tmp_path / "red" / "0002.png"
    whole.write_bytes(whole.read_bytes()[:60])
    loaded = load_images(tmp_path, 16)
    assert set(loaded.unreadable) == {"red/broken.png", "red/0002.png"}
    assert len(loaded.images) == 11
    with pytest.raises(InputError, match=r"broken\.png cannot be read as an image"):
        read_image(tmp_path / "red" / "broken.png", 16)


def test_what_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="there is no"):
        load_images(tmp_path / "none", 16)
    (tmp_path / "text").write_text("text")
    with pytest.raises(InputError, match="neither a folder nor a zip file"):
        load_images(tmp_path / "text", 16)
    with pytest.raises(InputError, match="no class folder with images"):
        load_images(tmp_path, 16)
    one = tmp_path / "one"
    write_folder(tmp_path / "many", 6)
    one.mkdir()
    (tmp_path / "many" / "red").rename(one / "red")
    with pytest.raises(InputError, match="the class 'red' only"):
        load_images(one, 16)
    for path in (tmp_path / "many" / "blue").iterdir():
        path.write_bytes(b"no image")
    with pytest.raises(InputError, match="no image of the class 'blue' can be read"):
        load_images(tmp_path / "many", 16)
    with pytest.raises(InputError, match="the size is 0"):
        load_images(tmp_path / "many", 0)
    with pytest.raises(InputError, match="GiB: give a smaller size"):
        load_images(tmp_path / "many", 100_000)


def test_a_zip_with_images_at_the_top_has_no_classes(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "flat.zip", "w") as archive:
        archive.writestr("a.png", encoded(pixels(1)[0][0]))
    with pytest.raises(InputError, match="no class folder"):
        load_images(tmp_path / "flat.zip", 16)


def test_splits_hold_a_share_of_each_class(tmp_path: Path) -> None:
    images = image_set(60)
    rest, held = images.split(0.25, 3)
    assert (len(rest), len(held)) == (45, 15)
    assert held.labels.bincount().tolist() == [5, 5, 5]
    together = torch.cat([rest.pixels, held.pixels]).flatten(1)
    assert len(together.unique(dim=0)) == 60
    assert images.split(0.25, 3)[1].digest == held.digest
    assert images.split(0.25, 4)[1].digest != held.digest
    with pytest.raises(InputError, match="the class 'blue' has 1 images"):
        images.subset(torch.tensor([0, 1, 2])).split(0.5)
    write_folder(tmp_path, 6)
    (tmp_path / "red").rename(tmp_path / "rot")
    other = load_images(tmp_path, 16).images
    with pytest.raises(InputError, match="give both sets the same class folders"):
        other.with_statistics_of(images)


def test_augmentation_moves_and_mirrors() -> None:
    images = torch.arange(2 * 3 * 6 * 6, dtype=torch.float32).view(2, 3, 6, 6) + 1
    assert torch.equal(augmented(images, torch.Generator(), flip=False, shift=0), images)
    seen = set()
    for seed in range(40):
        generator = torch.Generator().manual_seed(seed)
        found = augmented(images, generator, flip=True, shift=1)
        assert found.shape == images.shape
        for number in range(2):
            options = {}
            for mirrored in (False, True):
                source = images[number].flip(-1) if mirrored else images[number]
                padded = torch.nn.functional.pad(source, (1, 1, 1, 1))
                for dy in range(3):
                    for dx in range(3):
                        options[mirrored, dy, dx] = padded[:, dy : dy + 6, dx : dx + 6]
            match = [key for key, value in options.items() if torch.equal(value, found[number])]
            assert match
            seen.update(match)
    assert len(seen) == 18  # every one comes up


def test_a_photo_is_turned_as_its_exif_data_says(tmp_path: Path) -> None:
    from PIL import Image

    picture = Image.effect_noise((12, 16), 90).convert("RGB")
    for orientation, turned in (
        (1, picture),
        (3, picture.transpose(Image.Transpose.ROTATE_180)),
        (6, picture.transpose(Image.Transpose.ROTATE_270)),
        (8, picture.transpose(Image.Transpose.ROTATE_90)),
    ):
        exif = Image.Exif()
        exif[0x0112] = orientation
        picture.save(tmp_path / "photo.png", exif=exif)
        turned.save(tmp_path / "turned.png")
        assert torch.equal(read_image(tmp_path / "photo.png", 12), read_image(tmp_path / "turned.png", 12))
